"""A run in MLflow, made from its records: a parent run, and a run per model and evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from components.fields import to_dict
from components.threat_models import CLEAN
from pipeline.records import EvaluationEntry, ModelEntry, Record, RunRecord
from pipeline.reporting import markdown, over_seeds, records, verdicts
from pipeline.reporting.labels import attack_labels, is_untrusted
from pipeline.runtime.storage import Storage
from pipeline.tracking.tracker import Tracker


def start_run(tracker: Tracker, record: RunRecord) -> None:
    """Start the parent run, alias "run", with what ``run.json`` holds from its first stage on."""
    tags = made_with_tags(tracker, record, "run")
    params = flatten(to_dict(record.experiment))
    tracker.start("run", record.name, tags=tags, params=params, time=unix_time(record.created))
    log_datasets(tracker, "run", record, ("train", "validation", "test"))


def made_with_tags(tracker: Tracker, record: Record, kind: str) -> dict[str, Any]:
    """Return the tags of a parent run: its kind, its records, and what it was made with."""
    return {
        "kind": kind,
        "recipe": record.name,
        "records": tracker.storage.uri,
        "command": record.command or None,
        "git_dirty": record.git.get("dirty"),
        "mlflow.source.git.commit": record.git.get("revision"),
        "source": record.source,
        "mlflow.source.type": "LOCAL",
        "hardware": record.hardware,
        "versions": record.versions or None,
    }


def start_model(tracker: Tracker, record: RunRecord, name: str, time: float | None = None) -> None:
    """Start the child run of a model, alias "model/NAME". Call :func:`start_run` before.

    Args:
        record: need not hold the model yet.
        time: when the model took its first step (unix seconds).
    """
    tags = {
        "kind": "model",
        "recipe": record.name,
        "model": name,
        "role": record.roles.get(name),
        "records": record.models[name].path if name in record.models else None,
        "warning": next((row["sentence"] for row in verdicts.near_chance(record) if row["model"] == name), None),
    }
    # Log also what all models share, so that MLflow's comparison of models is complete.
    params = flatten(record.model_config(name))
    tracker.start(f"model/{name}", name, parent="run", tags=tags, params=params, time=time)


def publish_run(tracker: Tracker, run: Storage, root: Storage) -> None:
    """Publish everything that the records of a run hold by now.

    A call skips what is already published, so it can be repeated at any time. The parent run has
    the config, data sets, report and plots. Below it there is a run per model with its history,
    weights and the numbers of the final table. Below each of those there is a run per evaluation.

    Raises:
        UserError: ``run.json`` is missing or corrupt.
    """
    record = records.read_run(run)
    start_run(tracker, record)
    for name, model in record.models.items():
        begin = unix_time(record.created)
        with tracker.excused(f"first epoch of {name}"):
            begin = _first_step(root, model) or begin
        # Start the run also if the model's files cannot be read: evaluations are its children.
        start_model(tracker, record, name, begin)
        with tracker.excused(f"model {name}"):
            _publish_model(tracker, root, record, name, model, begin)
    labels = attack_labels(e.attack for e in record.evaluations)
    for order, e in enumerate(record.evaluations):
        with tracker.excused(f"evaluation {e.model} {e.threat_model} {e.attack}"):
            publish_evaluation(tracker, root, record, e, labels[e.attack], order)
    if record.evaluations:
        tracker.start("run", record.name, tags={"mlflow.note.content": markdown.markdown(record)})
    for row in over_seeds.over_seeds(record):
        key = f"seeds/{row['model']}/{_evaluation_name(row['threat_model'], labels[row['attack']])}"
        tracker.metrics("run", {f"{key}/mean": row["accuracy_mean"], f"{key}/sd": row["accuracy_sd"]})
    tracker.metrics("run", {f"seconds/{stage}": seconds for stage, seconds in record.stages.items()})
    with tracker.excused("run.json and report"):
        tracker.artifact("run", run, "run.json")
        for directory in ("report", "report/plots"):
            for name in run.list(directory):
                if "." in name:
                    tracker.artifact("run", run, f"{directory}/{name}", directory)
    if record.finished:
        tracker.finish("run", time=unix_time(record.finished))


def _first_step(root: Storage, model: ModelEntry) -> float | None:
    """Return when a model took its first step (unix seconds); None without a history."""
    history = records.history_files(root, model.path)
    steps = records.read_epoch(root, history[0])["steps"] if history else []
    return float(steps[0]["time"]) if steps else None


def _publish_model(
    tracker: Tracker, root: Storage, record: RunRecord, name: str, model: ModelEntry, begin: float | None
) -> None:
    alias = f"model/{name}"
    for file in records.history_files(root, model.path):
        tracker.history(alias, epoch_of(file), partial(records.read_epoch, root, file))
    tracker.metrics(alias, {**model_metrics(model.to_json()), **table_metrics(record, name)})
    log_datasets(tracker, alias, record, ("train", "validation"))
    for file in ("model.json", "classifier.safetensors", "autoencoder.safetensors"):
        if root.exists(f"{model.path}/{file}"):
            tracker.artifact(alias, root, f"{model.path}/{file}", "weights")
    tracker.finish(alias, time=None if begin is None else begin + model.seconds)


def model_metrics(model: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of an entry of ``models`` in ``run.json``, or of the part that is known."""
    return {
        "clean/validation": model.get("clean_validation"),
        "train/total_seconds": model.get("seconds"),
        "train/mean_images_per_second": model.get("images_per_second"),
        **{f"parameters/{part}": count for part, count in (model.get("parameters") or {}).items()},
    }


def publish_evaluation(
    tracker: Tracker, root: Storage, record: RunRecord, evaluation: EvaluationEntry, label: str, order: int
) -> None:
    """Publish the run of an evaluation. Call :func:`start_model` before.

    Args:
        label: short name of its attack.
        order: its place in the table.
    """
    name = _evaluation_name(evaluation.threat_model, label)
    alias = f"evaluation/{evaluation.model}/{name}"
    created = unix_time(record.created)
    # MLflow lists the youngest run first. A millisecond apart, runs keep the table's order.
    begin = None if created is None else created + 1 - order / 1000
    cell = {"model": evaluation.model, "threat_model": evaluation.threat_model, "attack": evaluation.attack}
    params = {**cell, "source": evaluation.source}
    tags = {
        **cell,
        "kind": "evaluation",
        "recipe": record.name,
        "role": record.roles.get(evaluation.model),
        "examples_made_on": evaluation.source,
        "untrusted": "failed its active test" if is_untrusted(record, evaluation) else None,
        "records": f"{root.uri}/{evaluation.path}" if evaluation.path else None,
    }
    tracker.start(alias, name, parent=f"model/{evaluation.model}", tags=tags, params=params, time=begin)
    metrics = over_seeds.shown_metrics(evaluation)
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    at_budget = metrics.get("accuracy_at_budget") or {}
    # MLflow allows no "<=" in a name: "l2<=1.5" becomes "l2_1.5".
    budgets = {"accuracy_at/" + re.sub(r"[^\w./: -]+", "_", k): v for k, v in at_budget.items()}
    tracker.metrics(alias, {"n": evaluation.n, **numbers, **budgets})
    if curve := evaluation.curve:
        # MLflow's steps are whole numbers, so they count thousandths of the norm.
        steps = [round(1000 * eps) for eps in curve["eps"]]
        tracker.curve(alias, f"accuracy_by_{curve['norm']}_x1000", steps, curve["accuracy"])
    log_datasets(tracker, alias, record, ("test",))
    tracker.finish(alias, time=None if begin is None else begin + float(metrics.get("seconds") or 0.0))


def _evaluation_name(threat: str, label: str) -> str:
    return CLEAN if threat == CLEAN else f"{threat}/{label}"


def table_metrics(record: RunRecord, model: str) -> dict[str, float]:
    """Return the row of a model in the final table as metrics, as in ``white_box/ddn/l2_median``.

    ``untrusted/white_box/fgsm`` is 1 if that attack failed its active test, and absent if not.
    """
    labels = attack_labels(e.attack for e in record.evaluations)
    table: dict[str, float] = {}
    for evaluation in (e for e in record.evaluations if e.model == model):
        metrics = over_seeds.shown_metrics(evaluation)
        if evaluation.threat_model == CLEAN:
            table["clean/accuracy"] = metrics["accuracy"]
            continue
        key = _evaluation_name(evaluation.threat_model, labels[evaluation.attack])
        table[key] = metrics["accuracy"]
        if is_untrusted(record, evaluation):
            table[f"untrusted/{key}"] = 1.0
        if norm := metrics["norm"]:
            table |= {f"{key}/{k}": metrics[k] for k in ("broken", f"{norm}_median") if metrics[k] is not None}
    for worst in (w for w in verdicts.worst_cases(record) if w["model"] == model):
        key = f"worst_case/{worst['threat_model']}/{worst['norm']}_{worst['eps']:.4g}"
        table[key] = worst["accuracy"]
        if worst["untrusted"]:
            table[f"untrusted/{key}"] = 1.0
    if any(row["model"] == model for row in verdicts.near_chance(record)):
        table["flag/clean_accuracy_near_chance"] = 1.0
    if tested := (record.reliability or {}).get(model):
        table |= {f"flag/{flag['name']}": float(flag["fired"]) for flag in tested.flags}
        for attack, test in tested.active.items():
            if attack in labels and test["share"] is not None:
                table[f"active_test/{labels[attack]}"] = test["share"]
    return table


def log_datasets(tracker: Tracker, alias: str, record: Record, splits: Sequence[str]) -> None:
    """Log the splits of the data that a run read, with their hash."""
    data = record.data
    if "hash" not in data:  # The run was stopped before all splits were made.
        return
    addresses = data.get("splits") or {}
    for split in splits:
        if rows := (data.get("rows") or {}).get(split):
            of_split = [address for name, address in addresses.items() if name.partition("/")[0] == split]
            source = addresses.get(split) or (of_split or [data["source"]])[0]
            name = f"{data['source'].replace(':', ' ')} {split}"
            context = "training" if split == "train" else split
            tracker.dataset(alias, name=name, digest=data["hash"], source=source, context=context, rows=rows)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unix_time(iso: str | None) -> float | None:
    """Return an ISO time in unix seconds; None for an empty text."""
    return datetime.fromisoformat(iso).timestamp() if iso else None


def epoch_of(file: str) -> int:
    """Return the number in the name of an epoch record: 3 for ``.../history/epoch-00003.json``."""
    return int(re.sub(r"\D", "", file.rpartition("/")[2]))
