"""MLflow as a view of the records: published once, in order, and never at the price of a run."""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fake_run
import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import MlflowServer, free_port

from components.errors import UserError
from components.models.classifiers import build_classifier
from components.search_space import LogUniform, Space
from pipeline import run_directory, stages
from pipeline.evaluation import plan
from pipeline.reporting import mlflow_run, records, report
from pipeline.runtime.console import Bar
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import mlflow_sweep
from pipeline.tracking import uri
from pipeline.tracking.registry import weights_digest
from pipeline.tracking.requests import http_limits
from pipeline.tracking.server import check_reachable
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow

DatabaseMaker = Callable[[Path], str]


@pytest.fixture
def database() -> DatabaseMaker:
    """Makes databases, each as a run does. MLflow takes seconds for the first of a process."""

    def make(directory: Path) -> str:
        uri = f"sqlite:///{directory / 'mlflow.db'}"
        check_reachable(uri)
        return uri

    return make


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a whole fake run with its report."""
    path = tmp_path_factory.mktemp("written") / "storage"
    report.build(fake_run.write(Storage(path)), Storage(path))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture
def run(root: Storage, written: Path) -> Storage:
    """The directory of a fake run of one's own, in ``root``."""
    shutil.copytree(written, root.local_root)
    return root / "runs" / root.list("runs")[0]


def _silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(client: MlflowClient) -> dict[str, Run]:
    """Runs by their path of names, ``fake-mnist/defend/white_box/fgsm``."""
    experiment = client.get_experiment_by_name("defendpp")
    assert experiment is not None
    found = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id], max_results=1000)}

    def path(run: Run) -> str:
        parent = run.data.tags.get("mlflow.parentRunId")
        return f"{path(found[parent])}/{run.info.run_name}" if parent else str(run.info.run_name)

    paths = [path(r) for r in found.values()]
    assert len(set(paths)) == len(paths), f"a run twice: {sorted(paths)}"
    return {path(r): r for r in found.values()}


def _everything(client: MlflowClient) -> dict[str, Any]:
    """All that MLflow holds of the runs, as it can be compared."""
    out = {}
    for path, run in _runs(client).items():
        history = {
            key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        tags = {k: v for k, v in run.data.tags.items() if k != "defendpp_key"}
        times = (run.info.start_time, run.info.end_time, run.info.status)
        inputs = sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs)
        out[path] = (run.info.run_id, history, tags, run.data.params, times, inputs)
    return out


def _artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    out: set[str] = set()
    for entry in client.list_artifacts(run_id, path):
        out |= _artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return out


def _expect_fake_run(client: MlflowClient, run: Storage) -> None:
    """What MLflow must hold of a whole fake run, whatever happened on the way."""
    record = run.read_json("run.json")
    runs = _runs(client)
    assert len(runs) == 1 + len(fake_run.MODELS) + len(record["evaluations"])
    parent, defend = runs["fake-mnist"], runs["fake-mnist/defend"]
    assert parent.data.params["train.lr"] == "0.1"
    assert parent.data.tags["mlflow.source.git.commit"] == record["git"]["revision"]
    assert parent.data.tags["source"] == record["source"]
    assert "| defend (defended) |" in parent.data.tags["mlflow.note.content"]
    assert {i.tags[0].value for i in parent.inputs.dataset_inputs} == {"training", "validation", "test"}
    assert {i.dataset.digest for i in parent.inputs.dataset_inputs} == {record["data"]["hash"]}
    assert defend.data.params["defense"] == "defend++"
    assert runs["fake-mnist/control"].data.params["defense"] == "none"
    for e in record["evaluations"]:
        short = "clean" if e["threat_model"] == "clean" else f"{e['threat_model']}/{e['attack'].partition(':')[0]}"
        child = runs[f"fake-mnist/{e['model']}/{short}"]
        assert child.data.metrics["accuracy"] == e["metrics"]["accuracy"]
        assert child.data.metrics["accuracy_low"] == e["metrics"]["accuracy_low"]
        assert child.data.metrics["n"] == e["n"]
        table = "clean/accuracy" if short == "clean" else short
        assert runs[f"fake-mnist/{e['model']}"].data.metrics[table] == e["metrics"]["accuracy"]
    ddn = runs["fake-mnist/defend/white_box/ddn"]
    metrics = next(
        e["metrics"]
        for e in record["evaluations"]
        if (e["model"], e["path"]) == ("defend", "judged/defend-white_box-ddn")
    )
    assert ddn.data.metrics["accuracy_at/l2_1.5"] == metrics["accuracy_at_budget"]["l2<=1.5"]
    assert defend.data.metrics["white_box/ddn/l2_median"] == metrics["l2_median"]
    curve = client.get_metric_history(ddn.info.run_id, "accuracy_by_l2_x1000")
    assert [(m.step, m.value) for m in curve] == [
        (round(1000 * eps), a) for eps, a in zip(metrics["curve"]["eps"], metrics["curve"]["accuracy"], strict=True)
    ]
    loss = client.get_metric_history(defend.info.run_id, "train/loss")
    steps = fake_run.STEPS_PER_EPOCH * fake_run.EPOCHS
    assert [m.step for m in loss] == list(range(steps))
    assert [m.timestamp for m in loss] == [round(1000 * (fake_run.BEGIN + 290 + 2.5 * s)) for s in range(steps)]
    phases = [m.value for m in client.get_metric_history(defend.info.run_id, "train/phase")]
    assert phases == [p for p in (1.0, 2.0, 1.0, 0.0) for _ in range(fake_run.STEPS_PER_EPOCH)]
    assert len(client.get_metric_history(defend.info.run_id, "validation/accuracy")) == fake_run.EPOCHS
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert {"run.json", "report/report.html", "report/table.json", "report/plots/losses.png"} <= _artifacts(
        client, parent.info.run_id
    )
    assert _artifacts(client, defend.info.run_id) == {
        f"weights/{f}" for f in ("model.json", "classifier.safetensors", "autoencoder.safetensors")
    }


def _forget(run: Storage, uri: str) -> None:
    """What a process that was killed before it wrote tracking.json leaves."""
    file = run.read_json("tracking.json")
    file["uris"][uri].update(published=[], runs={}, status={})
    run.write_json("tracking.json", file)


def test_publishing_twice_adds_nothing(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    client = MlflowClient(uri)
    said: list[str] = []

    def publish_all() -> str | None:
        tracker = Tracker(uri, run, echo=said.append)
        mlflow_run.publish_run(tracker, run, root)
        assert tracker.flush()
        return tracker.run_id()

    first = publish_all()
    _expect_fake_run(client, run)
    before = _everything(client)
    assert publish_all() == first
    assert _everything(client) == before
    _forget(run, uri)
    assert publish_all() == first
    assert _everything(client) == before
    assert said == [f"MLflow: all published to {uri}"] * 3


def test_a_known_publication_is_not_sent(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = root / "runs/x", database(tmp_path)

    def publish() -> None:
        tracker = Tracker(uri, run, echo=lambda line: None)
        tracker.start("run", "x", time=1e9)
        tracker.metrics("run", {"a": 1.0, "b": None})
        assert tracker.flush()

    publish()
    client = MlflowClient(uri)
    run_id = _runs(client)["x"].info.run_id
    assert _runs(client)["x"].data.metrics == {"a": 1.0}
    client.set_tag(run_id, "mlflow.runName", "renamed by a person")
    publish()
    assert list(_runs(client)) == ["renamed by a person"]


def test_live_training_and_the_final_publication_meet(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    record = run.read_json("run.json")
    uri = database(tmp_path)
    live = {**record, "models": {}, "evaluations": [], "stages": {}, "finished": None}
    run.write_json("run.json", live)
    tracker = Tracker(uri, run, echo=_silent)
    mlflow_run.start_run(tracker, records.read_run(run))
    mlflow_run.start_model(tracker, records.read_run(run), "defend", fake_run.BEGIN + 290)
    files = records.history_files(root, record["models"]["defend"])
    for epoch, file in enumerate(files[:2]):
        tracker.history("model/defend", epoch, partial(records.read_epoch, root, file))
    assert tracker.outbox.wait(60)
    client = MlflowClient(uri)
    runs = _runs(client)
    assert set(runs) == {"fake-mnist", "fake-mnist/defend"}
    assert {r.info.status for r in runs.values()} == {"RUNNING"}
    assert runs["fake-mnist/defend"].data.metrics["train/epoch"] == 1
    tracker.finish("model/defend", "FAILED")
    assert tracker.outbox.wait(60)
    assert _runs(client)["fake-mnist/defend"].info.status == "FAILED"

    run.write_json("run.json", record)
    again = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(again, run, root)
    assert again.flush()
    _expect_fake_run(client, run)
    assert _runs(client)["fake-mnist/defend"].info.run_id == runs["fake-mnist/defend"].info.run_id


def test_long_histories_go_in_batches(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    tracker = Tracker(uri, root / "runs/x", echo=_silent)
    tracker.start("model/m", "m")
    steps = [{"step": i, "time": 1e9 + i, "loss": 1.0 / (1 + i), "lr": None} for i in range(450)]
    tracker.history("model/m", 3, lambda: {"epoch": 3, "phase": "autoencoder", "steps": steps, "validation": {}})
    assert tracker.outbox.wait(60)
    found = MlflowClient(uri).get_metric_history(tracker.run_id("model/m") or "", "train/loss")
    assert [(m.step, m.timestamp, m.value) for m in found] == [(s["step"], 1000 * s["time"], s["loss"]) for s in steps]


def test_artifacts_of_a_remote_storage(database: DatabaseMaker, tmp_path: Path) -> None:
    away = Storage("memory://away")
    away.write_bytes("models/m/classifier.safetensors", b"weights")
    tracker = Tracker(database(tmp_path), away / "runs/x", echo=_silent)
    tracker.start("model/m", "m")
    tracker.artifact("model/m", away, "models/m/classifier.safetensors", "weights")
    for text in (b"first", b"second"):
        away.write_bytes("note.txt", text)
        tracker.artifact("model/m", away, "note.txt")
        assert tracker.outbox.wait(60)
    client, run_id = MlflowClient(tracker.uri), tracker.run_id("model/m") or ""
    assert _artifacts(client, run_id) == {"weights/classifier.safetensors", "note.txt"}
    assert Path(client.download_artifacts(run_id, "note.txt")).read_bytes() == b"second"
    assert Path(client.download_artifacts(run_id, "weights/classifier.safetensors")).read_bytes() == b"weights"
    assert (tmp_path / "mlartifacts" / run_id / "artifacts" / "note.txt").exists()
    with pytest.raises(UserError, match="does not exist"):
        tracker.artifact("model/m", away, "models/none")


def test_what_was_deleted_is_published_anew(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = root / "runs/x", database(tmp_path)
    said: list[str] = []

    def publish() -> str | None:
        tracker = Tracker(uri, run, echo=said.append)
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
    assert sum("no longer has" in line for line in said) == 1


def test_a_refused_operation_does_not_hold_up_the_others(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri = database(tmp_path)
    said: list[str] = []
    tracker = Tracker(uri, root / "runs/x", echo=said.append)
    tracker.start("run", "x", params={"lr": 0.1})
    tracker.start("run", "x", params={"lr": 0.2})  # MLflow's params cannot change
    tracker.metrics("run", {"a": 1.0})
    assert tracker.outbox.wait(60)
    assert len(said) == 1
    assert "refused" in said[0]
    assert _runs(MlflowClient(uri))["x"].data.metrics == {"a": 1.0}
    assert not tracker.flush()
    assert "1 operations not published" in said[-1]
    with pytest.raises(ValueError, match="comes first"):
        tracker.metrics("model/unknown", {"a": 1.0})


def test_corrupt_bookkeeping_costs_no_run(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run = root / "runs/x"
    run.write_bytes("tracking.json", b"{")
    said: list[str] = []
    tracker = Tracker(database(tmp_path), run, echo=said.append)
    tracker.start("run", "x")
    assert tracker.flush()
    assert "tracking.json cannot be used" in said[0]
    assert run.read_json("tracking.json")["uris"][tracker.uri]["runs"]["run"]["id"] == tracker.run_id()


def test_passwords_stay_out_of_files_and_messages(root: Storage) -> None:
    said: list[str] = []
    run = root / "runs/x"
    tracker = Tracker(f"http://me:secret@127.0.0.1:{free_port()}", run, echo=said.append)
    tracker.start("run", "x")
    _until(lambda: bool(said))
    assert not tracker.flush(timeout_s=0)
    assert "***@127.0.0.1" in said[0]
    assert "secret" not in "".join(said) + uri.ui_command(tracker.uri, "1", "r")
    assert not run.exists("tracking.json") or b"secret" not in run.read_bytes("tracking.json")


def test_registered_model_is_a_module_with_gradients(
    root: Storage, database: DatabaseMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = database(tmp_path)
    network = build_classifier("resnet18", num_classes=10, channels=1, image_size=28, width=2, seed=3).eval()
    images = np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)
    for _ in range(2):  # the second time nothing is made
        tracker = Tracker(uri, root / "runs/x", echo=lambda line: None)
        tracker.start("model/m", "m")
        tracker.register_model("model/m", network, images, "defendpp-m", metadata={"address": "models/m-1"})
        assert tracker.flush()
        _forget(root / "runs/x", uri)
    client = MlflowClient(uri)
    (version,) = client.search_model_versions("name = 'defendpp-m'")
    assert client.get_model_version_by_alias("defendpp-m", "newest").version == version.version
    assert version.run_id == tracker.run_id("model/m")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    info = mlflow.models.get_model_info("models:/defendpp-m@newest")
    assert info.metadata == {"address": "models/m-1"}
    assert info.signature.inputs.inputs[0].shape == (-1, 1, 28, 28)
    back = mlflow.pytorch.load_model("models:/defendpp-m@newest")
    assert back.train().eval() is back
    x = torch.from_numpy(images).requires_grad_()
    y = back(x)
    assert torch.equal(y, network(x))
    y[:, 3].sum().backward()
    assert x.grad is not None
    expected = torch.autograd.grad(network(x)[:, 3].sum(), x)[0]
    assert torch.equal(x.grad, expected)
    assert expected.abs().sum() > 0


def test_weights_that_numpy_cannot_hold_have_a_digest() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 2))
    before = weights_digest(network)
    network.register_buffer("scale", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    network.register_buffer("empty", torch.zeros(0, dtype=torch.float8_e4m3fn))
    network.register_buffer("steps", torch.tensor(3))
    first = weights_digest(network)
    network.register_buffer("scale", torch.tensor([1.0, 2.5], dtype=torch.bfloat16))
    assert len({before, first, weights_digest(network)}) == 3


def test_a_registration_that_fails_ends_no_run(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    said: list[str] = []
    tracker = Tracker(database(tmp_path), run, echo=said.append)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record)
    mlflow_run.start_model(tracker, record, "defend")
    state = run_directory.Run(experiment=fake_run.experiment(), root=root, storage=run, record=record, tracker=tracker)
    lost = plan.Model(name="defend", path="models/gone", sha256="0")
    stages.register(state, [lost])
    assert not tracker.flush(60)
    assert any("registration of defend not published" in line for line in said), said


# -- sweeps --------------------------------------------------------------------------------------


def _trial(number: int, root: Storage, *models: str, state: str = "finished", **more: Any) -> dict[str, Any]:
    """A trial of models of the fake run; not started: of none."""
    homes = [root / name for name in (f"models/{m}-fedcba9876543210" for m in models)]
    epochs = []
    for epoch in range(fake_run.EPOCHS):
        clean = [h.read_json(f"history/epoch-{epoch:05d}.json")["validation"]["accuracy"] for h in homes]
        each = [[c, 0.1 * (epoch + 1)] for c in clean]
        mean = float(np.mean(clean)) if clean else 0.0
        epochs.append({"epoch": epoch + 1, "clean": mean, "robust": 0.1 * (epoch + 1), "each": each, "n": 50})
    return {
        "number": number,
        "parameters": {"lam": 0.1 * number},
        "state": state,
        "reason": "",
        "epochs": epochs if homes else [],
        "models": [{"seed": i, "path": h.uri.removeprefix(root.uri + "/")} for i, h in enumerate(homes)],
        "seconds": 5.0,
        "training_seconds": 0.0,  # another run trained them
        "objective_seconds": 1.0,
        "started": "2026-05-28T21:00:00+00:00",
        **more,
    }


def _sweep(run: Storage, trials: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    record = run.read_json("run.json")
    space = Space(parameters={"lam": LogUniform(1e-4, 10.0)}, trials=len(trials))
    return {
        **record,
        "experiment": {**record["experiment"], "seeds": seeds},
        "space_name": "lam",
        "space": space.to_dict(),
        "seed": 0,
        "model": "defend",
        "base": record["models"]["defend"]["train"],
        "trials": trials,
        "references": {},
        "front": [1],
        "choice": {"trial": 1, "parameters": {"lam": 0.1}, "clean": 0.9, "robust": 0.4, "rule": "the most robust"},
        "evaluation": None,
    }


def _histories(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Of all metrics but those of a sweep alone: step and value."""
    names = set(run.data.metrics) - {"validation/robust", "epochs"}
    found = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(m.step, m.value) for m in points] for name, points in found.items()}


def test_a_trial_has_the_metrics_of_a_models_run_by_the_same_names(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    """One model is a trial of one seed; two undefended ones, in the place of two seeds, are a trial of their means."""
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    tracker = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(tracker, run, root)
    tracker.flush()
    trials = [_trial(1, root, "defend"), _trial(2, root, "no_defense", "control")]
    record, sweep = _sweep(run, trials, seeds=2), root / "sweeps/fake-mnist-lam-0123456789abcdef"
    sweep.write_json("sweep.json", record)
    sweep.write_json("best.json", {})
    for _ in range(2):  # the second time nothing is added
        tracker = Tracker(uri, sweep, echo=lambda line: None)
        mlflow_sweep.publish_sweep(tracker, record, sweep, root)
        assert tracker.flush()
    client = MlflowClient(uri)
    runs = _runs(client)
    parent = "sweep fake-mnist lam"
    assert len(runs) == 4 + 1 + 2 + 2

    one, alone = runs[f"{parent}/trial 1: lam=0.1"], runs["fake-mnist/defend"]
    assert _histories(client, one) == _histories(client, alone)
    assert one.data.metrics["train/total_seconds"] == 120
    assert set(one.data.metrics) - set(alone.data.metrics) == {"validation/robust", "epochs"}
    robust = client.get_metric_history(one.info.run_id, "validation/robust")
    last = fake_run.STEPS_PER_EPOCH - 1
    assert [(m.step, m.value) for m in robust] == [
        (e * fake_run.STEPS_PER_EPOCH + last, pytest.approx(0.1 * (e + 1))) for e in range(fake_run.EPOCHS)
    ]

    two = _histories(client, runs[f"{parent}/trial 2: lam=0.2"])
    seeds = [_histories(client, runs[f"fake-mnist/{name}"]) for name in ("no_defense", "control")]
    assert [_histories(client, runs[f"{parent}/trial 2: lam=0.2/seed {i}"]) for i in range(2)] == seeds
    assert set(two) == set(seeds[0]) == set(seeds[1])
    for name, points in two.items():
        of_seeds = list(zip(*(s[name] for s in seeds), strict=True))
        assert points == [(a[0], pytest.approx((a[1] + b[1]) / 2)) for a, b in of_seeds], name
    for path in (parent, f"{parent}/trial 1: lam=0.1", f"{parent}/trial 2: lam=0.2/seed 1"):
        assert {i.tags[0].value for i in runs[path].inputs.dataset_inputs} == {"training", "validation"}, path


def test_a_failed_trial_says_so_until_it_is_tried_again(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    sweep = root / "sweeps/s"
    tries = [
        {"state": "running", "reason": ""},
        {"state": "failed", "reason": "out of memory"},
        {"state": "running", "reason": "", "started": "2026-05-28T21:10:00+00:00"},
        {"state": "failed", "reason": "out of memory", "started": "2026-05-28T21:10:00+00:00"},
        {"state": "running", "reason": "", "started": "2026-05-28T21:20:00+00:00"},
        {"state": "finished", "reason": "", "started": "2026-05-28T21:20:00+00:00"},
    ]
    for told in tries:
        models = ("defend",) if told["state"] == "finished" else ()  # a trial that cannot be has none
        record = _sweep(run, [_trial(1, root, *models, **told)], seeds=1) | {"choice": None, "finished": None}
        tracker = Tracker(uri, sweep, echo=lambda line: None)
        mlflow_sweep.publish_sweep(tracker, record, sweep, root)
        assert tracker.flush()
        found = _runs(MlflowClient(uri))["sweep fake-mnist lam/trial 1: lam=0.1"]
        assert {k: found.data.tags[k] for k in ("state", "reason")} == {k: told[k] for k in ("state", "reason")}
        assert found.info.status == {"failed": "FAILED"}.get(told["state"], told["state"].upper())
    assert found.data.metrics["epochs"] == fake_run.EPOCHS


def test_a_run_that_was_stopped_between_two_splits_is_published(root: Storage) -> None:
    run = fake_run.write(root, evaluations=False)
    record = {**run.read_json("run.json"), "data": {"rows": {"train": 9000}}}
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=lambda line: None)
    mlflow_run.start_run(tracker, record)
    mlflow_sweep.start_sweep(tracker, _sweep(run, [_trial(1, root)], seeds=1) | {"data": record["data"]})


def test_best_is_of_the_latest_conclusion_and_every_sweep_keeps_its_own(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    client = MlflowClient(uri)
    networks = [
        build_classifier("resnet18", num_classes=10, channels=1, image_size=28, width=2, seed=seed).eval()
        for seed in range(2)
    ]

    def conclude(name: str, minute: int, chosen: int) -> tuple[str, dict[str, Any], str]:
        """A sweep whose last trial ends in that minute registers network ``chosen``; whose model is @best then, and what was said."""
        started = f"2026-05-28T21:{minute:02d}:00+00:00"
        trials = [_trial(i + 1, root, "defend", started=started) for i in range(2)]
        record, sweep = _sweep(run, trials, seeds=1), root / f"sweeps/fake-mnist-lam-{name}"
        record["choice"]["trial"] = chosen + 1
        said: list[str] = []
        tracker = Tracker(uri, sweep, echo=said.append)
        mlflow_sweep.start_sweep(tracker, record)
        alias = mlflow_sweep.trial_alias(trials[chosen])
        tracker.start(alias, alias, parent="run")
        example = np.zeros((1, 1, 28, 28), np.float32)
        tracker.register_model(alias, networks[chosen], example, **mlflow_sweep.choice_version(record, sweep))
        assert tracker.flush()
        best = client.get_model_version_by_alias("fake-mnist-lam", "best").tags
        own = client.get_model_version_by_alias("fake-mnist-lam", f"best-{name}").tags
        assert (own["sweep"], own["trial"]) == (f"fake-mnist-lam-{name}", str(chosen + 1))
        return f"{best['sweep'].rpartition('-')[2]} {best['trial']}", own, " ".join(said)

    assert conclude("aa", 1, 0)[0] == "aa 1"
    best, _, said = conclude("bb", 2, 0)
    assert best == "bb 1"
    assert "before, version 1, which fake-mnist-lam-aa chose" in said
    best, _, said = conclude("aa", 1, 0)  # the same command again concludes nothing new
    assert (best, said.count("stays")) == ("bb 1", 0)
    (root / "sweeps/fake-mnist-lam-aa").delete("tracking.json")
    best, _, said = conclude("aa", 1, 0)  # published anew
    assert best == "bb 1"
    assert "stays with version 2, which fake-mnist-lam-bb chose later" in said
    assert conclude("aa", 3, 1)[0] == "aa 2", "more trials, another choice"
    assert conclude("aa", 4, 0)[0] == "aa 1", "still more, and the choice is the first again"


# -- before a run --------------------------------------------------------------------------------


def test_a_dead_server_is_refused_quickly() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{uri} cannot be used: connection refused.*--tracking-uri"):
        check_reachable(uri)
    assert time.monotonic() - begin < 10


def test_a_server_that_never_answers_is_refused_quickly(mute: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{mute} cannot be used: timed out"):
        check_reachable(mute)
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns"])
def test_file_stores_are_refused_with_a_hint(uri: str) -> None:
    with pytest.raises(UserError, match=r"sqlite:////.*mlruns\.db"):
        check_reachable(uri)


def test_databases_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes.db"
    other.write_text("no database at all, but long enough to have a header of one hundred bytes. " * 3)
    with pytest.raises(UserError, match=r"notes\.db cannot be used: file is not a database"):
        check_reachable(f"sqlite:///{other}")
    assert other.read_text().startswith("no database")
    with pytest.raises(UserError, match=r"relative path.*sqlite:////"):
        check_reachable("sqlite:///mlflow.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/mlflow\.db cannot be used"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_default_database_lies_in_the_storage(tmp_path: Path) -> None:
    assert uri.default_uri(Storage(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"memory://elsewhere is not on this machine.*--tracking-uri"):
        uri.default_uri(Storage("memory://elsewhere"))


def test_ui_command_names_the_run() -> None:
    command = uri.ui_command("sqlite:////data/my runs/mlflow.db", "7", "abc")
    assert "'sqlite:////data/my runs/mlflow.db'" in command
    assert "#/experiments/7/runs/abc" in command
    assert uri.ui_command("http://host:5000/", "7", "abc").startswith("open 'http://host:5000/#/experiments/7/runs/abc")
    assert shutil.which(command.split()[1]) or Path(command.split()[1]).exists()


def test_limits_of_several_threads_leave_nothing_behind() -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    before = [os.environ.get(name) for name in names]
    upload, check = http_limits(timeout=120), http_limits(timeout=1, retries=0)
    upload.__enter__()
    check.__enter__()
    assert [os.environ[name] for name in names] == ["1", "0"]
    upload.__exit__(None, None, None)  # of a thread that is done first, though it began first
    assert [os.environ[name] for name in names] == ["1", "0"]
    check.__exit__(None, None, None)
    assert [os.environ.get(name) for name in names] == before


class _SlowStorage(Storage):
    """A storage whose first write waits for :attr:`released`."""

    begun: threading.Event
    released: threading.Event

    def write_bytes(self, name: str, data: bytes) -> None:
        if not self.begun.is_set():
            self.begun.set()
            assert self.released.wait(60)
        super().write_bytes(name, data)


def test_an_older_bookkeeping_never_replaces_a_newer_one(tmp_path: Path) -> None:
    run = _SlowStorage(tmp_path / "x")
    run.begun, run.released = threading.Event(), threading.Event()
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=_silent)
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


# -- outages -------------------------------------------------------------------------------------


def test_an_outage_costs_little_time_and_one_warning(root: Storage) -> None:
    said: list[str] = []
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", root / "runs/x", echo=said.append)
    begin = time.monotonic()
    tracker.start("run", "x")
    for step in range(200):
        tracker.metrics("run", {"a": step}, step=step)
    assert time.monotonic() - begin < 5
    assert tracker.outbox.pending == 201
    assert tracker.is_behind
    _until(lambda: bool(said))
    assert len(said) == 1
    assert "cannot be used (connection refused)" in said[0]
    assert not tracker.flush(timeout_s=1)
    assert said[1:] == [
        f"MLflow: 201 operations not published to {tracker.uri}; records are safe under {tracker.storage.uri}; "
        "run the same command or `report` again to publish"
    ]


@pytest.fixture
def server(database: DatabaseMaker, tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(database(tmp_path), tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_server_killed_on_the_way_gets_everything(
    run: Storage, root: Storage, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run.read_json("run.json")
    check_reachable(server.uri)
    said: list[str] = []
    tracker = Tracker(server.uri, run, echo=said.append)
    mlflow_run.start_run(tracker, records.read_run(run))
    mlflow_run.start_model(tracker, records.read_run(run), "defend", fake_run.BEGIN + 290)
    first, *_ = records.history_files(root, record["models"]["defend"])
    tracker.history("model/defend", 0, partial(records.read_epoch, root, first))
    assert tracker.outbox.wait(60)
    assert not said

    server.kill()
    begin = time.monotonic()
    mlflow_run.publish_run(tracker, run, root)
    assert time.monotonic() - begin < 20
    _until(lambda: bool(said))
    assert tracker.outbox.pending > 50
    assert len(said) == 1
    assert "cannot be used" in said[0]

    server.start()
    assert tracker.flush(timeout_s=60)
    assert said[1:] == [f"MLflow at {server.uri} answers again", f"MLflow: all published to {server.uri}"]
    client = MlflowClient(server.uri)
    _expect_fake_run(client, run)
    before = _everything(client)
    again = Tracker(server.uri, run, echo=said.append)
    mlflow_run.publish_run(again, run, root)
    assert again.flush()
    assert _everything(client) == before

    # a model through the server, artifacts included
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    again.register_model("model/defend", network, np.zeros((2, 1, 2, 2), dtype=np.float32), "defendpp-defend")
    assert again.flush()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    back = mlflow.pytorch.load_model("models:/defendpp-defend@newest")
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(back(x), network(x))

    # stopped by a person while the server hangs
    again.start("model/open", "open", parent="run")
    assert again.outbox.wait(60)
    server.pause()
    begin = time.monotonic()
    again.stop_for(KeyboardInterrupt(), complete=False)
    assert time.monotonic() - begin < 5
    assert "did not learn that the run is KILLED" in said[-1]


def test_a_server_that_hangs_does_not_stand_in_the_way(run: Storage, root: Storage, mute: str) -> None:
    said: list[str] = []
    tracker = Tracker(mute, run, echo=said.append)
    begin = time.monotonic()
    for _ in range(3):
        mlflow_run.publish_run(tracker, run, root)
    assert time.monotonic() - begin < 5, "publishing waited for the server"
    assert not tracker.flush(timeout_s=0.5)
    tracker.stop("KILLED")
    assert time.monotonic() - begin < 9
    assert "operations not published" in said[0]
    assert "run the same command or `report` again to publish" in said[0]


def test_a_stopped_run_leaves_no_run_open(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri = database(tmp_path)
    tracker = Tracker(uri, run, echo=lambda line: None)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record)
    for name in fake_run.MODELS:
        mlflow_run.start_model(tracker, record, name)
    tracker.finish("model/control")
    assert tracker.outbox.wait(60)
    begin = time.monotonic()
    tracker.stop_for(KeyboardInterrupt(), complete=False)
    assert time.monotonic() - begin < 5
    tracker.start("model/late", "late", parent="run")  # by a thread that does not know yet
    client = MlflowClient(uri)
    found = {path: r.info.status for path, r in _runs(client).items()}
    assert found.pop("fake-mnist/control") == "FINISHED"
    assert found == {"fake-mnist": "KILLED", "fake-mnist/no_defense": "KILLED", "fake-mnist/defend": "KILLED"}

    again = Tracker(uri, run, echo=lambda line: None)
    mlflow_run.publish_run(again, run, root)
    assert again.flush()
    _expect_fake_run(client, run)


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
        assert {r.info.status for r in _runs(MlflowClient(uri)).values()} == {"FINISHED"}
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
    assert {path: r.info.status for path, r in _runs(MlflowClient(uri)).items()} == {"x": status, "x/m": child}


def test_a_file_that_cannot_be_read_does_not_hold_up_the_rest(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri, said = database(tmp_path), list[str]()
    home = run.read_json("run.json")["models"]["no_defense"]["path"]
    begin = root.read_bytes(f"{home}/model.json")
    epochs = {n: root.read_bytes(n) for n in (f"{home}/history/epoch-0000{e}.json" for e in (0, 2))}
    (root.local_root / home / "model.json").unlink()
    (root.local_root / home / "model.json").mkdir()  # there, and cannot be read
    for name in epochs:
        root.write_bytes(name, b"{")
    tracker = Tracker(uri, run, echo=said.append)
    mlflow_run.publish_run(tracker, run, root)
    assert not tracker.flush(60)
    client = MlflowClient(uri)
    runs = _runs(client)
    for model in ("defend", "no_defense"):  # a damaged model has its evaluations too
        assert runs[f"fake-mnist/{model}/white_box/ddn"].info.status == "FINISHED"
    assert "fake-mnist/no_defense" in runs
    assert any("model no_defense not published" in line for line in said)
    assert any("first epoch of no_defense not published" in line for line in said)
    assert "4 operations not published" in said[-1], said

    (root.local_root / home / "model.json").rmdir()
    root.write_bytes(f"{home}/model.json", begin)
    for name, data in epochs.items():
        root.write_bytes(name, data)
    mlflow_run.publish_run(tracker, run, root)
    assert tracker.flush(60)
    losses = client.get_metric_history(_runs(client)["fake-mnist/no_defense"].info.run_id, "train/loss")
    assert len(losses) == fake_run.STEPS_PER_EPOCH * fake_run.EPOCHS


class _Epoch(dict[str, Any]):
    """A record of which one can ask whether it is still in memory."""


def test_what_waits_takes_no_memory(run: Storage, root: Storage) -> None:
    tracker = Tracker(f"http://127.0.0.1:{free_port()}", run, echo=lambda line: None)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record)
    progress = stages._TrainProgress(
        run_directory.Run(experiment=fake_run.experiment(), root=root, storage=run, record=record, tracker=tracker),
        Bar("train", None),
    )
    alive: list[weakref.ref[_Epoch]] = []
    for number in range(500):
        epoch = _Epoch(epoch=number, phase="classifier", steps=[{"step": number, "time": 1e9, "loss": 1.0}])
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


NAME = """o'neil "copy" \\ 100%: a/b.c é"""


def test_names_may_hold_any_character(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri, said = database(tmp_path), list[str]()
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    for _ in range(2):
        tracker = Tracker(uri, root / "runs/x", experiment=f"of {NAME}", echo=said.append)
        tracker.start("run", NAME)
        tracker.start(f"model/{NAME}", NAME, parent="run", tags={"model": NAME})
        tracker.register_model(
            f"model/{NAME}", network, np.zeros((1, 1, 2, 2), np.float32), NAME, metadata={"of": NAME}
        )
        assert tracker.flush(60), said
        _forget(root / "runs/x", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"of {NAME}")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    (version,) = client.search_model_versions(f"run_id = '{tracker.run_id(f'model/{NAME}')}'")
    assert version.name == NAME.replace("/", "_").replace(":", "_")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "what registers a model decides where the next run is published"


def test_one_reason_is_said_once(run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri, said = database(tmp_path), list[str]()
    MlflowClient(uri).create_experiment("bucket", "s3://bucket/artifacts")
    tracker = Tracker(uri, run, experiment="bucket", echo=said.append)
    mlflow_run.publish_run(tracker, run, root)
    assert not tracker.flush(60)
    assert len(said) == 2, said
    assert "boto3" in said[0]
