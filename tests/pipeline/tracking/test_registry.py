"""Logged and registered models: modules with gradients, links both ways, versions and aliases."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fake_run
import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow_view import DatabaseMaker, a_sweep, a_trial, forget_publication, runs_by_path
from torch import nn

from components.models.classifiers import build_classifier
from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import mlflow_sweep
from pipeline.tracking.logged_models import LoggedNetwork
from pipeline.tracking.registry import Registration
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.weights import download_weights

pytestmark = pytest.mark.slow


def logged(network: nn.Module, images: np.ndarray, **more: Any) -> LoggedNetwork:
    return LoggedNetwork(name="m", weights="w1", load=lambda: (network, images), **more)


def test_registered_model_is_a_module_with_gradients(
    root: Storage, database: DatabaseMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = database(tmp_path)
    network = build_classifier("resnet18", num_classes=10, channels=1, image_size=28, width=2, seed=3).eval()
    images = np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)
    for _ in range(2):  # the second time nothing is made
        tracker = Tracker(uri, root / "runs/x", echo=lambda line: None)
        tracker.start("model/m", "m")
        tracker.log_model("model/m", logged(network, images, metadata={"address": "models/m-1"}))
        for name in ("defendpp-m", "another"):
            tracker.register("model/m", Registration(name, "w1"))
        assert tracker.flush()
        forget_publication(root / "runs/x", uri)
    client = MlflowClient(uri)
    (version,) = client.search_model_versions("name = 'defendpp-m'")
    assert client.get_model_version_by_alias("defendpp-m", "newest").version == version.version
    assert version.run_id == tracker.run_id("model/m")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [
        {"name": "defendpp-m", "version": 1},
        {"name": "another", "version": 1},
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    info = mlflow.models.get_model_info("models:/defendpp-m@newest")
    assert info.metadata == {"address": "models/m-1"}
    assert info.signature.inputs.inputs[0].shape == (-1, 1, 28, 28)
    for address in ("models:/defendpp-m@newest", f"models:/{model.model_id}"):
        back = mlflow.pytorch.load_model(address)
        assert back.train().eval() is back
        x = torch.from_numpy(images).requires_grad_()
        y = back(x)
        assert torch.equal(y, network(x))
        y[:, 3].sum().backward()
        assert x.grad is not None
        expected = torch.autograd.grad(network(x)[:, 3].sum(), x)[0]
        assert torch.equal(x.grad, expected)
        assert expected.abs().sum() > 0
    example = mlflow.pyfunc.load_model(f"models:/{model.model_id}").input_example
    assert np.array_equal(example, images)


def test_every_model_is_logged_and_only_those_asked_for_are_registered(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    uri = database(tmp_path)
    client = MlflowClient(uri)

    def publish(*, register: bool) -> list[str]:
        tracker = Tracker(uri, run, echo=lambda line: None)
        mlflow_run.publish_run(tracker, run, root, register=register)
        assert tracker.flush()
        return sorted(v.name for v in client.search_model_versions())

    assert publish(register=False) == []
    experiment = runs_by_path(client)["fake-mnist"].info.experiment_id
    before = {m.model_id for m in client.search_logged_models([experiment])}
    assert len(before) == len(fake_run.MODELS)
    for _ in range(2):
        assert publish(register=True) == sorted(f"fake-mnist-{name}" for name in fake_run.MODELS)
    assert {m.model_id for m in client.search_logged_models([experiment])} == before
    # The weights of a logged model can be attacked by its id, registered or not.
    model = next(m for m in client.search_logged_models([experiment]) if m.name == "defend of fake-mnist")
    name, weights = download_weights(uri, f"models:/{model.model_id}")
    assert name == f"mlflow:runs:/{model.source_run_id}/weights/classifier.safetensors"
    assert weights == root.read_bytes("models/defend-fedcba9876543210/classifier.safetensors")


def test_a_model_that_cannot_be_read_ends_no_run(
    run: Storage, root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    lines: list[str] = []
    tracker = Tracker(database(tmp_path), run, echo=lines.append)
    root.write_bytes("models/defend-fedcba9876543210/classifier.safetensors", b"no weights")
    mlflow_run.publish_run(tracker, run, root, register=True)
    assert not tracker.flush(60)
    assert any("logged_model" in line and "model/defend" in line for line in lines), lines
    runs = runs_by_path(MlflowClient(tracker.uri))
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert runs["fake-mnist/defend"].data.metrics["accuracy/white_box/ddn"] == 0


def test_best_is_of_the_latest_conclusion_and_every_sweep_keeps_its_own(
    root: Storage, database: DatabaseMaker, tmp_path: Path
) -> None:
    run, uri = fake_run.write(root, evaluations=False), database(tmp_path)
    client = MlflowClient(uri)

    def conclude(name: str, minute: int, chosen: int) -> tuple[str, dict[str, Any], str]:
        """Let a sweep that ends in that minute register a network.

        Returns:
            The version that is @best then, that of the sweep's own alias, and the printed lines.
        """
        started = f"2026-05-28T21:{minute:02d}:00+00:00"
        trials = [a_trial(i + 1, root, model, started=started) for i, model in enumerate(("defend", "control"))]
        record, sweep = a_sweep(run, trials, seeds=1), root / f"sweeps/fake-mnist-lam-{name}"
        record["choice"]["trial"] = chosen + 1
        sweep.write_json("best.json", {})
        lines: list[str] = []
        tracker = Tracker(uri, sweep, echo=lines.append)
        mlflow_sweep.publish_sweep(tracker, record | {"finished": None}, sweep, root, register=True)
        assert tracker.flush(), lines
        best = client.get_model_version_by_alias("fake-mnist-lam", "best").tags
        own = client.get_model_version_by_alias("fake-mnist-lam", f"best-{name}").tags
        assert (own["sweep"], own["trial"]) == (f"fake-mnist-lam-{name}", str(chosen + 1))
        return f"{best['sweep'].rpartition('-')[2]} {best['trial']}", own, " ".join(lines)

    assert conclude("aa", 1, 0)[0] == "aa 1"
    best, _, lines = conclude("bb", 2, 0)
    assert best == "bb 1"
    assert "before, version 1, which fake-mnist-lam-aa chose" in lines
    best, _, lines = conclude("aa", 1, 0)  # the same command again concludes nothing new
    assert (best, lines.count("stays")) == ("bb 1", 0)
    (root / "sweeps/fake-mnist-lam-aa").delete("tracking.json")
    best, _, lines = conclude("aa", 1, 0)  # published anew
    assert best == "bb 1"
    assert "stays with version 2, which fake-mnist-lam-bb chose later" in lines
    assert conclude("aa", 3, 1)[0] == "aa 2", "more trials, another choice"
    assert conclude("aa", 4, 0)[0] == "aa 1", "still more, and the choice is the first again"


NAME = """o'neil "copy" \\ 100%: a/b.c é"""


def test_names_may_hold_any_character(root: Storage, database: DatabaseMaker, tmp_path: Path) -> None:
    uri, lines = database(tmp_path), list[str]()
    network, example = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), np.zeros((1, 1, 2, 2), np.float32)
    for _ in range(2):
        tracker = Tracker(uri, root / "runs/x", experiment=f"of {NAME}", echo=lines.append)
        tracker.start("run", NAME)
        tracker.start(f"model/{NAME}", NAME, parent="run", tags={"model": NAME})
        tracker.log_model(f"model/{NAME}", LoggedNetwork(NAME, "w1", lambda: (network, example), metadata={"of": NAME}))
        tracker.register(f"model/{NAME}", Registration(NAME, "w1"))
        assert tracker.flush(60), lines
        forget_publication(root / "runs/x", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"of {NAME}")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    (version,) = client.search_model_versions(f"run_id = '{tracker.run_id(f'model/{NAME}')}'")
    assert version.name == NAME.replace("/", "_").replace(":", "_")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "what registers a model decides where the next run is published"
