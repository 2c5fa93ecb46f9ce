"""A trial as sweep.json holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from components.fields import to_dict
from components.search_space import Point
from pipeline.sweep.trials.states import OVER, PENDING, SETTLED, TrialState


@dataclass(frozen=True, kw_only=True)
class EpochScores:
    """What a trial's models reach after an epoch, on validation images."""

    epoch: int
    """Counts from 1."""
    clean: float
    """Clean accuracy, the mean over the seeds."""
    robust: float
    """Robust accuracy, the mean over the seeds."""
    each: tuple[tuple[float, float], ...]
    """Clean and robust accuracy of each seed."""
    n: int
    """How many images were attacked."""


@dataclass(frozen=True, kw_only=True)
class TrialModel:
    """One seed's model of a trial."""

    seed: int
    path: str
    """Its address below the storage's root."""


@dataclass(frozen=True, kw_only=True)
class TrialEntry:
    """A trial: its point, how far it is and what it reached."""

    number: int
    """Counts from 1."""
    parameters: Point
    state: TrialState = PENDING
    reason: str = ""
    """Why it was stopped, diverged or failed."""
    epochs: tuple[EpochScores, ...] = ()
    models: tuple[TrialModel, ...] = ()
    seconds: float = 0.0
    """Wall-clock time of its latest try."""
    training_seconds: float = 0.0
    objective_seconds: float = 0.0
    started: str | None = None
    """When its latest try began."""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TrialEntry:
        """Return the trial of an entry of sweep.json."""
        epochs = tuple(EpochScores(**{**e, "each": tuple(map(tuple, e["each"]))}) for e in entry["epochs"])
        models = tuple(TrialModel(**model) for model in entry["models"])
        return cls(**{**entry, "epochs": epochs, "models": models})

    def to_json(self) -> dict[str, Any]:
        """Return the entry that sweep.json holds."""
        return to_dict(self)

    @property
    def last(self) -> EpochScores:
        """Scores after the last epoch. ``epochs`` must have one."""
        return self.epochs[-1]

    @property
    def is_over(self) -> bool:
        """Tell whether the trial does not run any more."""
        return self.state in OVER

    @property
    def is_settled(self) -> bool:
        """Tell whether no command runs the trial again."""
        return self.state in SETTLED

    @property
    def ended_at(self) -> float:
        """When the trial ended, in unix seconds."""
        if self.started is None:
            raise ValueError(f"trial {self.number} has not begun")
        return datetime.fromisoformat(self.started).timestamp() + self.seconds


def trials_of(record: Mapping[str, Any]) -> list[TrialEntry]:
    """Return the trials of a sweep.json."""
    # A copy of the list: another thread may append to it.
    return [TrialEntry.from_json(entry) for entry in list(record["trials"])]
