"""Which model a worker group takes next, and which one is blamed when its workers die. No Ray: a function dies in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.config import TrainConfig
from pipeline.recipes.registry import RECIPES
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage
from pipeline.training import ray_runs
from pipeline.training.assignment import Assignment
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingJob

NAMES = ("a", "killer", "b")
JOBS = [TrainingJob(name=n, config=TrainConfig(), pyramids={}, weights="", address=f"models/{n}") for n in NAMES]
ORDERS = [job.request() for job in JOBS]


def finish(order: dict[str, Any], root: Storage) -> None:
    (root / order["address"]).write_json("model.json", {})


def taken(assignment: Assignment, root: Storage, end: Callable[[dict[str, Any], Storage], None] = finish) -> list[str]:
    addresses = []
    while order := assignment.take():
        addresses.append(order["address"].removeprefix("models/"))
        assert assignment.holds
        end(order, root)
        assignment.leave()
    assert order is None
    return addresses


def test_models_come_in_order_without_those_that_are_over(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    assert taken(Assignment(ORDERS, root, "t"), root) == list(NAMES)
    assert taken(Assignment(ORDERS, root, "t"), root) == []


@pytest.mark.parametrize("file", [FAILED_MODEL, NOT_FINITE])
def test_a_model_that_failed_is_tried_again_by_another_command_alone(tmp_path: Path, file: str) -> None:
    root = Storage(tmp_path)

    def fail(order: dict[str, Any], root: Storage) -> None:
        (root / order["address"]).write_json(file, {"token": "t"})

    assert taken(Assignment(ORDERS, root, "t"), root, fail) == list(NAMES)
    assert taken(Assignment(ORDERS, root, "t"), root) == []
    assert taken(Assignment(ORDERS, root, "another"), root) == list(NAMES)


def test_a_model_that_another_run_trains_comes_last(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    other = Lease(root / "models/a").acquire()
    assignment = Assignment(ORDERS, root, "t")
    for expected in ("models/killer", "models/b"):
        order = assignment.take()
        assert order is not None
        assert order["address"] == expected
        finish(order, root)
        assignment.leave()
    assert assignment.take() == {}, "wait"
    other.release()
    assert taken(assignment, root) == ["a"]


@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_model_that_kills_its_workers_is_blamed_and_the_others_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_failures: int
) -> None:
    root, tries = Storage(tmp_path), list[str]()

    def fit(worker: Any, config: dict[str, Any], *more: Any, max_failures: int) -> None:
        """Ray Train, as far as it starts dead workers again: so often in all."""
        for _ in range(max_failures + 1):
            assignment = Assignment(config["jobs"], root, config["token"])
            while order := assignment.take():
                tries.append(order["address"])
                if "killer" in order["address"]:
                    break  # dead, with its lease
                finish(order, root)
                assignment.leave()
            else:
                return
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr(ray_runs, "fit_workers", fit)
    experiment = RECIPES["mnist-smoke"].make()
    experiment = replace(experiment, scaling=replace(experiment.scaling, max_failures=max_failures))
    for _ in range(2):  # the same command again meets what the first one left
        ray_runs.train_group(JOBS, {"token": f"run-{len(tries)}"}, experiment, root)
        assert (tmp_path / "models/a/model.json").exists()
        assert (tmp_path / "models/b/model.json").exists()
        reason = Storage(tmp_path / "models/killer").read_json(FAILED_MODEL)["reason"]
        assert "died again and again" in reason
        assert "a worker was killed" in reason
    assert tries.count("models/a") == tries.count("models/b") == 1
