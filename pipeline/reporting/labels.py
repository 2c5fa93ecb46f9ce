"""Names and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from components.attacks.spec import AttackSpec
from components.errors import ConfigError
from components.fields import parse_spec
from components.threat_models import BLACK_BOX, CLEAN, GREY_BOX, RANDOM, TRANSFER, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord

THREATS = {
    CLEAN: "clean",
    RANDOM: "random (control)",
    WHITE_BOX: "white-box",
    BLACK_BOX: "black-box",
    GREY_BOX: "grey-box",
    TRANSFER: "transfer",
}
"""Titles of the threat models, in the order of a table. ``transfer:NAME`` comes after them."""
ROLES = {
    "source": "undefended, source of transfer",
    "control": "control: undefended, another seed",
    "defended": "defended",
    "given": "external, not trained here",
}
ATTACKS = {"noise": "random noise", "autoattack": "AutoAttack", "square": "Square", "adaptive": "Adaptive", "cw": "C&W"}
"""Titles of attacks whose names are no acronyms."""
UNTRUSTED = "†"
"""Mark behind a number of an attack that failed its active test."""


def parsed_attack(attack: str) -> AttackSpec | None:
    """Return the attack that a text names; None for "none" and for an attack of another version."""
    try:
        return AttackSpec.parse(attack)
    except ConfigError:
        return None


def threat_title(threat: str) -> str:
    """Return the title of a threat model."""
    base, _, source = threat.partition(":")
    title = THREATS.get(base, base)
    return f"{title} from {source}" if source else title


def attack_labels(attacks: Iterable[str]) -> dict[str, str]:
    """Return a unique label for each attack: ``bim``, or ``bim_eps0.1`` beside other BIMs."""
    short = {attack: short_name(attack) for attack in dict.fromkeys(["none", *attacks])}
    labels = {}
    for attack, name in short.items():
        settings = {a: parse_spec(a)[1] for a, n in short.items() if n == name}
        own = settings[attack]
        differing = [key for key in own if len({other.get(key) for other in settings.values()}) > 1]
        labels[attack] = "_".join([name, *(f"{key}{_decimal(own[key])}" for key in differing)])
    return labels


def short_name(attack: str) -> str:
    """Return the name of an attack without its settings, as in ``bim-l2``."""
    spec = parsed_attack(attack)
    return parse_spec(attack)[0] if spec is None else spec.short_name


def attack_title(attack: str) -> tuple[str, str]:
    """Return the title and the settings of an attack, as in ("BIM", "eps 0.2, 100 steps")."""
    if attack == "none":
        return "no attack", ""
    name, fields = parse_spec(attack)
    spec = parsed_attack(attack)
    settings = []
    if spec is not None and spec.kind == "minimal_norm":
        settings.append(f"any {norm_text(spec.norm)} norm")
    elif spec is not None and spec.norm == "l2":
        settings.append("L2")
    for key, value in fields.items():
        if key == "steps":
            settings.append(f"{value} steps")
        elif key != "norm":
            settings.append(f"{key.replace('_', ' ')} {_setting(key, value)}")
    return ATTACKS.get(name, name.upper()), ", ".join(settings)


def attack_text(attack: str) -> str:
    """Return the title and the settings of an attack in one text."""
    return ", ".join(filter(None, attack_title(attack)))


def median_norm(metrics: Mapping[str, Any]) -> str:
    """Return the median norm and the number of broken images behind it, as in ``L2 1.23 of 197``.

    Without a median it is ``4 broken``, ``none broken`` or ``nothing to break``; "" within a budget.

    Args:
        metrics: the result of over_seeds.shown_metrics, or a cell of results.table.
    """
    norm = metrics["norm"]
    if norm and metrics.get("clean_accuracy") == 0:
        return "nothing to break"
    return norm_summary(norm, metrics.get(f"{norm}_median"), metrics["broken"], metrics["broken"])


def norm_summary(norm: str | None, median: float | None, fewest: int | None, most: int | None) -> str:
    """Return a median norm and how many broken images it is over: from ``fewest`` to ``most``."""
    if norm is None or fewest is None or most is None:
        return ""
    if most == 0:
        return "none broken"
    count = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    if median is None:
        return f"{count} broken"
    return f"{norm_text(norm)} {median:.{3 if norm == 'linf' else 2}f} of {count}"


def eps_text(eps: float) -> str:
    """Return a budget as people write it: ``0.2``, or ``8/255`` for 0.03137.

    A number of at most two digits, such as 0.2 (51/255), is written as a decimal.
    """
    decimal, levels = f"{eps:.4g}", f"{255 * eps:.3g}"
    is_short = float(f"{eps:.2g}") == eps
    # Keys of records hold only four digits of an eps.
    is_fraction = eps <= 1 and f"{float(levels) / 255:.4g}" == decimal
    return f"{levels}/255" if is_fraction and not is_short else decimal


def budget_text(norm: str, eps: float) -> str:
    """Return the title of a budget, such as ``Linf ≤ 8/255``."""
    return f"{norm_text(norm)} ≤ {eps_text(eps)}"


def norm_text(norm: str | None) -> str:
    """Return the title of a norm."""
    return {"l2": "L2", "linf": "Linf"}.get(norm or "", norm or "")


def _setting(key: str, value: str) -> str:
    """Return the value of an attack's setting. Sizes of perturbations and steps are in pixels."""
    try:
        return eps_text(float(value)) if key in ("eps", "step_size") else _decimal(value)
    except ValueError:
        return value


def _decimal(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def role_titles(record: RunRecord) -> dict[str, str]:
    """Return model -> title of its role."""
    sources = {e.source for e in record.evaluations if e.source != e.model}
    return {
        name: "undefended" if role == "source" and name not in sources else ROLES[role]
        for name, role in record.roles.items()
    }


def is_untrusted(record: RunRecord, evaluation: EvaluationEntry) -> bool:
    """Tell whether the attack failed its active test on the model that its examples were made on.

    Accuracy under such an attack is no sign of robustness, nor on examples transferred from there.
    """
    tested = (record.reliability or {}).get(evaluation.source or "")
    test = tested.active.get(evaluation.attack) if tested else None
    return test is not None and test["passed"] is False


def mark(row: Mapping[str, Any]) -> str:
    """Return the mark behind the number of a row or cell."""
    return UNTRUSTED if row.get("untrusted") else ""


def counted(record: RunRecord) -> str:
    """Return ``n = 1,000 test images``, or the range if evaluations differ."""
    sizes = sorted({e.n for e in record.evaluations})
    return f"{count_text(sizes)} test images" if sizes else "no evaluations yet"


def count_text(sizes: list[int]) -> str:
    """Return ``n = 1,000`` or ``n = 100 to 1,000`` for sorted sizes."""
    return f"n = {sizes[0]:,}" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,}"


def percent(fraction: float) -> str:
    """Return a fraction in %, with one decimal."""
    return f"{100 * fraction:.1f}"


def p_value(p: float, only_first: int, only_second: int) -> str:
    """Return the p-value of McNemar's test: four decimals, or that it is smaller.

    Without an image on which the two models differ there is nothing to test: it is a dash.
    """
    if only_first == only_second == 0:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def mean_and_sd(mean: float, sd: float | None) -> str:
    """Return fractions in %: ``98.3``, or ``98.3 ± 0.4`` with a standard deviation."""
    return percent(mean) if sd is None else f"{percent(mean)} ± {100 * sd:.1f}"


def duration(seconds: float) -> str:
    """Return seconds as ``12.3 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def when(iso: str | None) -> str:
    """Return an ISO time as ``2026-01-31 12:00 UTC``, and any other text unchanged."""
    try:
        return datetime.fromisoformat(iso or "").strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return iso or ""
