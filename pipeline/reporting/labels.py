"""Names and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from components.attacks.spec import AttackSpec
from components.config.roles import roles_of
from components.errors import ConfigError
from components.fields import parse_spec
from pipeline.reporting.records import experiment_of

THREATS = {
    "clean": "clean",
    "random": "random (control)",
    "white_box": "white-box",
    "black_box": "black-box",
    "grey_box": "grey-box",
    "transfer": "transfer",
}
"""Threat models in the order of a table, as they are written for people; ``transfer:NAME`` comes after them."""
ROLES = {
    "source": "undefended, source of transfer",
    "control": "control: undefended, another seed",
    "defended": "defended",
    "given": "given, not trained here",
}

UNTRUSTED = "†"
"""Behind a number of an attack that failed its active test."""


def threat_title(threat: str) -> str:
    """A threat model as it is written for people."""
    base, _, source = threat.partition(":")
    return f"{THREATS.get(base, base)} from {source}" if source else THREATS.get(threat, threat)


def attack_labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Attack spec -> a short name, ``bim``, with settings only where the run has several of that name: ``bim_eps0.1``."""
    specs = dict.fromkeys(["none", *(e["attack"] for e in record.get("evaluations", []))])
    short = {spec: short_name(spec) for spec in specs}
    out = {}
    for spec, name in short.items():
        rivals = [s for s, n in short.items() if n == name]
        fields = {s: parse_spec(s)[1] for s in rivals}
        differing = [k for k in fields[spec] if len({fields[s].get(k) for s in rivals}) > 1]
        out[spec] = "_".join([name, *(f"{k}{_decimal(fields[spec][k])}" for k in differing)])
    return out


def short_name(spec: str) -> str:
    try:
        return AttackSpec.parse(spec).short_name
    except ConfigError:  # "none", or an attack of another version
        return parse_spec(spec)[0]


def attack_title(spec: str) -> tuple[str, str]:
    """Name and settings for people: ``bim:eps=0.2,steps=100`` is ("BIM", "eps 0.2, 100 steps")."""
    if spec == "none":
        return "no attack", ""
    fields = parse_spec(spec)[1]
    said = []
    try:
        parsed = AttackSpec.parse(spec)
        if parsed.kind == "minimal_norm":
            said.append(f"any {norm_text(parsed.norm)} norm")
        elif parsed.norm == "l2":
            said.append("L2")
    except ConfigError:
        pass  # an attack of another version: its text says all we know
    for key, value in fields.items():
        if key == "steps":
            said.append(f"{value} steps")
        elif key != "norm":
            said.append(f"{key.replace('_', ' ')} {_decimal(value)}")
    return parse_spec(spec)[0].upper() if spec.partition(":")[0] != "noise" else "random noise", ", ".join(said)


def median_norm(cell: Mapping[str, Any]) -> str:
    """Return ``L2 1.23 of 197``, the median norm and the number of broken images that it is over.

    Args:
        cell: a cell of :func:`table`, or what comparison.shown_metrics returned.

    Returns:
        Without a median ``4 broken``, ``none broken`` or ``nothing to break``; empty for an attack within a budget.
    """
    if cell["norm"] and cell.get("clean_accuracy") == 0:
        return "nothing to break"
    return norm_summary(cell["norm"], cell.get(f"{cell['norm']}_median"), cell["broken"], cell["broken"])


def norm_summary(norm: str | None, median: float | None, fewest: int | None, most: int | None) -> str:
    if norm is None or fewest is None or most is None:
        return ""
    if most == 0:
        return "none broken"
    count = f"{fewest}" if fewest == most else f"{fewest}–{most}"
    if median is None:
        return f"{count} broken"
    return f"{norm_text(norm)} {median:.{3 if norm == 'linf' else 2}f} of {count}"


def norm_text(name: str | None) -> str:
    return {"l2": "L2", "linf": "Linf"}.get(name or "", name or "")


def _decimal(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def role_titles(record: Mapping[str, Any]) -> dict[str, str]:
    """Return model -> its role as it is written for people."""
    made_on = {e.get("source") for e in record["evaluations"] if e.get("source") != e["model"]}
    return {
        name: "undefended" if role == "source" and name not in made_on else ROLES[role]
        for name, role in roles_of(experiment_of(record)).items()
    }


def is_untrusted(record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether the attack failed its active test on the model that the examples were made on: what withstands them is no sign of
    robustness, nor do they show anything where they are transferred."""
    tested = (record.get("reliability") or {}).get(evaluation.get("source") or "", {}).get("active", {})
    return evaluation["attack"] in tested and tested[evaluation["attack"]]["passed"] is False


def mark(row: Mapping[str, Any]) -> str:
    """What stands behind the number of a row or cell."""
    return UNTRUSTED if row.get("untrusted") else ""


def counted(record: Mapping[str, Any]) -> str:
    """``n = 1,000 test images``, or the range where evaluations differ."""
    sizes = sorted({e["n"] for e in record["evaluations"]})
    if not sizes:
        return "no evaluations yet"
    return f"n = {sizes[0]:,} test images" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,} test images"


def attack_text(attack: str) -> str:
    name, settings = attack_title(attack)
    return f"{name}, {settings}" if settings else name


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def mean_and_sd(mean: float, sd: float | None) -> str:
    """Fractions as percentages: ``98.3`` or ``98.3 ± 0.4``."""
    return percent(mean) if sd is None else f"{percent(mean)} ± {100 * sd:.1f}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def when(iso: str | None) -> str:
    """An ISO time as ``2026-01-31 12:00 UTC``; what is none, as it is."""
    try:
        return datetime.fromisoformat(iso or "").strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return iso or ""
