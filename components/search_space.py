"""Search spaces, the Pareto front and the choice. Imports neither Ray nor torch.

A file of ``tune_spaces/`` holds one :class:`Space`. A user copies it and edits it.
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
from components.errors import ConfigError, one_of
from components.fields import TYPE_WORDS, check, check_choice, hints_of

Value = str | int | float | bool
Search = Literal["grid", "random", "tpe"]
Point = dict[str, Value]
"""One value for each parameter of a space."""

NOT_SWEPT = {
    "seed": "--seeds N trains each configuration from N seeds and judges it by their mean",
    "pretrained": "a sweep for each file of weights",
}
DRAWS_PER_TRIAL = 100
"""Draws per trial. If all of them repeat earlier points, random search ends, and TPE takes the next
point of the grid."""


@dataclass(frozen=True)
class Choice:
    """A list of values."""

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
        """Return the value at a share of the domain, which is in [0, 1)."""
        return self.values[int(share * len(self.values))]

    def __str__(self) -> str:
        return ", ".join(str(v) for v in self.values)


@dataclass(frozen=True)
class Uniform:
    """All real numbers from low to high, equally likely."""

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
        """Return the value at a share of the domain, which is in [0, 1)."""
        return self.low + share * (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class LogUniform:
    """All real numbers from low to high, with each order of magnitude equally likely."""

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
        """Return the value at a share of the domain, which is in [0, 1)."""
        return float(min(self.low * (self.high / self.low) ** share, self.high))

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} (log)"


@dataclass(frozen=True)
class IntRange:
    """All whole numbers from low to high, both included."""

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
        """Return the value at a share of the domain, which is in [0, 1)."""
        return self.low + int(share * (self.high - self.low + 1))

    def __str__(self) -> str:
        return f"{self.low} to {self.high} (whole)"


Domain = Choice | Uniform | LogUniform | IntRange


def listed(domain: Domain) -> tuple[Value, ...] | None:
    """Return all values of a domain in order, or None if there are infinitely many."""
    if isinstance(domain, Choice):
        return tuple(domain.values)
    return tuple(range(domain.low, domain.high + 1)) if isinstance(domain, IntRange) else None


def ends(domain: Domain) -> tuple[Value, ...]:
    """Return the values that stand for a domain in checks: all of a list, the ends of a range."""
    return tuple(domain.values) if isinstance(domain, Choice) else (domain.low, domain.high)


@dataclass(frozen=True)
class Asha:
    """Early stopping by asynchronous successive halving (Li et al. 2020), on robust accuracy.

    After ``grace_epochs``, and then at each ``reduction`` times as many epochs, only the best
    1/``reduction`` of the trials that came so far go on.
    """

    grace_epochs: int = 1
    reduction: float = 3.0

    def __post_init__(self) -> None:
        check(self.grace_epochs >= 1, "asha.grace_epochs", self.grace_epochs, "at least 1")
        check(1 < self.reduction < math.inf, "asha.reduction", self.reduction, "above 1")


@dataclass(frozen=True, kw_only=True)
class Space:
    """Settings of a sweep: what it varies, how it searches and what it measures.

    Raises:
        ConfigError: naming the field, its value and what is allowed.
    """

    parameters: Mapping[str, Domain]
    """Fields of TrainConfig, each with its domain."""
    search: Search = "random"
    """grid: every combination. random: draws that are evenly spread from the first on. tpe:
    Optuna's multi-objective TPE, which learns from earlier trials."""
    trials: int = 24
    """Number of different configurations, at most as many as the space has points. For a grid, 0
    means all of them."""
    asha: Asha | None = None
    """Early stopping. None: every trial is trained to its end."""
    attack: str = "pgd:eps=0.1,steps=10"
    """White-box attack that measures robust accuracy after every epoch. It should be cheap, and
    weak enough that models differ: under an attack that is too strong all fail (docs/sweeps.md)."""
    images: int = 200
    """Number of validation images that it attacks, drawn from the whole split."""
    clean_tolerance: float = 0.01
    """The choice is the most robust configuration whose clean accuracy is at most this far below
    the best (0.01: one point)."""
    model: str = ""
    """Name of the recipe's model to vary. Empty: the first Defend++ or, failing that, defended one."""

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
                check(_has_type(value, hints[name]), where, value, _allowed(hints[name], value))
            if listed(domain) is None:
                check(hints[name] is float, where, str(domain), "IntRange or Choice, since the field has whole numbers")
        check_choice(self.search, typing.get_args(Search), "space.search")
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
        """Number of points; None with a range of real numbers, which has infinitely many."""
        sizes = [len(values) for domain in self.parameters.values() if (values := listed(domain)) is not None]
        return math.prod(sizes) if len(sizes) == len(self.parameters) else None

    @property
    def count(self) -> int:
        """Number of configurations that a sweep tries."""
        size = self.size
        return self.trials if size is None else min(size, self.trials or size)

    def grid(self) -> Iterator[Point]:
        """Yield every combination in order. With a range of real numbers there is none."""
        axes = [listed(domain) or () for domain in self.parameters.values()]
        for values in itertools.product(*axes):
            yield dict(zip(self.parameters, values, strict=True))

    def points(self, seed: int) -> list[Point]:
        """Return the points of a grid, or the first ``trials`` different draws.

        There are fewer draws if the space has no more points. More trials of the same seed begin
        with the same points. TPE's points follow from results, so the list is empty.
        """
        if self.search == "tpe":
            return []
        if self.search == "grid":
            return list(itertools.islice(self.grid(), self.count))
        draws = evenly_spread(len(self.parameters), seed)
        points: dict[tuple[Value, ...], Point] = {}
        for _ in range(self.trials * DRAWS_PER_TRIAL):
            shares = zip(self.parameters.items(), next(draws), strict=True)
            point = {name: domain.at(share) for (name, domain), share in shares}
            points.setdefault(tuple(point.values()), point)
            if len(points) == self.trials:
                break
        return list(points.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain JSON types, with the name of each domain."""
        plain = {k: v for k, v in asdict(self).items() if k != "parameters"}
        plain["parameters"] = {
            name: {"domain": type(d).__name__, **{k: _plain(v) for k, v in asdict(d).items()}}
            for name, d in self.parameters.items()
        }
        return plain


def evenly_spread(dimensions: int, seed: int) -> Iterator[tuple[float, ...]]:
    """Yield points of the unit cube without end, evenly spread from the first on.

    Two dozen independent draws would leave holes and heaps. This is an additive sequence from a
    random start (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    root = 1.0
    for _ in range(64):  # Solve x^(d+1) = x + 1 by iteration. In one dimension it is the golden ratio.
        root = (1 + root) ** (1 / (dimensions + 1))
    rng = random.Random(seed)
    start = [rng.random() for _ in range(dimensions)]
    for i in itertools.count(1):
        yield tuple((start[j] + i * root ** -(j + 1)) % 1.0 for j in range(dimensions))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _has_type(value: Value, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (bool, str) and isinstance(value, hint)


def _allowed(hint: Any, value: Value) -> str:
    if typing.get_origin(hint) is Literal:
        return one_of(value, typing.get_args(hint))
    return TYPE_WORDS.get(hint, str(hint))


def pareto_front(scores: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the indices of the scores that no other score dominates (more is better)."""

    def dominates(other: tuple[float, ...], score: tuple[float, ...]) -> bool:
        return other != score and all(a >= b for a, b in zip(other, score, strict=True))

    return [i for i, score in enumerate(scores) if not any(dominates(other, score) for other in scores)]


def choose(scores: Sequence[tuple[float, float]], clean_tolerance: float) -> int:
    """Return the index of the most robust score whose clean accuracy is near the best.

    Of equally robust scores it is the one with the better clean accuracy, then the first.

    Args:
        scores: clean and robust accuracy.
        clean_tolerance: how far the clean accuracy may be below the best.

    Raises:
        ValueError: there are no scores.
    """
    best = max(clean for clean, _ in scores)
    # The 1e-9 makes up for rounding: 0.99 - 0.98 is above 0.01.
    candidates = [i for i, (clean, _) in enumerate(scores) if clean >= best - clean_tolerance - 1e-9]
    return max(candidates, key=lambda i: (scores[i][1], scores[i][0], -i))
