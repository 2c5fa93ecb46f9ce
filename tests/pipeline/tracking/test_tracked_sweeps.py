"""The MLflow runs of a sweep: trials, seeds and means."""

from __future__ import annotations

from pathlib import Path

import fake_run
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_view import DatabaseMaker, a_sweep, a_trial, artifacts_of, runs_by_path

from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import mlflow_sweep
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow


ONLY_OF_TRIALS = {"validation/robust", "accuracy/robust_validation", "time/epochs"}


def histories(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of all metrics except those that only sweeps have."""
    names = set(run.data.metrics) - ONLY_OF_TRIALS
    by_name = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(m.step, m.value) for m in points] for name, points in by_name.items()}


def test_a_trial_has_the_metrics_of_a_models_run_by_the_same_names(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    """One trial has one seed. The other has the means of two undefended models in place of two seeds."""
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    tracker = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(tracker, run, root)
    tracker.flush()
    trials = [a_trial(1, root, "defend"), a_trial(2, root, "no_defense", "control")]
    record, sweep = a_sweep(run, trials, seeds=2), root / "sweeps/fake-mnist-lam-0123456789abcdef"
    sweep.write_json("sweep.json", record)
    sweep.write_json("best.json", {})
    for _ in range(2):  # the second time nothing is added
        tracker = Tracker(uri, sweep, echo=lambda line: None)
        mlflow_sweep.publish_sweep(tracker, record, sweep, root)
        assert tracker.flush()
    client = MlflowClient(uri)
    runs = runs_by_path(client)
    parent = "sweep lam of fake-mnist"
    assert len(runs) == 4 + 1 + 2 + 2

    one, alone = runs[f"{parent}/trial 1: lam=0.1"], runs["fake-mnist/defend"]
    assert histories(client, one) == histories(client, alone)
    assert one.data.metrics["time/train_seconds"] == 120
    assert set(one.data.metrics) - set(alone.data.metrics) == ONLY_OF_TRIALS
    robust = client.get_metric_history(one.info.run_id, "validation/robust")
    last = fake_run.STEPS_PER_EPOCH - 1
    assert [(m.step, m.value) for m in robust] == [
        (e * fake_run.STEPS_PER_EPOCH + last, pytest.approx(0.1 * (e + 1))) for e in range(fake_run.EPOCHS)
    ]

    assert next(iter(one.data.metrics)) == "validation/robust", "the comparison of trials opens with a result"
    sweep_run = runs[parent]
    headline = {k: v for k, v in sweep_run.data.metrics.items() if k.startswith("accuracy/")}
    assert headline == {"accuracy/clean_validation": 0.9, "accuracy/robust_validation": 0.4}
    assert sweep_run.data.tags["mlflow.note.content"].startswith("choice: trial 1: lam=0.1")
    (model,) = [m for m in client.search_logged_models([sweep_run.info.experiment_id]) if "trial" in m.name]
    assert model.source_run_id == one.info.run_id
    assert {m.key: m.dataset_name for m in model.metrics} == dict.fromkeys(headline, "mnist validation")
    assert not client.search_registered_models()

    two = histories(client, runs[f"{parent}/trial 2: lam=0.2"])
    seeds = [histories(client, runs[f"fake-mnist/{name}"]) for name in ("no_defense", "control")]
    assert [histories(client, runs[f"{parent}/trial 2: lam=0.2/seed {i}"]) for i in range(2)] == seeds
    assert set(two) == set(seeds[0]) == set(seeds[1])
    for name, points in two.items():
        of_seeds = list(zip(*(s[name] for s in seeds), strict=True))
        assert points == [(a[0], pytest.approx((a[1] + b[1]) / 2)) for a, b in of_seeds], name
    for path in (parent, f"{parent}/trial 1: lam=0.1", f"{parent}/trial 2: lam=0.2/seed 1"):
        assert {i.tags[0].value for i in runs[path].inputs.dataset_inputs} == {"training", "validation"}, path


def test_a_failed_trial_says_so_until_it_is_tried_again(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    sweep = root / "sweeps/s"
    attempts = [
        {"state": "running", "reason": ""},
        {"state": "failed", "reason": "out of memory"},
        {"state": "running", "reason": "", "started": "2026-05-28T21:10:00+00:00"},
        {"state": "failed", "reason": "out of memory", "started": "2026-05-28T21:10:00+00:00"},
        {"state": "running", "reason": "", "started": "2026-05-28T21:20:00+00:00"},
        {"state": "finished", "reason": "", "started": "2026-05-28T21:20:00+00:00"},
    ]
    for attempt in attempts:
        models = ("defend",) if attempt["state"] == "finished" else ()  # a trial that cannot be has none
        record = a_sweep(run, [a_trial(1, root, *models, **attempt)], seeds=1) | {"choice": None, "finished": None}
        tracker = Tracker(uri, sweep, echo=lambda line: None)
        mlflow_sweep.publish_sweep(tracker, record, sweep, root)
        assert tracker.flush()
        trial = runs_by_path(MlflowClient(uri))["sweep lam of fake-mnist/trial 1: lam=0.1"]
        assert {k: trial.data.tags[k] for k in ("state", "reason")} == {k: attempt[k] for k in ("state", "reason")}
        assert trial.info.status == {"failed": "FAILED"}.get(attempt["state"], attempt["state"].upper())
    assert trial.data.metrics["time/epochs"] == fake_run.EPOCHS


def test_a_report_of_a_sweep_that_is_about_to_be_replaced_is_not_published(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    run, uri, lines = fake_run.write(root, evaluations=False), database(tmp_path), list[str]()
    sweep, record = root / "sweeps/s", a_sweep(run, [a_trial(1, root, "defend")], seeds=1)
    sweep.write_json("best.json", {})
    sweep.write_bytes("report/front.png", b"a plot of an earlier revision")
    tracker = Tracker(uri, sweep, echo=lines.append)
    mlflow_sweep.publish_sweep(tracker, record, sweep, root, report_follows=True)
    sweep.delete("report/front.png")  # A new report deletes it.
    mlflow_sweep.publish_sweep(tracker, record, sweep, root)
    assert tracker.flush(60), lines
    assert artifacts_of(MlflowClient(uri), tracker.run_id() or "") == {"best.json"}
