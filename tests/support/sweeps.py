"""Sweeps for tests: a recipe, a plan, a record, a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components.config import Experiment, Shapes, TrainConfig
from components.fields import to_dict
from components.search_space import IntRange, LogUniform, Point, Space
from pipeline.recipes.registry import RECIPES
from pipeline.runtime import provenance
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import StoredRecord
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.sweep_directory import Sweep
from pipeline.sweep.trials.entry import EpochScores, TrialEntry, TrialModel
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.states import TrialState
from pipeline.training import jobs
from pipeline.training.jobs import TrainingData

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
DATA = TrainingData(train={"lowpass": "pyramids/a"}, without_levels="pyramids/b", validation="pyramids/v")
OBJECTIVE = Objective(attack="pgd:eps=0.1,steps=3", images=10, validation="pyramids/v")
BLOCKS = Space(parameters={"lam": LogUniform(1e-4, 10.0), "shared_blocks": IntRange(1, 4)}, trials=4)
SMALL = [
    *("--data.train-limit", "300", "--data.test-limit", "10", "--train.epochs", "6", "--evaluation.test-images", "10"),
    *("--scaling.cpus-per-worker", "1", "--max-concurrent", "1"),
]


def recipe(**changes: Any) -> Experiment:
    """Return the recipe mnist-smoke, changed."""
    return replace(RECIPES["mnist-smoke"].make(), **changes)


def plan(root: Path, seeds: int = 1) -> SweepPlan:
    """Return the plan of a sweep on a storage."""
    base = TrainConfig(width=4, epochs=3)
    e = recipe(seeds=seeds)
    return SweepPlan(root=str(root), experiment=e, base=base, shapes=SHAPES, data=DATA, weights="", objective=OBJECTIVE)


def entry(number: int, point: Point, state: TrialState, *robust: float, reason: str = "") -> TrialEntry:
    """Return a trial with the robust accuracy of each epoch on 100 images."""
    epochs = [EpochScores(epoch=i, clean=0.9, robust=r, each=((0.9, r),), n=100) for i, r in enumerate(robust, 1)]
    return TrialEntry(
        number=number,
        parameters=point,
        state=state,
        reason=reason,
        epochs=tuple(epochs),
        models=(TrialModel(seed=0, path=f"models/m{number}"),),
        started="2026-01-01T00:00:00+00:00",
    )


def opened(tmp_path: Path, space: Space, trials: Sequence[TrialEntry]) -> Sweep:
    """Return a sweep whose record has the trials. It publishes nothing."""
    e = recipe(train=TrainConfig(width=4, epochs=4))
    record = {
        "name": e.name,
        "space_name": "s",
        "seed": 0,
        "model": "defend",
        "base": to_dict(e.train),
        "experiment": to_dict(e),
        "space": space.to_dict(),
        "trials": [trial.to_json() for trial in trials],
        "references": {},
        "front": [],
        "choice": None,
        "evaluation": None,
        "earlier_evaluations": [],
        "stages": {},
        "created": None,
        "finished": None,
        **provenance.environment(),
    }
    return Sweep(
        experiment=e,
        root=Storage(str(tmp_path)),
        stored=StoredRecord(Storage(str(tmp_path)) / "sweeps/s", "sweep.json", record),
        tracker=SimpleNamespace(),  # type: ignore[arg-type]
        space=space,
        options=SweepOptions(space="s"),
        model="defend",
        base=e.train,
    )


def write_space(path: Path, text: str) -> str:
    """Write a space file, and return its path."""
    path.write_text("from components.search_space import *\nfrom components.errors import *\n" + text)
    return str(path)


def write_epochs(root: Path, job: jobs.TrainingJob, robust: Sequence[float], exported: bool) -> None:
    """Write the objectives of a model's epochs, and its model.json if it is exported."""
    home = Storage(str(root)) / job.address
    for epoch, value in enumerate(robust):
        scores = {"epoch": epoch, "clean": 0.9, "robust": value, "n": 10, "seconds": 1.0, "training_seconds": 2.0}
        home.write_json(OBJECTIVE.file(epoch), scores)
    if exported:
        home.write_json("model.json", {})


def command(space: str, storage: Path, *more: str) -> list[str]:
    """Return the command line of a small sweep."""
    return ["sweep", "mnist-smoke", "--space", space, "--storage", str(storage), *SMALL, *more]
