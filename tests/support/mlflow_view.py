"""The content of MLflow after a publication, and what it must be for the fake run."""

from __future__ import annotations

import csv
import io
import json
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
    """Return the runs by their path of names, ``fake-mnist/defend``."""
    experiment = client.get_experiment_by_name("defendpp")
    assert experiment is not None
    # A search does not return which models a run has evaluated or made.
    ids = [run.info.run_id for run in client.search_runs([experiment.experiment_id], max_results=1000)]
    by_id = {run_id: client.get_run(run_id) for run_id in ids}

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
    for model in client.search_logged_models([run.info.experiment_id]):
        measured = sorted((m.key, m.timestamp, m.value, m.dataset_digest or "") for m in model.metrics)
        out[model.model_id] = (model.source_run_id, measured, model.tags, model.params)
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
    assert set(runs) == {"fake-mnist", *(f"fake-mnist/{model}" for model in fake_run.MODELS)}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    for each in runs.values():
        assert each.data.tags["mlflow.source.git.commit"] == record["git"]["revision"]
        assert (each.data.tags["mlflow.source.type"], each.data.tags["source"]) == ("LOCAL", record["source"])
    _expect_parent(client, runs["fake-mnist"], record)
    defend = runs["fake-mnist/defend"]
    assert (defend.data.params["defense"], runs["fake-mnist/control"].data.params["defense"]) == ("defend++", "none")
    for e in record["evaluations"]:
        attack = e["attack"].partition(":")[0]
        short = {"clean": "clean", "random": attack}.get(e["threat_model"], f"{e['threat_model']}/{attack}")
        assert runs[f"fake-mnist/{e['model']}"].data.metrics[f"accuracy/{short}"] == e["metrics"]["accuracy"]
    _expect_history(client, defend)
    ddn = next(e for e in record["evaluations"] if e["path"] == "judged/defend-white_box-ddn")["metrics"]
    assert defend.data.metrics["accuracy_at/white_box/ddn_l2_1.5"] == ddn["accuracy_at_budget"]["l2<=1.5"]
    assert defend.data.metrics["norm/white_box/ddn_l2_median"] == ddn["l2_median"]
    curve = client.get_metric_history(defend.info.run_id, "curve/white_box/ddn_by_l2_x1000")
    assert [(m.step, m.value) for m in curve] == [
        (round(1000 * eps), a) for eps, a in zip(ddn["curve"]["eps"], ddn["curve"]["accuracy"], strict=True)
    ]
    evaluations = Path(client.download_artifacts(defend.info.run_id, "evaluations.csv")).read_text()
    rows = {(r["threat_model"], r["attack"]): r for r in csv.DictReader(io.StringIO(evaluations))}
    assert len(rows) == sum(e["model"] == "defend" for e in record["evaluations"])
    row = rows["transfer", "ddn:steps=60"]
    assert (row["source"], row["records"], row["seconds"]) == ("no_defense", "judged/defend-transfer-ddn", "95.0")
    assert artifacts_of(client, defend.info.run_id) == {
        "evaluations.csv",
        *(f"weights/{f}" for f in ("model.json", "classifier.safetensors", "autoencoder.safetensors")),
    }
    _expect_logged_model(client, defend)


def _expect_parent(client: MlflowClient, parent: Run, record: dict[str, Any]) -> None:
    clean = next(e for e in record["evaluations"] if (e["model"], e["threat_model"]) == ("defend", "clean"))
    assert parent.data.params["train.lr"] == "0.1"
    assert parent.data.metrics == {"accuracy/clean": clean["metrics"]["accuracy"]}
    assert parent.data.tags["main_model"] == "defend"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("**defend (Defend++) ")
    assert f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts/report/report.html?" in note
    inputs = {i.tags[0].value: i.dataset for i in parent.inputs.dataset_inputs}
    assert {context: data.digest for context, data in inputs.items()} == {
        "training": "train0123456789abcd",
        "validation": "validation0123456789abcd",
        "test": "test0123456789abcd",
    }
    assert all(json.loads(data.source)["uri"].startswith("/") for data in inputs.values())
    evaluated = [model.model_id for model in parent.inputs.model_inputs]
    assert len(evaluated) == len(fake_run.MODELS), evaluated
    assert {"run.json", "report/report.html", "report/table.json", "report/plots/losses.svg"} <= artifacts_of(
        client, parent.info.run_id
    )


def _expect_history(client: MlflowClient, defend: Run) -> None:
    loss = client.get_metric_history(defend.info.run_id, "train/loss")
    steps = fake_run.STEPS_PER_EPOCH * fake_run.EPOCHS
    assert [m.step for m in loss] == list(range(steps))
    assert [m.timestamp for m in loss] == [round(1000 * (fake_run.BEGIN + 290 + 2.5 * s)) for s in range(steps)]
    assert len(client.get_metric_history(defend.info.run_id, "validation/accuracy")) == fake_run.EPOCHS
    assert defend.info.start_time == round(1000 * (fake_run.BEGIN + 290)), "a run begins with its training"


def _expect_logged_model(client: MlflowClient, run: Run) -> None:
    """Check that the page "Models" has what a model's run has."""
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id for model in models]
    (model,) = models
    assert model.status == "READY"
    assert model.params == run.data.params
    assert (model.tags["role"], model.tags["mlflow.source.git.commit"][:4]) == ("defended", "e44c")
    assert model.tags["mlflow.user"] == run.data.tags["mlflow.user"]
    assert model.tags["mlflow.source.name"] == run.data.tags["mlflow.source.name"] == "pipeline/main.py"
    metrics = {m.key: m for m in model.metrics}
    final = {k: v for k, v in run.data.metrics.items() if not k.startswith(("train/", "validation/", "curve/"))}
    assert {key: m.value for key, m in metrics.items()} == final
    assert (metrics["accuracy/clean"].dataset_name, metrics["accuracy/clean"].dataset_digest) == (
        "mnist test",
        "test0123456789abcd",
    )
    assert metrics["accuracy/clean_validation"].dataset_name == "mnist validation"
    assert metrics["time/train_seconds"].dataset_name is None
    assert [m.key for m in model.metrics][:2] == ["accuracy/clean", "accuracy/white_box/fgsm"], "results come first"


def forget_publication(run: Storage, uri: str) -> None:
    """Reset tracking.json to the state of a process that was killed before it wrote the file."""
    file = run.read_json("tracking.json")
    file["uris"][uri].update(published=[], runs={}, status={}, models={})
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
