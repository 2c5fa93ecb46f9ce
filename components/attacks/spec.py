"""Attack specs: name and settings of an attack, frozen, validated and serialisable.

A spec crosses process boundaries in place of the attack. No torch is imported here, so that a
config can be checked without loading it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from components.errors import ConfigError, one_of
from components.fields import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    TYPE_WORDS,
    Rule,
    check,
    convert,
    hints_of,
    is_int64,
    parse_spec,
)

Setting = str | int | float


@dataclass(frozen=True)
class _Attack:
    """Norms (the first is the default), other fields with defaults, and traits of one attack."""

    kind: Literal["budget", "minimal_norm"]
    norms: tuple[str, ...]
    defaults: dict[str, Setting]
    can_stop_on_success: bool = False
    needs_gradients: bool = True
    judged_on_source_only: bool = False
    draws: bool = False


_BOTH = ("linf", "l2")
_TARGET: dict[str, Setting] = {"target": ""}
_ITERATED: dict[str, Setting] = {"steps": 100, "step_size": 0.0}
_ATTACKS: dict[str, _Attack] = {
    "noise": _Attack("budget", _BOTH, {}, needs_gradients=False, draws=True),
    "fgsm": _Attack("budget", _BOTH, _TARGET),
    "bim": _Attack("budget", _BOTH, {**_ITERATED, **_TARGET}, can_stop_on_success=True),
    "pgd": _Attack("budget", _BOTH, {**_ITERATED, "restarts": 1, **_TARGET}, can_stop_on_success=True, draws=True),
    "cw": _Attack(
        "minimal_norm",
        ("l2",),
        {"steps": 20, "binary_search_steps": 5, "lr": 0.5, "initial_const": 1.0, "confidence": 0.0, **_TARGET},
    ),
    "ddn": _Attack(
        "minimal_norm",
        ("l2",),
        {"steps": 100, "gamma": 0.05, "initial_norm": 1.0, "quantization_levels": 0, **_TARGET},
        draws=True,
    ),
    "apgd": _Attack(
        "budget", _BOTH, {"steps": 100, "restarts": 1, "loss": "ce", **_TARGET}, can_stop_on_success=True, draws=True
    ),
    "apgd-t": _Attack(
        "budget", _BOTH, {"steps": 100, "restarts": 1, "targets": 9}, can_stop_on_success=True, draws=True
    ),
    "fab-t": _Attack("minimal_norm", _BOTH, {"steps": 100, "restarts": 1, "targets": 9}),
    "square": _Attack(
        "budget", _BOTH, {"queries": 5000}, needs_gradients=False, judged_on_source_only=True, draws=True
    ),
    "autoattack": _Attack("budget", _BOTH, {"steps": 100, "queries": 5000}, judged_on_source_only=True, draws=True),
    "adaptive": _Attack(
        "budget",
        _BOTH,
        {**_ITERATED, "restarts": 1, "objective": "latent", "weight": 1.0},
        can_stop_on_success=True,
        draws=True,
    ),
}
ATTACK_NAMES = tuple(_ATTACKS)


_RULES: dict[str, Rule] = {
    "eps": (lambda v: 0 < v < math.inf, "a finite number above 0, in units of [0,1] pixels"),
    "steps": AT_LEAST_1,
    "step_size": (lambda v: 0 <= v < math.inf, "a finite number, 0 (2.5 * eps / steps) or more"),
    "binary_search_steps": AT_LEAST_1,
    "lr": POSITIVE,
    "initial_const": POSITIVE,
    "confidence": NOT_NEGATIVE,
    "gamma": (lambda v: 0 < v < 1, "in (0, 1)"),
    "initial_norm": POSITIVE,
    "quantization_levels": (lambda v: v == 0 or v >= 2, "0 (none) or at least 2 (256 for 8-bit images)"),
    "restarts": AT_LEAST_1,
    "targets": AT_LEAST_1,
    "queries": AT_LEAST_1,
    "weight": NOT_NEGATIVE,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("ce", "dlr"),
    "objective": ("latent", "reconstruction"),
    "target": ("", "random", "least_likely", "runner_up"),
}
_FOR_THE_CALLER = ("target", "objective", "weight")
"""Fields that :func:`components.attacks.registry.run_attack` or its caller applies, not the attack
function."""


def _defaults(name: str) -> dict[str, Setting | None]:
    """Return the fields of an attack in canonical order, with their defaults; eps has none."""
    attack = _ATTACKS[name]
    eps: dict[str, Setting | None] = {"eps": None} if attack.kind == "budget" else {}
    return {**eps, "norm": attack.norms[0], **attack.defaults}


def _no_such_field(attack: str, field: str) -> ConfigError:
    return ConfigError.unknown(f"field of {attack}:", field, _defaults(attack))


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """One attack with all its settings.

    A field left ``None`` takes the attack's default; a field that the attack does not have stays
    ``None``. Fields are described in ``components/attacks/<name>.py``.

    Raises:
        ConfigError: the attack is unknown, does not have a field, lacks its eps, or a value is out
            of range. In linf, eps and step_size are at most 1.
    """

    name: str
    norm: str | None = None
    eps: float | None = None
    """Largest norm of the perturbation in [0,1] pixel units. Budget attacks need it, minimal-norm
    attacks do not have it."""
    steps: int | None = None
    step_size: float | None = None
    binary_search_steps: int | None = None
    lr: float | None = None
    initial_const: float | None = None
    confidence: float | None = None
    gamma: float | None = None
    initial_norm: float | None = None
    quantization_levels: int | None = None
    restarts: int | None = None
    targets: int | None = None
    """Number of wrong classes that an attack aims at in turn, if it chooses them itself."""
    queries: int | None = None
    loss: str | None = None
    objective: str | None = None
    """Term that the caller's auxiliary measures: "latent" or "reconstruction"."""
    weight: float | None = None
    """Factor that the caller applies to the auxiliary's values; the cross entropy has weight 1."""
    target: str | None = None
    """Rule that chooses the target class (:func:`components.attacks.targets.choose_targets`); "":
    untargeted."""

    def __post_init__(self) -> None:
        if self.name not in _ATTACKS:
            raise ConfigError.unknown("attack", self.name, _ATTACKS)
        attack = _ATTACKS[self.name]
        defaults = _defaults(self.name)
        for name in _FIELD_TYPES:
            value = getattr(self, name)
            if name not in defaults:
                if value is not None:
                    raise _no_such_field(self.name, name)
                continue
            if value is None:
                value = defaults[name]
            if value is None:
                raise ConfigError(
                    f"{self.name} needs eps, the budget in units of [0,1] pixels: e.g. {self.name}:eps=0.2"
                )
            object.__setattr__(self, name, self._checked(name, value, attack))
        if self.norm == "linf":
            self._check_pixel_range()

    def _check_pixel_range(self) -> None:
        """Refuse lengths above 1, the whole range of a pixel.

        Such a length is meant for pixels from 0 to 255.
        """
        for name in ("eps", "step_size"):
            value = getattr(self, name) or 0
            if value > 1:
                remedy = f": write {value:g}/255" if value <= 255 else ""
                raise ConfigError.of(
                    f"{self.name}.{name}", value, f"at most 1 in linf, in units of [0,1] pixels{remedy}"
                )

    def check_fits(self, channels: int, image_size: int) -> None:
        """Refuse L2 lengths beyond the longest perturbation of an image.

        That is sqrt(channels) * image_size.

        Raises:
            ConfigError: eps, the step size or the initial norm is larger, typically because it was
                meant for pixels from 0 to 255.
        """
        largest = math.sqrt(channels) * image_size
        for field in ("eps", "step_size", "initial_norm") if self.norm == "l2" else ("initial_norm",):
            length = getattr(self, field)
            if length is not None and length > largest:
                raise ConfigError.of(
                    f"{self.name}.{field}",
                    length,
                    f"at most {largest:.4g} in l2, the longest perturbation of {channels} x {image_size} x "
                    f"{image_size} pixels in [0,1]: write {length:g}/255 if it is meant for pixels from 0 to 255",
                )

    def _checked(self, name: str, value: Setting, attack: _Attack) -> Setting:
        where = f"{self.name}.{name}"
        if name == "norm":
            if value not in attack.norms:
                raise ConfigError.of(where, value, " or ".join(attack.norms))
            return value
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise ConfigError.of(where, value, one_of(value, _CHOICES[name]))
            return value
        field_type = _FIELD_TYPES[name]
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or (field_type is int and not isinstance(value, int)):
            raise ConfigError.of(where, value, TYPE_WORDS[field_type])
        if isinstance(value, int) and not is_int64(value):
            raise ConfigError.of(where, value, "at most 2**63 - 1")
        holds, allowed = _RULES[name]
        check(holds(value), where, value, allowed)
        typed: Setting = field_type(value)
        return typed

    @classmethod
    def parse(cls, text: str) -> AttackSpec:
        """Parse ``NAME`` or ``NAME:FIELD=VALUE,...``, e.g. ``bim:eps=0.2,steps=100``.

        Fractions may be written as ``8/255``.

        Raises:
            ConfigError: as the class; also if the text does not have this form.
        """
        name, fields = parse_spec(text)
        if name not in _ATTACKS:
            raise ConfigError.unknown("attack", name, _ATTACKS)
        known = _defaults(name)
        values: dict[str, Any] = {}
        for field, value in fields.items():
            if field not in known:
                raise _no_such_field(name, field)
            field_type = _FIELD_TYPES[field]
            values[field] = convert(_fraction(value) if field_type is float else value, field_type, f"{name}.{field}")
        return cls(name=name, **values)

    def __str__(self) -> str:
        """Return the canonical text.

        It has eps and steps always, and other fields where they differ from the default.
        """
        defaults = _defaults(self.name)
        fields = [
            f"{name}={getattr(self, name)}"
            for name in defaults
            if name in ("eps", "steps") or getattr(self, name) != defaults[name]
        ]
        return ":".join([self.name, ",".join(fields)]) if fields else self.name

    @property
    def kind(self) -> Literal["budget", "minimal_norm"]:
        """Aim of the attack.

        "budget": the best example within eps. "minimal_norm": the adversarial example of the
        smallest norm.
        """
        return _ATTACKS[self.name].kind

    @property
    def may_search_in_bfloat16(self) -> bool:
        """Tell whether the attack's search may run in bfloat16.

        It may if the search follows the directions of gradients over many passes. Square and APGD,
        and with them AutoAttack, compare losses with the best loss so far. Among losses rounded to
        eight bits, the best is soon one that was rounded up, and they miss examples that they find
        in float32 (measured in benchmarks/README.md). FGSM's single pass gains nothing.
        Minimal-norm attacks end at the decision boundary, where eight bits are too few.
        """
        return self.name in ("bim", "pgd", "adaptive")

    @property
    def can_stop_on_success(self) -> bool:
        """Tell whether the attack supports ``stop_on_success``."""
        return _ATTACKS[self.name].can_stop_on_success

    @property
    def draws(self) -> bool:
        """Tell whether the attack takes random numbers: another seed may give other examples."""
        restarts = self.name == "fab-t" and self.restarts != 1
        return _ATTACKS[self.name].draws or restarts or self.target == "random"

    @property
    def can_target(self) -> bool:
        """Tell whether the attack accepts target classes."""
        return "target" in _defaults(self.name)

    @property
    def needs_gradients(self) -> bool:
        """Tell whether the attack needs gradients; otherwise it reads at most the model's output."""
        return _ATTACKS[self.name].needs_gradients

    @property
    def judged_on_source_only(self) -> bool:
        """Tell whether examples are meaningful only on the model that they were made on.

        Such an attack always drops a sample once it is broken.
        """
        return _ATTACKS[self.name].judged_on_source_only

    @property
    def short_name(self) -> str:
        """Name for column heads and file names.

        It adds the norm if that is not the attack's default, and the target if there is one.
        """
        norm = None if self.norm == _ATTACKS[self.name].norms[0] else self.norm
        return "-".join(filter(None, (self.name, norm, self.target)))

    def settings(self) -> dict[str, Setting]:
        """Return the keyword arguments of the attack function.

        The norm is left out if the attack has only one.
        """
        omitted = {*_FOR_THE_CALLER, *(["norm"] if len(_ATTACKS[self.name].norms) == 1 else [])}
        return {name: getattr(self, name) for name in _defaults(self.name) if name not in omitted}


_FIELD_TYPES: dict[str, type] = {
    name: next(t for t in get_args(hint) if t is not type(None))
    for name, hint in hints_of(AttackSpec).items()
    if name != "name"
}
"""Type of each field that text may set, in the order of :class:`AttackSpec`."""


def _fraction(text: str) -> str:
    numerator, slash, denominator = text.partition("/")
    try:
        divisor = float(denominator) if slash else 0.0
        return repr(float(numerator) / divisor) if divisor > 0 else text
    except ValueError:
        return text
