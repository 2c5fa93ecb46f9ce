"""Search spaces and what is made of a search's outcome: declarative, without Ray and without torch.

A file of ``tune_spaces/`` holds one :class:`Space`; a user copies it and edits it.
"""

from __future__ import annotations

import itertools
import math
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from components.attacks.spec import AttackSpec
from components.config import TrainConfig
from components.errors import ConfigError
from components.fields import check, hints_of

Value = str | int | float | bool
Point = dict[str, Value]
"""One value for each parameter of a space."""

NOT_SWEPT = {
    "seed": "--seeds N trains each configuration from N seeds and judges it by their mean",
    "pretrained": "a sweep for each file of weights",
}
DRAWS_PER_TRIAL = 100
"""How often a point is drawn anew that was drawn before, until random search counts a space of few points as exhausted and TPE
takes the next of the grid."""


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: Sequence[Value]

    def __post_init__(self) -> None:
        check(
            not isinstance(self.values, str) and len(self.values) > 0,
            "Choice",
            self.values,
            "a list of at least one value",
        )
        object.__setattr__(self, "values", tuple(self.values))
        check(len(set(self.values)) == len(self.values), "Choice", self.values, "a list with each value once")

    def at(self, share: float) -> Value:
        """The value so far along the domain; share in [0, 1)."""
        return self.values[int(share * len(self.values))]

    def __str__(self) -> str:
        return ", ".join(str(v) for v in self.values)


@dataclass(frozen=True)
class Uniform:
    """Any number from low to high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check(
            -math.inf < self.low < self.high < math.inf,
            "Uniform",
            (self.low, self.high),
            "(low, high) with low < high, both finite",
        )

    def at(self, share: float) -> Value:
        """The value so far along the domain; share in [0, 1)."""
        return self.low + share * (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class LogUniform:
    """Any number from low to high, each order of magnitude as likely as another."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check(
            0 < self.low < self.high < math.inf,
            "LogUniform",
            (self.low, self.high),
            "(low, high) with 0 < low < high, both finite",
        )

    def at(self, share: float) -> Value:
        """The value so far along the domain; share in [0, 1)."""
        return float(min(self.low * (self.high / self.low) ** share, self.high))

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} (log)"


@dataclass(frozen=True)
class IntRange:
    """Any whole number from low to high, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.low, self.high))
        check(
            whole and self.low < self.high,
            "IntRange",
            (self.low, self.high),
            "(low, high) with low < high, both whole numbers",
        )

    def at(self, share: float) -> Value:
        """The value so far along the domain; share in [0, 1)."""
        return self.low + int(share * (self.high - self.low + 1))

    def __str__(self) -> str:
        return f"{self.low} to {self.high} (whole)"


Domain = Choice | Uniform | LogUniform | IntRange


def listed(domain: Domain) -> tuple[Value, ...] | None:
    """All values of a domain, in order; None where there are infinitely many."""
    if isinstance(domain, Choice):
        return tuple(domain.values)
    return tuple(range(domain.low, domain.high + 1)) if isinstance(domain, IntRange) else None


def ends(domain: Domain) -> tuple[Value, ...]:
    """The values that a domain can be checked by: all of a list, the ends of a range."""
    return tuple(domain.values) if isinstance(domain, Choice) else (domain.low, domain.high)


@dataclass(frozen=True)
class Asha:
    """Early stopping by asynchronous successive halving (Li et al. 2020), on robust accuracy: after ``grace_epochs``, and then at
    each ``reduction`` times as many epochs, only the best 1/``reduction`` of the trials that came so far go on."""

    grace_epochs: int = 1
    reduction: float = 3.0

    def __post_init__(self) -> None:
        check(self.grace_epochs >= 1, "asha.grace_epochs", self.grace_epochs, "at least 1")
        check(1 < self.reduction < math.inf, "asha.reduction", self.reduction, "above 1")


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep varies, how it searches and what it measures.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """

    parameters: Mapping[str, Domain]
    """Fields of TrainConfig, each with its domain."""
    search: Literal["grid", "random", "tpe"] = "random"
    """grid: every combination. random: draws that spread evenly from the first on. tpe: Optuna's multi-objective TPE, which learns from the trials before."""
    trials: int = 24
    """Configurations in all, none of them twice: no more than the space has points. 0, of a grid: all of them."""
    asha: Asha | None = None
    """Early stopping; None: every trial is trained to its end."""
    attack: str = "pgd:eps=0.1,steps=10"
    """White-box attack that measures robust accuracy after every epoch. Cheap, and weak enough that models differ under it: one
    that leaves nothing of any model says nothing (docs/evaluation.md)."""
    images: int = 200
    """Validation images that it attacks, spread evenly over the split."""
    clean_tolerance: float = 0.01
    """The choice is the most robust configuration whose clean accuracy is at most so much (0.01: one point) below the best."""
    model: str = ""
    """Which of the recipe's models is varied, by its name there. Empty: its first Defend++ model, else its first defended one."""

    def __post_init__(self) -> None:
        check(bool(self.parameters), "space.parameters", dict(self.parameters), "at least one field of TrainConfig")
        hints = hints_of(TrainConfig)
        for name, domain in self.parameters.items():
            where = f"space.parameters[{name!r}]"
            if name not in hints:
                raise ConfigError.unknown("field of TrainConfig in space.parameters:", name, hints)
            if name in NOT_SWEPT:
                raise ConfigError(f"{where} cannot be swept: {NOT_SWEPT[name]}")
            check(
                isinstance(domain, Choice | Uniform | LogUniform | IntRange),
                where,
                domain,
                "Choice([...]), Uniform(low, high), LogUniform(low, high) or IntRange(low, high)",
            )
            for value in ends(domain):
                check(_is_of(value, hints[name]), where, value, f"a value of type {_named(hints[name])}")
            if listed(domain) is None:
                check(hints[name] is float, where, str(domain), "IntRange or Choice, since the field has whole numbers")
        check(self.search in ("grid", "random", "tpe"), "space.search", self.search, "one of 'grid', 'random', 'tpe'")
        if self.search == "grid":
            for name, domain in self.parameters.items():
                check(
                    listed(domain) is not None,
                    f"space.parameters[{name!r}]",
                    str(domain),
                    "Choice or IntRange where search is 'grid': a range of real numbers has no end of points",
                )
        least = 0 if self.search == "grid" else 1
        check(self.trials >= least, "space.trials", self.trials, f"at least {least}")
        check(
            self.asha is None or "epochs" not in self.parameters,
            "space.asha",
            self.asha,
            "None where epochs is swept: trials of unlike length cannot be compared half-way",
        )
        spec = AttackSpec.parse(self.attack)
        check(
            spec.kind == "budget" and spec.name not in ("adaptive", "noise"),
            "space.attack",
            self.attack,
            "an attack with a budget, such as pgd:eps=0.1,steps=10 (adaptive and noise are not for this)",
        )
        check(self.images >= 1, "space.images", self.images, "at least 1")
        check(0 <= self.clean_tolerance <= 1, "space.clean_tolerance", self.clean_tolerance, "in [0, 1]")

    @property
    def size(self) -> int | None:
        """How many points it has; None with a range of real numbers, which has no end of them."""
        sizes = [len(values) for domain in self.parameters.values() if (values := listed(domain)) is not None]
        return math.prod(sizes) if len(sizes) == len(self.parameters) else None

    @property
    def count(self) -> int:
        """How many configurations there will be: none is tried twice."""
        size = self.size
        return self.trials if size is None else min(size, self.trials or size)

    def grid(self) -> Iterator[Point]:
        """Every combination, in order; with a range of real numbers none can be listed."""
        axes = [listed(domain) or () for domain in self.parameters.values()]
        for values in itertools.product(*axes):
            yield dict(zip(self.parameters, values, strict=True))

    def points(self, seed: int) -> list[Point]:
        """The points of a grid, or the first ``trials`` draws that differ (fewer where the space has no more).

        More trials of the same seed begin with the same points. TPE's follow from results: there are none to list.
        """
        if self.search == "tpe":
            return []
        if self.search == "grid":
            return list(itertools.islice(self.grid(), self.count))
        draws = spread(len(self.parameters), seed)
        points: dict[tuple[Value, ...], Point] = {}
        for _ in range(self.trials * DRAWS_PER_TRIAL):
            shares = zip(self.parameters.items(), next(draws), strict=True)
            point = {name: domain.at(share) for (name, domain), share in shares}
            points.setdefault(tuple(point.values()), point)
            if len(points) == self.trials:
                break
        return list(points.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, domains by their name."""
        plain = {k: v for k, v in asdict(self).items() if k != "parameters"}
        plain["parameters"] = {
            name: {"domain": type(d).__name__, **{k: _plain(v) for k, v in asdict(d).items()}}
            for name, d in self.parameters.items()
        }
        return plain


def spread(dimensions: int, seed: int) -> Iterator[tuple[float, ...]]:
    """Points of the unit cube without end, evenly spread from the first on: two dozen independent draws leave holes and heaps.

    An additive sequence (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences") from a random start.
    """
    root = 1.0
    for _ in range(64):  # of x^(d+1) = x + 1: the golden ratio, and what takes its place in more dimensions
        root = (1 + root) ** (1 / (dimensions + 1))
    rng = random.Random(seed)
    start = [rng.random() for _ in range(dimensions)]
    for i in itertools.count(1):
        yield tuple((start[j] + i * root ** -(j + 1)) % 1.0 for j in range(dimensions))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_of(value: Value, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (bool, str) and isinstance(value, hint)


def _named(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return str(getattr(hint, "__name__", hint))


def pareto_front(scores: Sequence[tuple[float, ...]]) -> list[int]:
    """Which scores (more is better, in each place) no other score reaches in all places and exceeds in one; in their order."""
    return [
        i
        for i, mine in enumerate(scores)
        if not any(
            other != mine and all(theirs >= own for theirs, own in zip(other, mine, strict=True)) for other in scores
        )
    ]


def choose(scores: Sequence[tuple[float, float]], clean_tolerance: float) -> int:
    """Which (clean, robust) is chosen: the most robust of those at most ``clean_tolerance`` below the best clean accuracy; of equally
    robust ones the one with the better clean accuracy, then the first.

    Raises:
        ValueError: there are none.
    """
    best = max(clean for clean, _ in scores)
    # a hair more, so that 0.99 - 0.98 is not above 0.01
    able = [i for i, (clean, _) in enumerate(scores) if clean >= best - clean_tolerance - 1e-9]
    return max(able, key=lambda i: (scores[i][1], scores[i][0], -i))
