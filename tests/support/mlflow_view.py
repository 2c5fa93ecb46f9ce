"""The content of MLflow after a publication, and what it must be for the fake run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run

from components.search_space import LogUniform, Space
from pipeline.runtime.storage import Storage

DatabaseMaker = Callable[[Path], str]


def silent(line: str) -> None:
    raise AssertionError(f"unexpected message: {line}")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs_by_path(client: MlflowClient) -> dict[str, Run]:
    """Return the runs by their path of names, ``fake-mnist/defend/white_box/fgsm``."""
    experiment = client.get_experiment_by_name("defendpp")
    assert experiment is not None
    by_id = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id], max_results=1000)}

    def path(run: Run) -> str:
        parent = run.data.tags.get("mlflow.parentRunId")
        return f"{path(by_id[parent])}/{run.info.run_name}" if parent else str(run.info.run_name)

    paths = [path(r) for r in by_id.values()]
    assert len(set(paths)) == len(paths), f"a run twice: {sorted(paths)}"
    return {path(r): r for r in by_id.values()}


def everything(client: MlflowClient) -> dict[str, Any]:
    """Return the content of all runs in a form that can be compared."""
    out = {}
    for path, run in runs_by_path(client).items():
        history = {
            key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        tags = {k: v for k, v in run.data.tags.items() if k != "defendpp_key"}
        times = (run.info.start_time, run.info.end_time, run.info.status)
        inputs = sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs)
        out[path] = (run.info.run_id, history, tags, run.data.params, times, inputs)
    return out


def artifacts_of(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    out: set[str] = set()
    for entry in client.list_artifacts(run_id, path):
        out |= artifacts_of(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return out


def expect_fake_run(client: MlflowClient, run: Storage) -> None:
    """Check that MLflow has the whole fake run."""
    record = run.read_json("run.json")
    runs = runs_by_path(client)
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
    assert {"run.json", "report/report.html", "report/table.json", "report/plots/losses.png"} <= artifacts_of(
        client, parent.info.run_id
    )
    assert artifacts_of(client, defend.info.run_id) == {
        f"weights/{f}" for f in ("model.json", "classifier.safetensors", "autoencoder.safetensors")
    }


def forget_publication(run: Storage, uri: str) -> None:
    """Reset tracking.json to the state of a process that was killed before it wrote the file."""
    file = run.read_json("tracking.json")
    file["uris"][uri].update(published=[], runs={}, status={})
    run.write_json("tracking.json", file)


def a_trial(number: int, root: Storage, *models: str, state: str = "finished", **more: Any) -> dict[str, Any]:
    """Return a trial with models of the fake run. Without models it is not started."""
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
        "training_seconds": 0.0,  # Another run trained the models.
        "objective_seconds": 1.0,
        "started": "2026-05-28T21:00:00+00:00",
        **more,
    }


def a_sweep(run: Storage, trials: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
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
