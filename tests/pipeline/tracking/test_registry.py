"""Registered models: modules with gradients, versions and aliases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fake_run
import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow_view import DatabaseMaker, a_sweep, a_trial, forget_publication

from components.models.classifiers import build_classifier
from pipeline import run_directory, stages
from pipeline.evaluation import plan
from pipeline.reporting import mlflow_run, records
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import StoredRecord
from pipeline.sweep.report import mlflow_sweep
from pipeline.sweep.trials.entry import TrialEntry
from pipeline.tracking.registry import weights_digest
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow


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
        forget_publication(root / "runs/x", uri)
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
    lines: list[str] = []
    tracker = Tracker(database(tmp_path), run, echo=lines.append)
    record = records.read_run(run)
    mlflow_run.start_run(tracker, record)
    mlflow_run.start_model(tracker, record, "defend")
    state = run_directory.Run(
        experiment=fake_run.experiment(),
        root=root,
        stored=StoredRecord(run, "run.json", run.read_json("run.json")),
        tracker=tracker,
    )
    lost = plan.Model(name="defend", path="models/gone", sha256="0")
    stages.register(state, [lost])
    assert not tracker.flush(60)
    assert any("registration of defend not published" in line for line in lines), lines


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
        """Let a sweep that ends in that minute register a network.

        Returns:
            The version that is @best then, that of the sweep's own alias, and the printed lines.
        """
        started = f"2026-05-28T21:{minute:02d}:00+00:00"
        trials = [a_trial(i + 1, root, "defend", started=started) for i in range(2)]
        record, sweep = a_sweep(run, trials, seeds=1), root / f"sweeps/fake-mnist-lam-{name}"
        record["choice"]["trial"] = chosen + 1
        lines: list[str] = []
        tracker = Tracker(uri, sweep, echo=lines.append)
        mlflow_sweep.start_sweep(tracker, record)
        alias = mlflow_sweep.trial_alias(TrialEntry.from_json(trials[chosen]))
        tracker.start(alias, alias, parent="run")
        example = np.zeros((1, 1, 28, 28), np.float32)
        tracker.register_model(alias, networks[chosen], example, **mlflow_sweep.choice_version(record, sweep))
        assert tracker.flush()
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
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    for _ in range(2):
        tracker = Tracker(uri, root / "runs/x", experiment=f"of {NAME}", echo=lines.append)
        tracker.start("run", NAME)
        tracker.start(f"model/{NAME}", NAME, parent="run", tags={"model": NAME})
        tracker.register_model(
            f"model/{NAME}", network, np.zeros((1, 1, 2, 2), np.float32), NAME, metadata={"of": NAME}
        )
        assert tracker.flush(60), lines
        forget_publication(root / "runs/x", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(f"of {NAME}")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    (version,) = client.search_model_versions(f"run_id = '{tracker.run_id(f'model/{NAME}')}'")
    assert version.name == NAME.replace("/", "_").replace(":", "_")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "what registers a model decides where the next run is published"
