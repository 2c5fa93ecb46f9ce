"""A trial: its models, and what it reports of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from repository import ROOT
from sweeps import (
    DATA,
    OBJECTIVE,
    SHAPES,
    plan,
    recipe,
    write_epochs,
)

from pipeline.runtime.storage import Storage
from pipeline.sweep.trials.trial import TrialProgress
from pipeline.training import train


def test_a_trials_models_are_those_of_an_ordinary_run(tmp_path: Path) -> None:
    experiment = recipe(
        models=("a:lam=0.1,shared_blocks=2,seed=1", "no_defense:defense=none", "control:defense=none,seed=1"),
        seeds=2,
        storage=str(tmp_path),
    )
    ordinary = train.prepare_jobs(experiment, SHAPES, DATA, Storage(str(tmp_path)))
    sweep_plan = replace(plan(tmp_path, seeds=2), base=replace(experiment.train, seed=1))
    made = sweep_plan.jobs({"lam": 0.1, "shared_blocks": 2})
    assert [j.address for j in made] == [j.address for j in ordinary[:2]]
    # A whole number for a real one is the same model.
    assert plan(tmp_path).jobs({"lam": 1}) == plan(tmp_path).jobs({"lam": 1.0})


def test_a_trials_process_does_not_load_torch() -> None:
    code = "import sys, pipeline.sweep.trials.trial; sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_trial_reports_what_all_its_seeds_have_and_the_end_only_when_models_are_exported(tmp_path: Path) -> None:
    made = plan(tmp_path, seeds=2).jobs({"lam": 0.1})
    progress = TrialProgress(made, OBJECTIVE, Storage(str(tmp_path)))
    assert progress.new_results() == []
    write_epochs(tmp_path, made[0], [0.1, 0.2, 0.3], exported=True)
    write_epochs(tmp_path, made[1], [0.3], exported=False)
    (first,) = progress.new_results()
    assert (first["epoch"], first["robust"], first["state"]) == (1, pytest.approx(0.2), "running")
    write_epochs(tmp_path, made[1], [0.3, 0.4, 0.5], exported=False)
    assert [r["epoch"] for r in progress.new_results()] == [2]
    assert not progress.finished
    write_epochs(tmp_path, made[1], [0.3, 0.4, 0.5], exported=True)
    (last,) = progress.new_results()
    assert (last["epoch"], last["robust"], last["state"]) == (3, pytest.approx(0.4), "finished")
    assert last["each"] == [[0.9, 0.3], [0.9, 0.5]]
    assert progress.finished
    assert progress.totals()["training_seconds"] == 12


def test_a_model_that_was_only_measured_at_its_end_gives_one_result(tmp_path: Path) -> None:
    (job,) = plan(tmp_path).jobs({"lam": 0.1})
    home = Storage(str(tmp_path)) / job.address
    home.write_json(OBJECTIVE.file(2), {"clean": 1.0, "robust": 0.5, "n": 4, "seconds": 0, "training_seconds": 0})
    home.write_json("model.json", {})
    progress = TrialProgress([job], OBJECTIVE, Storage(str(tmp_path)))
    assert [r["epoch"] for r in progress.new_results()] == [3]
