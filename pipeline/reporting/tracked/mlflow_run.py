"""A run in MLflow, made from its records: a parent run, and below it a run for each model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from components.fields import to_dict
from pipeline.records import ModelEntry, Record, RunRecord
from pipeline.reporting import markdown, records
from pipeline.reporting.tracked import metrics
from pipeline.reporting.tracked.models import network_of_run
from pipeline.reporting.tracked.names import code_tags, epoch_of, flatten, model_tags, run_name, split_data, unix_time
from pipeline.reporting.tracked.note import note
from pipeline.runtime.storage import Storage
from pipeline.tracking.registry import Registration
from pipeline.tracking.tracker import Tracker

CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}
"""MLflow's word for the use of each split."""
WEIGHTS = ("classifier.safetensors", "autoencoder.safetensors", "reformer.safetensors")


def start_run(tracker: Tracker, record: RunRecord, root: Storage) -> None:
    """Start the parent run, alias "run", with what ``run.json`` holds from its first stage on."""
    tags = made_with_tags(tracker, record, "run")
    params = flatten(to_dict(record.experiment))
    tracker.start("run", run_name(record), tags=tags, params=params, time=unix_time(record.created))
    log_datasets(tracker, "run", record, root, ("train", "validation", "test"))


def made_with_tags(tracker: Tracker, record: Record, kind: str) -> dict[str, Any]:
    """Return the tags of a parent run: its kind, its records, and what it was made with."""
    return {
        **code_tags(record),
        "kind": kind,
        "recipe": record.name,
        "records": tracker.storage.uri,
        "command": record.command or None,
        "hardware": record.hardware,
    }


def start_model(tracker: Tracker, record: RunRecord, name: str, time: float | None = None) -> None:
    """Start the child run of a model, alias "model/NAME". Call :func:`start_run` before.

    Args:
        record: need not hold the model yet.
        time: when the model took its first step (unix seconds).
    """
    # Log also what all models share, so that MLflow's comparison of models is complete.
    params = flatten(record.model_config(name))
    tags = {**code_tags(record), "kind": "model", **model_tags(record, name)}
    tracker.start(f"model/{name}", name, parent="run", tags=tags, params=params, time=time)


def publish_run(
    tracker: Tracker,
    run: Storage,
    root: Storage,
    *,
    register: bool = False,
    attacks_follow: bool = False,
    report_follows: bool = False,
) -> None:
    """Publish everything that the records of a run hold by now.

    A call skips what is already published, so it can be repeated at any time. The parent run has
    the config, data sets, headline numbers, report and plots. Below it each model has a run and a
    logged model, with its history, weights and all that was measured on it.

    Args:
        register: make the logged models versions of registered models, ``RECIPE-MODEL``.
        attacks_follow: this command will evaluate the models.
        report_follows: this command will write the report anew. An earlier one is not published,
            because its files may be gone before they are sent.

    Raises:
        UserError: ``run.json`` is missing or corrupt.
    """
    record = records.read_run(run)
    start_run(tracker, record, root)
    for name, model in record.models.items():
        begin = unix_time(record.created)
        with tracker.excused(f"first epoch of {name}"):
            begin = _first_step(root, model) or begin
        start_model(tracker, record, name, begin)
        with tracker.excused(f"model {name}"):
            _publish_model(tracker, root, record, name, begin)
        with tracker.excused(f"logged model of {name}"):
            network = network_of_run(root, record, name)
            tracker.log_model(f"model/{name}", network)
            _publish_model_metrics(tracker, root, record, name, begin, attacks_follow)
            base, replicate = record.replicates[name]
            if register and replicate == 0:
                tracker.register(f"model/{name}", Registration(f"{record.name}-{base}", network.weights))
        tracker.finish(f"model/{name}", time=None if begin is None else begin + model.seconds)
    if record.evaluations:
        values = {**metrics.headline(record), **metrics.seed_metrics(record)}
        tracker.metrics("run", values, time=_evaluated_at(record))
        tracker.start("run", record.name, tags={"main_model": metrics.main_model(record)})
        tracker.note("run", note(record))
    with tracker.excused("run.json and report"):
        for file in ("run.json", "requirements.txt"):
            if run.exists(file):
                tracker.artifact("run", run, file)
        for directory in () if report_follows else ("report", "report/plots"):
            for name in run.list(directory):
                if "." in name:
                    tracker.artifact("run", run, f"{directory}/{name}", directory)
    if record.finished:
        tracker.finish("run", time=unix_time(record.finished))
    tracker.delete_earlier()


def _first_step(root: Storage, model: ModelEntry) -> float | None:
    """Return when a model took its first step (unix seconds); None without a history."""
    history = records.history_files(root, model.path)
    steps = records.read_epoch(root, history[0])["steps"] if history else []
    return float(steps[0]["time"]) if steps else None


def _evaluated_at(record: RunRecord) -> float | None:
    return unix_time(record.evaluated or record.finished or record.created)


def _publish_model(tracker: Tracker, root: Storage, record: RunRecord, name: str, begin: float | None) -> None:
    """Publish history, metrics, data sets and files of a model's run."""
    alias, model = f"model/{name}", record.models[name]
    # MLflow's comparison opens with the metric that was logged first.
    if values := metrics.test_metrics(record, name):
        tracker.metrics(alias, values, time=_evaluated_at(record))
    trained_at = None if begin is None else begin + model.seconds
    tracker.metrics(alias, metrics.training_metrics(model.to_json()), time=trained_at)
    for file in records.history_files(root, model.path):
        tracker.history(alias, epoch_of(file), partial(records.read_epoch, root, file))
    for curve, (steps, accuracies) in metrics.curves(record, name).items():
        tracker.curve(alias, curve, steps, accuracies)
    own = tuple(e for e in record.evaluations if e.model == name)
    if own:
        table = markdown.to_csv(dataclasses.replace(record, evaluations=own), with_paths=True)
        tracker.text(alias, table, "evaluations.csv")
    log_datasets(tracker, alias, record, root, ("train", "validation", *(("test",) if own else ())))
    for file in ("model.json", *WEIGHTS):
        if root.exists(f"{model.path}/{file}"):
            tracker.artifact(alias, root, f"{model.path}/{file}", "weights")


def _publish_model_metrics(
    tracker: Tracker, root: Storage, record: RunRecord, name: str, begin: float | None, attacks_follow: bool
) -> None:
    """Publish the metrics of a logged model.

    MLflow shows the data sets in the order of their arrival, and test images come first. So until
    the attacks are over, the numbers of the training stand in the model's run alone.
    """
    alias, model = f"model/{name}", record.models[name]
    training, tested = metrics.training_metrics(model.to_json()), metrics.test_metrics(record, name)
    if tested:
        tracker.reads_model("run", alias)
    elif attacks_follow:
        return
    trained_at = (begin or 0.0) + model.seconds
    tested_at = _evaluated_at(record) or trained_at
    for values, time, split in ((tested, tested_at, "test"), (training, trained_at, "validation")):
        measured = {key: value for key, value in values.items() if not key.startswith(metrics.OF_NO_DATA)}
        tracker.model_metrics(alias, measured, time=time, data=split_data(record, root, split))
    for values, time in ((tested, tested_at), (training, trained_at)):
        others = {key: value for key, value in values.items() if key.startswith(metrics.OF_NO_DATA)}
        tracker.model_metrics(alias, others, time=time)


def log_datasets(tracker: Tracker, alias: str, record: Record, root: Storage, splits: Sequence[str]) -> None:
    """Log the splits of the data that a run read."""
    for split in splits:
        if data := split_data(record, root, split):
            tracker.dataset(alias, data, CONTEXTS[split])
