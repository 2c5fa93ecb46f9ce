"""The content of ``tracking.json``, which remembers what a run directory has published."""

from __future__ import annotations

from typing import TypedDict

SCHEMA = 1


class RunState(TypedDict):
    """An MLflow run that exists."""

    id: str
    start: int
    """Milliseconds since 1970."""


class State(TypedDict):
    """What ``tracking.json`` remembers of one MLflow server or database."""

    experiment: str | None
    runs: dict[str, RunState]
    """By alias."""
    published: list[str]
    """Keys of operations, ``ALIAS|WHAT``."""
    status: dict[str, str]
    """By alias, the status that was sent last."""
    models: dict[str, str]
    """By alias, MLflow's id of the logged model of a run."""
    generation: int
    """How often the runs of this directory were replaced by new ones."""
    is_replacing: bool
    """Whether runs of an earlier generation are still to be deleted."""


class TrackingFile(TypedDict):
    """The content of ``tracking.json``."""

    schema: int
    token: str
    """Random, unique to this run directory. A part of the tag by which a run is found again."""
    uris: dict[str, State]
    """By tracking URI without its password."""


def new_state() -> State:
    """Return the state of a directory that has published nothing."""
    return {
        "experiment": None,
        "runs": {},
        "published": [],
        "status": {},
        "models": {},
        "generation": 0,
        "is_replacing": False,
    }
