"""A whole run in MLflow, out of its records: the parent, a run per model, a run per evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from components.config.roles import roles_of
from pipeline.reporting import markdown, over_seeds, records, verdicts
from pipeline.reporting.labels import attack_labels, is_untrusted
from pipeline.reporting.records import experiment_of
from pipeline.runtime.storage import Storage
from pipeline.tracking.tracker import Tracker


def start_run(tracker: Tracker, record: Mapping[str, Any]) -> None:
    """The parent run, alias "run", out of what ``run.json`` holds from its first stage on."""
    tracker.start(
        "run",
        record["name"],
        tags=made_with_tags(tracker, record, "run"),
        params=flatten(record["experiment"]),
        time=unix_time(record.get("created")),
    )
    _datasets(tracker, "run", record, ("train", "validation", "test"))


def made_with_tags(tracker: Tracker, record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Tags of a parent run: what it is, where its records lie, and what they were made with."""
    git = record.get("git") or {}
    return {
        "kind": kind,
        "recipe": record["name"],
        "records": tracker.storage.uri,
        "command": record.get("command"),
        "git_dirty": git.get("dirty"),
        "mlflow.source.git.commit": git.get("revision"),
        "source": record.get("source"),
        "mlflow.source.type": "LOCAL",
        "hardware": record.get("hardware") or {},
        "versions": record.get("versions"),
    }


def start_model(tracker: Tracker, record: Mapping[str, Any], name: str, time: float | None = None) -> None:
    """The child run of a model, alias "model/NAME", e.g. before its first epoch. ``start_run`` comes before.

    ``record`` is ``run.json``; the model need not stand in it yet.
    """
    model = record.get("models", {}).get(name, {})
    role = roles_of(experiment_of(record)).get(name)
    tags = {"kind": "model", "recipe": record["name"], "model": name, "role": role, "records": model.get("path")}
    tags["warning"] = next((row["sentence"] for row in verdicts.near_chance(record) if row["model"] == name), None)
    # what the models of a run have in common stands in the parent; here all of it, so that a comparison shows what differs
    params = flatten(model.get("train") or records.model_config(record, name))
    tracker.start(f"model/{name}", name, parent="run", tags=tags, params=params, time=time)


def publish_run(tracker: Tracker, run: Storage, root: Storage) -> None:
    """Publish all that the records of a run hold by now; what is published already is skipped, so call it as often as you like.

    A parent run with the config, data sets, report and plots; below it a run per model with its history, weights and the
    numbers of the final table; below each of those a run per evaluation.

    Args:
        run: the run directory. root: the storage it lies in.

    Raises:
        UserError: ``run.json`` or a record that it names is missing or corrupt.
    """
    record = records.read_run(run)
    start_run(tracker, record)
    for name, model in record["models"].items():
        begin = unix_time(record.get("created"))
        with tracker.excused(f"first epoch of {name}"):
            begin = first_step(root, model) or begin
        # Start it also if its files cannot be read: its evaluations are children of its run.
        start_model(tracker, record, name, begin)
        with tracker.excused(f"model {name}"):
            _publish_model(tracker, root, record, name, model, begin)
    labels = attack_labels(record)
    for order, evaluation in enumerate(record["evaluations"]):
        with tracker.excused("evaluation {model} {threat_model} {attack}".format(**evaluation)):
            _publish_evaluation(tracker, root, record, evaluation, labels[evaluation["attack"]], order)
    if record["evaluations"]:
        tracker.start("run", record["name"], tags={"mlflow.note.content": markdown.markdown(record)})
    for row in over_seeds.over_seeds(record):
        name = f"{row['model']}/{'clean' if row['threat_model'] == 'clean' else row['threat_model'] + '/' + labels[row['attack']]}"
        tracker.metrics("run", {f"seeds/{name}/mean": row["accuracy_mean"], f"seeds/{name}/sd": row["accuracy_sd"]})
    tracker.metrics("run", {f"seconds/{stage}": seconds for stage, seconds in record["stages"].items()})
    with tracker.excused("run.json and report"):
        tracker.artifact("run", run, "run.json")
        for name in run.list("report"):
            if "." in name:
                tracker.artifact("run", run, f"report/{name}", "report")
        for name in run.list("report/plots"):
            tracker.artifact("run", run, f"report/plots/{name}", "report/plots")
    if record.get("finished"):
        tracker.finish("run", time=unix_time(record["finished"]))


def first_step(root: Storage, model: Mapping[str, Any]) -> float | None:
    """Return when a model took its first step (unix seconds), or None for a model without a history."""
    history = records.history_files(root, model)
    steps = records.read_epoch(root, history[0])["steps"] if history else []
    return float(steps[0]["time"]) if steps else None


def _publish_model(
    tracker: Tracker,
    root: Storage,
    record: Mapping[str, Any],
    name: str,
    model: Mapping[str, Any],
    begin: float | None,
) -> None:
    alias = f"model/{name}"
    for file in records.history_files(root, model):
        tracker.history(alias, epoch_of(file), partial(records.read_epoch, root, file))
    tracker.metrics(alias, {**_model_metrics(model), **table_metrics(record, name)})
    _datasets(tracker, alias, record, ("train", "validation"))
    for file in ("model.json", "classifier.safetensors", "autoencoder.safetensors"):
        if root.exists(f"{model['path']}/{file}"):
            tracker.artifact(alias, root, f"{model['path']}/{file}", "weights")
    tracker.finish(alias, time=None if begin is None else begin + float(model.get("seconds") or 0.0))


def _model_metrics(model: Mapping[str, Any]) -> dict[str, float | None]:
    """What one number says of a trained model. ``model``: as in ``run.json``, or what is known of it."""
    return {
        "clean/validation": model.get("clean_validation"),
        "train/total_seconds": model.get("seconds"),
        "train/mean_images_per_second": model.get("images_per_second"),
        **{f"parameters/{part}": count for part, count in (model.get("parameters") or {}).items()},
    }


def _publish_evaluation(
    tracker: Tracker, root: Storage, record: Mapping[str, Any], evaluation: Mapping[str, Any], label: str, order: int
) -> None:
    model, threat = evaluation["model"], evaluation["threat_model"]
    short = "clean" if threat == "clean" else f"{threat}/{label}"
    alias = f"evaluation/{model}/{short}"
    created = unix_time(record.get("created"))
    # a millisecond apart, so that the UI, which shows the youngest first, lists them in the order of the table
    begin = None if created is None else created + 1 - order / 1000
    tags = {
        "kind": "evaluation",
        "recipe": record["name"],
        "model": model,
        "role": roles_of(experiment_of(record)).get(model),
        "threat_model": threat,
        "attack": evaluation["attack"],
        "examples_made_on": evaluation.get("source"),
        "untrusted": "failed its active test" if is_untrusted(record, evaluation) else None,
        "records": f"{root.uri}/{evaluation['path']}" if evaluation.get("path") else None,
    }
    params = {
        "threat_model": threat,
        "attack": evaluation["attack"],
        "model": model,
        "source": evaluation.get("source"),
    }
    tracker.start(alias, short, parent=f"model/{model}", tags=tags, params=params, time=begin)
    metrics = over_seeds.shown_metrics(evaluation)
    budget = metrics.get("accuracy_at_budget") or {}
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    tracker.metrics(
        alias, {"n": evaluation["n"], **plain, **{f"accuracy_at/{metric_name(k)}": v for k, v in budget.items()}}
    )
    if curve := metrics.get("curve"):
        # MLflow's steps are whole numbers: thousandths of the norm
        steps = [round(1000 * eps) for eps in curve["eps"]]
        tracker.curve(alias, f"accuracy_by_{curve['norm']}_x1000", steps, curve["accuracy"])
    _datasets(tracker, alias, record, ("test",))
    tracker.finish(alias, time=None if begin is None else begin + float(metrics.get("seconds") or 0.0))


def table_metrics(record: Mapping[str, Any], model: str) -> dict[str, float]:
    """The row of a model in the final table, by short names: ``clean/accuracy``, ``white_box/fgsm``, ``white_box/ddn/l2_median``.
    ``untrusted/white_box/fgsm`` is 1 where that attack failed its active test, and absent elsewhere."""
    labels = attack_labels(record)
    found: dict[str, float] = {}
    for evaluation in record["evaluations"]:
        if evaluation["model"] != model:
            continue
        metrics = over_seeds.shown_metrics(evaluation)
        if evaluation["threat_model"] == "clean":
            found["clean/accuracy"] = metrics["accuracy"]
            continue
        key = f"{evaluation['threat_model']}/{labels[evaluation['attack']]}"
        found[key] = metrics["accuracy"]
        if is_untrusted(record, evaluation):
            found[f"untrusted/{key}"] = 1.0
        if norm := metrics["norm"]:
            found |= {f"{key}/{k}": metrics[k] for k in ("broken", f"{norm}_median") if metrics[k] is not None}
    for worst in verdicts.worst_cases(record):
        if worst["model"] == model:
            key = f"worst_case/{worst['threat_model']}/{worst['norm']}_{worst['eps']:.4g}"
            found[key] = worst["accuracy"]
            if worst["untrusted"]:
                found[f"untrusted/{key}"] = 1.0
    if any(row["model"] == model for row in verdicts.near_chance(record)):
        found["flag/clean_accuracy_near_chance"] = 1.0
    tested = (record.get("reliability") or {}).get(model, {})
    for flag in tested.get("flags", []):
        found[f"flag/{flag['name']}"] = float(flag["fired"])
    for attack, active in tested.get("active", {}).items():
        if attack in labels and active["share"] is not None:
            found[f"active_test/{labels[attack]}"] = active["share"]
    return found


def _datasets(tracker: Tracker, alias: str, record: Mapping[str, Any], splits: Sequence[str]) -> None:
    data = record.get("data") or {}
    for split in splits:
        rows = (data.get("rows") or {}).get(split)
        if rows and "hash" in data:  # without: stopped between two splits
            splits = data.get("splits") or {}
            source = splits.get(split) or next(
                (a for s, a in splits.items() if s.startswith(f"{split}/")), data["source"]
            )
            context = "training" if split == "train" else split
            name = f"{data['source'].replace(':', ' ')} {split}"
            tracker.dataset(alias, name=name, digest=data["hash"], source=source, context=context, rows=rows)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unix_time(iso: str | None) -> float | None:
    return None if not iso else datetime.fromisoformat(iso).timestamp()


def metric_name(text: str) -> str:
    """``text`` with what MLflow does not allow in a metric's name left out: ``l2<=1.5`` is ``l2_1.5``."""
    return re.sub(r"[^\w./: -]+", "_", text)


def epoch_of(file: str) -> int:
    """``.../history/epoch-00003.json`` is 3."""
    return int(re.sub(r"\D", "", file.rpartition("/")[2]))
