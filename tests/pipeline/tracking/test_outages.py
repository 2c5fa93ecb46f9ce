"""A server that is away, hangs or is killed costs no run, and no publication."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import fake_run
import mlflow.pytorch
import pytest
import torch
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from mlflow_view import DatabaseMaker, expect_fake_run, runs_by_path, wait_until
from ports import free_port

from pipeline import run_directory, stages
from pipeline.reporting import records
from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.console import Bar
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import StoredRecord
from pipeline.tracking.server import check_reachable
from pipeline.tracking.tracker import Tracker
from pipeline.training import exports

pytestmark = pytest.mark.slow


def test_an_outage_costs_little_time_and_one_warning(root: Storage) -> None:
    lines: list[str] = []
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", root / "runs/x", echo=lines.append)
    begin = time.monotonic()
    tracker.start("run", "x")
    for step in range(200):
        tracker.metrics("run", {"a": step}, step=step)
    assert time.monotonic() - begin < 5
    assert tracker.outbox.pending == 201
    assert tracker.is_behind
    wait_until(lambda: bool(lines))
    assert len(lines) == 1
    assert "cannot be used (connection refused)" in lines[0]
    assert not tracker.flush(timeout_s=1)
    assert lines[1:] == [
        f"MLflow: 201 operations not published to {tracker.uri}; records are safe under {tracker.storage.uri}; "
        "run the same command or `report` again to publish"
    ]


def test_a_server_killed_on_the_way_gets_everything(
    run: Storage, root: Storage, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run.read_json("run.json")
    check_reachable(server.uri)
    lines: list[str] = []
    tracker = Tracker(server.uri, run, echo=lines.append)
    mlflow_run.start_run(tracker, records.read_run(run), root)
    mlflow_run.start_model(tracker, records.read_run(run), "defend", fake_run.BEGIN + 290)
    first, *_ = records.history_files(root, record["models"]["defend"]["path"])
    tracker.history("model/defend", 0, partial(records.read_epoch, root, first))
    assert tracker.outbox.wait(60)
    assert not lines

    server.kill()
    begin = time.monotonic()
    mlflow_run.publish_run(tracker, run, root)
    assert time.monotonic() - begin < 20
    wait_until(lambda: bool(lines))
    assert tracker.outbox.pending > 30
    assert len(lines) == 1
    assert "cannot be used" in lines[0]

    server.start()
    assert tracker.flush(timeout_s=60)
    assert lines[1:] == [f"MLflow at {server.uri} answers again", f"MLflow: all published to {server.uri}"]
    expect_fake_run(MlflowClient(server.uri), run)

    # a registered model through the server
    mlflow_run.publish_run(tracker, run, root, register=True)
    assert tracker.flush()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    back = mlflow.pytorch.load_model("models:/fake-mnist-defend@newest")
    network = exports.load_classifier(root.join(record["models"]["defend"]["path"]))
    x = torch.ones(2, 1, 28, 28)
    assert torch.equal(back(x), network(x))

    # stopped by a person while the server hangs
    tracker.start("model/open", "open", parent="run")
    assert tracker.outbox.wait(60)
    server.pause()
    begin = time.monotonic()
    tracker.stop_for(KeyboardInterrupt(), complete=False)
    assert time.monotonic() - begin < 5
    assert "did not learn that the run is KILLED" in lines[-1]


def test_a_server_that_hangs_does_not_stand_in_the_way(run: Storage, root: Storage, mute: str) -> None:
    lines: list[str] = []
    tracker = Tracker(mute, run, echo=lines.append)
    begin = time.monotonic()
    for _ in range(3):
        mlflow_run.publish_run(tracker, run, root)
    assert time.monotonic() - begin < 5, "publishing waited for the server"
    assert not tracker.flush(timeout_s=0.5)
    tracker.stop("KILLED")
    assert time.monotonic() - begin < 9
    assert "operations not published" in lines[0]
    assert "run the same command or `report` again to publish" in lines[0]


def test_a_stopped_run_leaves_no_run_open(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    tracker = Tracker(uri, run, echo=lambda line: None)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record, root)
    for order, name in enumerate(fake_run.MODELS):
        mlflow_run.start_model(tracker, record, name, fake_run.BEGIN + 10 + 140 * order)
    tracker.finish("model/control")
    assert tracker.outbox.wait(60)
    begin = time.monotonic()
    tracker.stop_for(KeyboardInterrupt(), complete=False)
    assert time.monotonic() - begin < 5
    tracker.start("model/late", "late", parent="run")  # by a thread that does not know yet
    client = MlflowClient(uri)
    statuses = {path: r.info.status for path, r in runs_by_path(client).items()}
    assert statuses.pop("fake-mnist/control") == "FINISHED"
    assert statuses == {"fake-mnist": "KILLED", "fake-mnist/no_defense": "KILLED", "fake-mnist/defend": "KILLED"}

    again = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(again, run, root)
    assert again.flush()
    expect_fake_run(client, run)


def test_the_end_of_a_run_waits_while_something_is_sent(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    tracker = Tracker(database(tmp_path), root / "runs/x", echo=lambda line: None)
    tracker.start("run", "x")
    assert tracker.outbox.wait(60)

    def read() -> dict[str, Any]:
        time.sleep(0.2)
        return {"epoch": 0, "phase": "classifier", "steps": [{"step": 0, "time": 1e9, "loss": 1.0}]}

    for epoch in range(12):
        tracker.history("run", epoch, read)
    assert tracker.flush(timeout_s=1.5), "12 operations of 0.2 s take longer than that, and none of them does"


def test_a_run_is_finished_though_its_rest_cannot_be_sent(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri, released = database(tmp_path), threading.Event()
    tracker = Tracker(uri, root / "runs/x", echo=lambda line: None)
    tracker.start("run", "x")
    tracker.start("model/m", "m", parent="run")
    assert tracker.outbox.wait(60)

    def read() -> dict[str, Any]:
        released.wait(60)
        return {"epoch": 0, "phase": "classifier", "steps": []}

    tracker.history("model/m", 0, read)
    tracker.finish("model/m")
    tracker.finish("run")
    try:
        assert not tracker.conclude(timeout_s=0.1)
        assert {r.info.status for r in runs_by_path(MlflowClient(uri)).values()} == {"FINISHED"}
    finally:
        released.set()


@pytest.mark.parametrize(
    ("error", "complete", "status", "child"),
    [
        (SystemExit(143), False, "KILLED", "KILLED"),
        (ValueError(), False, "FAILED", "KILLED"),
        (ValueError(), True, "FINISHED", "FINISHED"),
        (KeyboardInterrupt(), True, "FINISHED", "FINISHED"),
    ],
)
def test_a_run_ends_as_what_stopped_it(
    error: BaseException,
    complete: bool,
    status: str,
    child: str,
    root: Storage,
    database: DatabaseMaker,
    tmp_path: Path,
) -> None:
    uri = database(tmp_path)
    tracker = Tracker(uri, root / "runs/x", echo=lambda line: None)
    tracker.start("run", "x")
    tracker.start("model/m", "m", parent="run")
    assert tracker.outbox.wait(60)
    tracker.stop_for(error, complete=complete)
    assert {path: r.info.status for path, r in runs_by_path(MlflowClient(uri)).items()} == {"x": status, "x/m": child}


class Epoch(dict[str, Any]):
    """A record that can be weakly referenced."""


def test_what_waits_takes_no_memory(run: Storage, root: Storage) -> None:
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=lambda line: None)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record, root)
    progress = stages.TrainProgress(
        run_directory.Run(
            experiment=fake_run.experiment(),
            root=root,
            stored=StoredRecord(run, "run.json", run.read_json("run.json")),
            tracker=tracker,
        ),
        Bar("train", None),
    )
    alive: list[weakref.ref[Epoch]] = []
    for number in range(500):
        epoch = Epoch(epoch=number, phase="classifier", steps=[{"step": number, "time": 1e9, "loss": 1.0}])
        alive.append(weakref.ref(epoch))
        progress.on_epoch("defend", epoch)
        del epoch
    assert sum(one() is not None for one in alive) < 150
    reads = tracker.outbox.pending
    too_early: list[str] = []

    def read() -> dict[str, Any]:
        too_early.append("read before it can be sent")
        return {}

    tracker.history("model/defend", 900, read)
    assert tracker.outbox.pending == reads + 1
    assert not tracker.outbox.wait(0.5)
    assert not too_early
