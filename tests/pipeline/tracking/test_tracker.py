"""MLflow as a view of the records: published once, in order, and never at the price of a run."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import fake_run
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow_view import (
    DatabaseMaker,
    a_sweep,
    a_trial,
    artifacts_of,
    everything,
    expect_fake_run,
    forget_publication,
    runs_by_path,
    silent,
    wait_until,
)
from ports import free_port

from components.errors import UserError
from pipeline.records import RunRecord
from pipeline.reporting import records
from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import mlflow_sweep
from pipeline.tracking import system_metrics, uri
from pipeline.tracking.outbox import BEHIND
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow


def test_publishing_twice_adds_nothing(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    client = MlflowClient(uri)
    lines: list[str] = []

    def publish_all() -> str | None:
        tracker = Tracker(uri, run, echo=lines.append)
        mlflow_run.publish_run(tracker, run, root)
        assert tracker.flush()
        return tracker.run_id()

    first = publish_all()
    expect_fake_run(client, run)
    before = everything(client)
    assert publish_all() == first
    assert everything(client) == before
    forget_publication(run, uri)
    assert publish_all() == first
    assert everything(client) == before
    assert lines == [f"MLflow: all published to {uri}"] * 3


def test_a_known_publication_is_not_sent(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = root / "runs/x", database(tmp_path)

    def publish() -> None:
        tracker = Tracker(uri, run, echo=lambda line: None)
        tracker.start("run", "x", time=1e9)
        tracker.metrics("run", {"a": 1.0, "b": None})
        assert tracker.flush()

    publish()
    client = MlflowClient(uri)
    run_id = runs_by_path(client)["x"].info.run_id
    assert runs_by_path(client)["x"].data.metrics == {"a": 1.0}
    client.set_tag(run_id, "mlflow.runName", "renamed by a person")
    publish()
    assert list(runs_by_path(client)) == ["renamed by a person"]


def test_live_training_and_the_final_publication_meet(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    record = run.read_json("run.json")
    uri = database(tmp_path)
    live = {**record, "models": {}, "evaluations": [], "stages": {}, "finished": None}
    run.write_json("run.json", live)
    tracker = Tracker(uri, run, echo=silent)
    mlflow_run.start_run(tracker, records.read_run(run), root)
    mlflow_run.start_model(tracker, records.read_run(run), "defend", fake_run.BEGIN + 290)
    files = records.history_files(root, record["models"]["defend"]["path"])
    for epoch, file in enumerate(files[:2]):
        tracker.history("model/defend", epoch, partial(records.read_epoch, root, file))
    assert tracker.outbox.wait(60)
    client = MlflowClient(uri)
    runs = runs_by_path(client)
    assert set(runs) == {"fake-mnist", "fake-mnist/defend"}
    assert {r.info.status for r in runs.values()} == {"RUNNING"}
    assert len(client.get_metric_history(runs["fake-mnist/defend"].info.run_id, "validation/accuracy")) == 2
    tracker.finish("model/defend", "FAILED")
    assert tracker.outbox.wait(60)
    assert runs_by_path(client)["fake-mnist/defend"].info.status == "FAILED"

    run.write_json("run.json", record)
    again = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(again, run, root)
    assert again.flush()
    expect_fake_run(client, run)
    assert runs_by_path(client)["fake-mnist/defend"].info.run_id == runs["fake-mnist/defend"].info.run_id


def test_long_histories_go_in_batches(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    tracker = Tracker(uri, root / "runs/x", echo=silent)
    tracker.start("model/m", "m")
    steps = [{"step": i, "time": 1e9 + i, "loss": 1.0 / (1 + i), "lr": None} for i in range(450)]
    tracker.history("model/m", 3, lambda: {"epoch": 3, "phase": "autoencoder", "steps": steps, "validation": {}})
    assert tracker.outbox.wait(60)
    points = MlflowClient(uri).get_metric_history(tracker.run_id("model/m") or "", "train/loss")
    assert [(m.step, m.timestamp, m.value) for m in points] == [(s["step"], 1000 * s["time"], s["loss"]) for s in steps]


def test_artifacts_of_a_remote_storage(database: DatabaseMaker, tmp_path: Path) -> None:
    away = Storage("memory://away")
    away.write_bytes("models/m/classifier.safetensors", b"weights")
    tracker = Tracker(database(tmp_path), away / "runs/x", echo=silent)
    tracker.start("model/m", "m")
    tracker.artifact("model/m", away, "models/m/classifier.safetensors", "weights")
    for text in (b"first", b"second"):
        away.write_bytes("note.txt", text)
        tracker.artifact("model/m", away, "note.txt")
        assert tracker.outbox.wait(60)
    client, run_id = MlflowClient(tracker.uri), tracker.run_id("model/m") or ""
    assert artifacts_of(client, run_id) == {"weights/classifier.safetensors", "note.txt"}
    assert Path(client.download_artifacts(run_id, "note.txt")).read_bytes() == b"second"
    assert Path(client.download_artifacts(run_id, "weights/classifier.safetensors")).read_bytes() == b"weights"
    assert (tmp_path / "mlartifacts" / run_id / "artifacts" / "note.txt").exists()
    with pytest.raises(UserError, match="does not exist"):
        tracker.artifact("model/m", away, "models/none")


def test_what_was_deleted_is_published_anew(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = root / "runs/x", database(tmp_path)
    lines: list[str] = []

    def publish() -> str | None:
        tracker = Tracker(uri, run, echo=lines.append)
        tracker.start("run", "x", time=1e9, params={"lr": 0.1})
        tracker.finish("run", time=2e9)
        assert tracker.flush()
        return tracker.run_id()

    first = publish()
    client = MlflowClient(uri)
    assert client.get_run(first or "").info.status == "FINISHED"
    client.delete_run(first or "")
    second = publish()
    assert second != first
    assert client.get_run(second or "").info.status == "FINISHED"
    assert client.get_run(second or "").info.end_time == 2e12
    assert client.get_run(second or "").data.params == {"lr": "0.1"}
    assert sum("no longer has" in line for line in lines) == 1


def test_a_refused_operation_does_not_hold_up_the_others(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri = database(tmp_path)
    lines: list[str] = []
    tracker = Tracker(uri, root / "runs/x", echo=lines.append)
    tracker.start("run", "x", params={"lr": 0.1})
    tracker.start("run", "x", params={"lr": 0.2})  # MLflow's params cannot change
    tracker.metrics("run", {"a": 1.0})
    assert tracker.outbox.wait(60)
    assert len(lines) == 1
    assert "refused" in lines[0]
    assert runs_by_path(MlflowClient(uri))["x"].data.metrics == {"a": 1.0}
    assert not tracker.flush()
    assert "1 operations not published" in lines[-1]
    with pytest.raises(ValueError, match="comes first"):
        tracker.metrics("model/unknown", {"a": 1.0})


def test_corrupt_bookkeeping_costs_no_run(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run = root / "runs/x"
    run.write_bytes("tracking.json", b"{")
    lines: list[str] = []
    tracker = Tracker(database(tmp_path), run, echo=lines.append)
    tracker.start("run", "x")
    assert tracker.flush()
    assert "tracking.json cannot be used" in lines[0]
    assert run.read_json("tracking.json")["uris"][tracker.uri]["runs"]["run"]["id"] == tracker.run_id()


def test_system_metrics_are_those_of_mlflow_and_need_no_server(
    root: Storage, database: DatabaseMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_metrics, "INTERVAL_SECONDS", 0.05)
    tracker = Tracker(database(tmp_path), root / "runs/x", echo=silent)
    tracker.start("run", "x")
    usage = system_metrics.SystemMetrics(tracker, datetime.now(UTC).isoformat())
    usage.start()

    def history() -> list[Metric]:
        client = MlflowClient(tracker.uri)
        return client.get_metric_history(tracker.run_id() or "", "system/system_memory_usage_percentage")

    wait_until(lambda: bool(tracker.run_id()) and len(history()) > 2)
    usage.stop()
    assert tracker.outbox.wait(60)
    assert all(0 <= m.value <= 100 for m in history())
    steps = [m.step for m in history()]
    assert steps == sorted(set(steps))
    assert not [key for key in tracker.outbox.state["published"] if "|metrics/" in key], "nobody sends them again"

    away = Tracker(f"http://127.0.0.1:{free_port()}", root / "runs/y", echo=lambda line: None)
    away.start("run", "y")
    monkeypatch.setattr(system_metrics, "INTERVAL_SECONDS", 0.001)
    usage = system_metrics.SystemMetrics(away, None)
    usage.start()
    wait_until(lambda: away.is_behind)
    time.sleep(0.2)
    usage.stop()
    assert away.outbox.pending < 2 * BEHIND, "what waits for a dead server takes no memory without end"


def test_a_machine_that_cannot_be_measured_leaves_nothing_to_publish(
    root: Storage, database: DatabaseMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(system_metrics, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(psutil, "virtual_memory", fail)
    lines: list[str] = []
    tracker = Tracker(database(tmp_path), root / "runs/x", echo=lines.append)
    tracker.start("run", "x")
    system_metrics.SystemMetrics(tracker, None).start()
    wait_until(lambda: bool(lines))
    assert lines == ["system metrics are missing from now on: no /proc here"]
    assert tracker.flush(60)


def test_passwords_stay_out_of_files_and_messages(root: Storage) -> None:
    lines: list[str] = []
    run = root / "runs/x"
    tracker = Tracker(f"http://me:secret@127.0.0.1:{free_port()}", run, echo=lines.append)
    tracker.start("run", "x")
    wait_until(lambda: bool(lines))
    assert not tracker.flush(timeout_s=0)
    assert "***@127.0.0.1" in lines[0]
    assert "secret" not in "".join(lines) + uri.ui_command(tracker.uri, "1", "r")
    assert not run.exists("tracking.json") or b"secret" not in run.read_bytes("tracking.json")


def test_a_run_that_was_stopped_between_two_splits_is_published(root: Storage) -> None:
    run = fake_run.write(root, evaluations=False)
    record = {**run.read_json("run.json"), "data": {"rows": {"train": 9000}}}
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=lambda line: None)
    mlflow_run.start_run(tracker, RunRecord.from_json(record), root)
    mlflow_sweep.start_sweep(tracker, a_sweep(run, [a_trial(1, root)], seeds=1) | {"data": record["data"]}, root)


class SlowStorage(Storage):
    """A storage whose first write waits for :attr:`released`."""

    begun: threading.Event
    released: threading.Event

    def write_bytes(self, name: str, data: bytes) -> None:
        if not self.begun.is_set():
            self.begun.set()
            assert self.released.wait(60)
        super().write_bytes(name, data)


def test_an_older_bookkeeping_never_replaces_a_newer_one(tmp_path: Path) -> None:
    run = SlowStorage(tmp_path / "x")
    run.begun, run.released = threading.Event(), threading.Event()
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=silent)
    older = threading.Thread(target=tracker.outbox.save)
    older.start()
    assert run.begun.wait(60)
    tracker.outbox.state["status"]["run"] = "FINISHED"
    newer = threading.Thread(target=tracker.outbox.save)
    newer.start()
    newer.join(0.3)
    run.released.set()
    older.join()
    newer.join()
    assert run.read_json("tracking.json")["uris"][tracker.uri]["status"] == {"run": "FINISHED"}


def test_a_file_that_cannot_be_read_does_not_hold_up_the_rest(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri, lines = database(tmp_path), list[str]()
    home = run.read_json("run.json")["models"]["no_defense"]["path"]
    begin = root.read_bytes(f"{home}/model.json")
    epochs = {n: root.read_bytes(n) for n in (f"{home}/history/epoch-0000{e}.json" for e in (0, 2))}
    (root.local_root / home / "model.json").unlink()
    (root.local_root / home / "model.json").mkdir()  # there, and cannot be read
    for name in epochs:
        root.write_bytes(name, b"{")
    tracker = Tracker(uri, run, echo=lines.append)
    mlflow_run.publish_run(tracker, run, root)
    assert not tracker.flush(60)
    client = MlflowClient(uri)
    runs = runs_by_path(client)
    for model in ("defend", "no_defense"):  # a damaged model has its evaluations too
        assert runs[f"fake-mnist/{model}"].info.status == "FINISHED"
        assert runs[f"fake-mnist/{model}"].data.metrics["accuracy/white_box/ddn"] == 0
    assert any("model no_defense not published" in line for line in lines)
    assert any("first epoch of no_defense not published" in line for line in lines)
    assert "5 operations not published" in lines[-1], lines

    (root.local_root / home / "model.json").rmdir()
    root.write_bytes(f"{home}/model.json", begin)
    for name, data in epochs.items():
        root.write_bytes(name, data)
    mlflow_run.publish_run(tracker, run, root)
    assert tracker.flush(60)
    losses = client.get_metric_history(runs_by_path(client)["fake-mnist/no_defense"].info.run_id, "train/loss")
    assert len(losses) == fake_run.STEPS_PER_EPOCH * fake_run.EPOCHS


def test_a_report_that_is_about_to_be_replaced_is_not_published(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    tracker = Tracker(database(tmp_path), run, echo=lambda line: None)
    run.write_bytes("report/plots/earlier.png", b"a plot of an earlier revision")
    mlflow_run.publish_run(tracker, run, root, report_follows=True)
    run.delete("report/plots/earlier.png")  # A new report deletes it.
    mlflow_run.publish_run(tracker, run, root)
    assert tracker.flush(60)
    expect_fake_run(MlflowClient(tracker.uri), run)
    assert not [file for file in artifacts_of(MlflowClient(tracker.uri), tracker.run_id() or "") if "earlier" in file]


def test_one_reason_is_said_once(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri, lines = database(tmp_path), list[str]()
    MlflowClient(uri).create_experiment("bucket", "s3://bucket/artifacts")
    tracker = Tracker(uri, run, experiment="bucket", echo=lines.append)
    mlflow_run.publish_run(tracker, run, root)
    assert not tracker.flush(60)
    assert len(lines) == 2, lines
    assert "boto3" in lines[0]
