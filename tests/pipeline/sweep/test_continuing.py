"""Sweeps that go on from their record: search, early stopping, events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from sweeps import (
    BLOCKS,
    entry,
    opened,
    plan,
    write_epochs,
)

from components.search_space import Asha, Choice, LogUniform, Space
from pipeline.runtime.storage import StorageError
from pipeline.sweep.run import pending_trials
from pipeline.sweep.search import tuner
from pipeline.sweep.search.early_stopping import early_stopping
from pipeline.sweep.search.monitor import SweepMonitor, sweep_stopper, tune_callback
from pipeline.sweep.trials.entry import TrialEntry, TrialModel
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import TrialState
from pipeline.sweep.trials.trial import run_trial


def test_finished_stopped_and_diverged_trials_are_not_run_again_failed_ones_are(tmp_path: Path) -> None:
    states: list[TrialState] = ["finished", "stopped", "diverged", "failed", "running"]
    points = BLOCKS.points(0)
    space = replace(BLOCKS, trials=6)
    trials = [entry(i + 1, p, s, 0.1) for i, (p, s) in enumerate(zip(space.points(0), states, strict=False))]

    def pending(space: Space) -> tuple[list[int], int]:
        sweep = opened(tmp_path, space, trials)
        entries, proposals = pending_trials(sweep)
        assert [t.parameters for t in sweep.trials][:4] == points, "as they were, and one more"
        return [t.number for t in entries], proposals

    assert pending(space) == ([4, 5, 6], 0)
    assert pending(replace(BLOCKS, trials=4)) == ([4], 0)
    assert pending(replace(BLOCKS, search="tpe", trials=7)) == ([4, 5], 2)


def test_fewer_trials_leave_no_trials_that_never_run(tmp_path: Path) -> None:
    states: list[TrialState] = ["finished", "pending", "failed", "pending", "pending"]
    points = replace(BLOCKS, trials=5).points(0)
    trials = [entry(i, p, s, 0.1) for i, (p, s) in enumerate(zip(points, states, strict=True), 1)]
    for asked, numbers in (2, [2]), (4, [2, 3, 4]), (5, [2, 3, 4, 5]):
        sweep = opened(tmp_path, replace(BLOCKS, trials=asked), trials)
        assert [trial.number for trial in pending_trials(sweep)[0]] == numbers
        assert len(sweep.trials) == max(asked, 3), "the failed one is kept"


def test_tpe_is_told_what_ended_and_begins_with_what_did_not(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", trials=6)
    known = [
        entry(1, {"lam": 0.1, "shared_blocks": 1}, "finished", 0.1, 0.2),
        entry(2, {"lam": 9.0, "shared_blocks": 2}, "diverged"),
        entry(3, {"lam": 0.3, "shared_blocks": 3}, "running", 0.3),
    ]
    sweep = opened(tmp_path, space, known)
    _, search = tuner.search_algorithm(sweep, pending_trials(sweep)[0])
    assert search.suggest("t1") == {"lam": 0.3, "shared_blocks": 3}
    drawn = search.suggest("t2")
    assert 1e-4 <= drawn["lam"] <= 10
    assert [t.values for t in search.study.get_trials() if t.values] == [[0.9, 0.2], [0.0, 0.0]]
    search.on_trial_complete("t1", {"clean": 0.9, "robust": 0.7})
    assert search.study.get_trials()[2].values == [0.9, 0.7], "two objectives"


def monitor_of(tmp_path: Path, space: Space, trials: Sequence[TrialEntry]) -> SweepMonitor:
    """Return the monitor of a sweep whose record has the trials."""
    sweep = opened(tmp_path, space, trials)
    return SweepMonitor(sweep, replace(plan(tmp_path), base=sweep.base), JobQueue(attempts=1), [])


def test_early_stopping_knows_the_trials_of_the_command_before(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", asha=Asha(grace_epochs=1, reduction=2))
    points = replace(BLOCKS, trials=5).points(0)
    trial, result = SimpleNamespace(trial_id="new"), {"epoch": 1, "robust": 0.4}
    known = [entry(i + 1, p, "finished", 0.5, 0.6, 0.7, 0.8) for i, p in enumerate(points[:4])]
    for trials, decision in ((known, "STOP"), ([], "CONTINUE")):
        monitor = monitor_of(tmp_path, space, trials)
        scheduler = early_stopping(monitor)
        scheduler.on_trial_add(None, trial)
        monitor.start("new", points[4])
        assert scheduler.on_trial_result(None, trial, result) == decision
    assert early_stopping(monitor_of(tmp_path, BLOCKS, known)) is None
    late = replace(BLOCKS, asha=Asha(grace_epochs=4))
    assert early_stopping(monitor_of(tmp_path, late, known)) is None, "there is no epoch left to be saved"


def test_a_trial_that_goes_on_has_passed_what_it_passed_and_a_whole_one_is_not_stopped(tmp_path: Path) -> None:
    space = replace(BLOCKS, asha=Asha(grace_epochs=1, reduction=2))
    points = space.points(0)
    # Trial 1 was the first at every epoch, so nothing stopped it. Those that have ended since are better.
    known = [entry(i + 1, p, "finished", 0.5, 0.6, 0.7, 0.8) for i, p in enumerate(points[1:], 1)]
    monitor = monitor_of(tmp_path, space, [entry(1, points[0], "running", 0.1, 0.2), *known])
    (job,) = monitor.plan.jobs(points[0])
    monitor.sweep.put(replace(monitor.sweep.trial(1), models=(TrialModel(seed=0, path=job.address),)))
    scheduler = early_stopping(monitor)
    trial = SimpleNamespace(trial_id="x")
    scheduler.on_trial_add(None, trial)
    monitor.start("x", {"listed": {"number": 1, "values": points[0]}})
    assert len(monitor.sweep.trial(1).epochs) == 2, "killed before it reports them again, they are known still"
    more = {"clean": 0.9, "each": [], "n": 1, "training_seconds": 1, "objective_seconds": 1, "state": "running"}
    for epoch, robust in ((1, 0.1), (2, 0.2), (3, 0.2)):
        result = {**more, "epoch": epoch, "robust": robust}
        assert scheduler.on_trial_result(None, trial, result) == "CONTINUE", epoch
        monitor.result("x", result)
    assert [e.epoch for e in monitor.sweep.trial(1).epochs] == [1, 2, 3]
    for part in (scheduler, tune_callback(monitor), sweep_stopper(monitor)):
        assert cloudpickle.dumps(part), "Tune does that"
    # A trial that had not come so far is stopped.
    new = SimpleNamespace(trial_id="y")
    monitor.sweep.put(replace(monitor.sweep.trial(4), state="failed", epochs=()))
    scheduler = early_stopping(monitor)
    monitor.start("y", {"listed": {"number": 4, "values": points[3]}})
    poor = {"epoch": 1, "robust": 0.0}
    assert scheduler.on_trial_result(None, new, poor) == "STOP"
    # It is not stopped where that saves nothing: it is exported and measured, and only not reported yet.
    (job,) = monitor.plan.jobs(points[3])
    write_epochs(tmp_path, job, [0.0, 0.0, 0.0, 0.0], exported=False)
    assert early_stopping(monitor).on_trial_result(None, new, poor) == "STOP"
    write_epochs(tmp_path, job, [0.0, 0.0, 0.0, 0.0], exported=True)
    assert early_stopping(monitor).on_trial_result(None, new, poor) == "CONTINUE"
    assert early_stopping(monitor).on_trial_result(None, new, {"epoch": 4, "robust": 0.0}) == "STOP", "its end"


def test_the_total_is_that_of_this_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = replace(BLOCKS, trials=5).points(0)
    known = [entry(1, points[0], "finished", 0.5), *(entry(i, p, "pending") for i, p in enumerate(points[1:], 2))]
    for trials, total in ((2, 2), (5, 5)):
        sweep = opened(tmp_path, replace(BLOCKS, trials=trials), known)
        pending_trials(sweep)
        monitor = SweepMonitor(sweep, replace(plan(tmp_path), base=sweep.base), JobQueue(attempts=1), [])
        monitor.start("x", {"listed": {"number": 2, "values": points[1]}})
        monitor.end("x", "it broke")
        assert f"trial 2/{total}: " in capsys.readouterr().out


def test_events_of_a_trial_are_in_the_record_at_once(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", trials=3)
    sweep = opened(tmp_path, space, [entry(1, {"lam": 0.5, "shared_blocks": 1}, "failed")])
    monitor = SweepMonitor(sweep, plan(tmp_path), JobQueue(attempts=1), [])

    def saved() -> list[dict[str, Any]]:
        return list(json.loads((tmp_path / "sweeps/s/sweep.json").read_text())["trials"])

    monitor.start("x", {"lam": 0.5, "shared_blocks": 1})
    monitor.start("y", {"lam": 0.5, "shared_blocks": 1})
    assert [t["state"] for t in saved()] == ["running", "running"], "the same point twice is two trials"
    result = {"clean": 0.9, "robust": 0.2, "each": [[0.9, 0.2]], "n": 5, "training_seconds": 1, "objective_seconds": 1}
    monitor.result("x", {**result, "epoch": 1, "state": "running"})
    monitor.start("x", {})  # Its process died, and reports all again.
    monitor.result("x", {**result, "epoch": 1, "state": "running"})
    monitor.result("x", {**result, "epoch": 2, "state": "finished"})
    monitor.result("y", {**result, "epoch": 3, "clean": 0.0, "state": "diverged", "reason": "at step 1"})
    first, second = saved()
    assert [e["epoch"] for e in first["epochs"]] == [1, 2]
    assert first["state"] == "finished"
    assert (second["state"], second["reason"], second["epochs"]) == ("diverged", "at step 1", [])


def test_a_trial_that_cannot_be_is_recorded_with_its_reason_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    space = Space(parameters={"targets": Choice(["lowpass", "linear"]), "lam": LogUniform(0.1, 1.0)}, search="tpe")
    monitor = monitor_of(tmp_path, space, [])
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", reported.append)
    for point, reason in (
        ({"targets": "linear", "lam": 0.5}, "train.targets is 'linear'; it must be one of this run's shards: lowpass"),
        ({"targets": "lowpass", "lam": -1.0}, "train.lam is -1.0"),
    ):
        name = str(point["lam"])
        monitor.start(name, point)
        run_trial(dict(point), plan=monitor.plan, queue=monitor.queue)
        result = reported.pop()
        assert (result["clean"], result["robust"]) == (0.0, 0.0), "the search avoids its point"
        monitor.result(name, result)
        last = json.loads((tmp_path / "sweeps/s/sweep.json").read_text())["trials"][-1]
        assert last["state"] == "failed"
        assert reason in last["reason"]
    assert monitor.error is None


def test_a_record_that_cannot_be_written_ends_the_sweep_not_the_trial(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, BLOCKS, [entry(1, BLOCKS.points(0)[0], "running")])
    callback, stopper = tune_callback(monitor), sweep_stopper(monitor)
    trial = SimpleNamespace(trial_id="x", config={"listed": {"number": 1}})
    callback.on_trial_start(0, [], trial)
    assert not stopper.stop_all()
    (tmp_path / "sweeps").rename(tmp_path / "gone")
    (tmp_path / "sweeps").write_text("in the way")
    result = {"clean": 0.9, "robust": 0.2, "each": [], "n": 5, "training_seconds": 1, "objective_seconds": 1}
    callback.on_trial_result(0, [], trial, {**result, "epoch": 1, "state": "running"})
    assert stopper.stop_all()
    assert isinstance(monitor.error, StorageError)
    assert "could not be written" in str(monitor.error)
    (trial_entry,) = json.loads((tmp_path / "gone/s/sweep.json").read_text())["trials"]
    assert trial_entry["state"] == "running", "the next command goes on with it"
