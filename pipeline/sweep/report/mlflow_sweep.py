"""A sweep's records in MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.records import Record
from pipeline.reporting import records
from pipeline.reporting.mlflow_run import epoch_of, flatten, log_datasets, made_with_tags, model_metrics, unix_time
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import summary
from pipeline.sweep.trials.states import ENDS
from pipeline.tracking.tracker import Tracker

JUDGED_BY = ("train", "validation")
"""Splits that a sweep reads; the evaluation of its choice is a run of its own, and names the test images."""


def start_sweep(tracker: Tracker, record: Mapping[str, Any]) -> None:
    """The parent run of a sweep, alias "run", out of what ``sweep.json`` holds from its beginning on."""
    tags = {**made_with_tags(tracker, Record.from_json(record), "sweep"), "space": record["space_name"]}
    # not how many trials: more of them go on with the same sweep, and a param cannot change
    space = {k: v for k, v in record["space"].items() if k != "trials"}
    params = {**flatten(record["experiment"]), **flatten({"space": space}), "sweep.seed": record["seed"]}
    name = f"sweep {record['name']} {record['space_name']}"
    tracker.start("run", name, tags=tags, params=params, time=unix_time(record.get("created")))
    log_datasets(tracker, "run", Record.from_json(record), JUDGED_BY)


def trial_alias(trial: Mapping[str, Any]) -> str:
    """Of the child run of a trial."""
    return f"trial/{trial['number']:03d}"


def publish_sweep(tracker: Tracker, record: Mapping[str, Any], sweep: Storage, root: Storage) -> None:
    """Publish all that ``sweep.json`` holds by now; what is published already is skipped, so call it as often as you like.

    A parent run with settings, report and best.json; below it a run per trial, with the metric names of a model's run (means
    over its seeds) and ``validation/robust``; below that, where a trial has several seeds, a run for each.

    Args:
        sweep: the sweep's directory. root: the storage it lies in.
    """
    start_sweep(tracker, record)
    for trial in record["trials"]:
        if trial["started"] and not tracker.has_ended(trial_alias(trial), _status_of(trial)):
            with tracker.excused(trial_alias(trial)):
                _publish_trial(tracker, record, trial, root)
    if record["choice"]:
        states = [t["state"] for t in record["trials"]]
        numbers = {f"trials/{state}": float(states.count(state)) for state in ENDS}
        for name, found in summary.references(record).items():
            numbers |= {f"reference/{name}/{k}": v for k, v in found.items()}
        numbers |= {"best/clean": record["choice"]["clean"], "best/robust": record["choice"]["robust"]}
        numbers["front/size"] = float(len(record["front"]))
        # of a sweep that went on, MLflow shows the latest step
        ended = sum(state in ENDS for state in states)
        tracker.metrics("run", numbers, step=ended, time=summary.concluded_at(record))
        tags = {
            "mlflow.note.content": summary.markdown(record),
            "best_trial": record["choice"]["trial"],
            "evaluation": record["evaluation"] or "",  # of an earlier choice no more
        }
        tracker.start("run", "sweep", tags=tags)
        for name in ("best.json", *(f"report/{name}" for name in sweep.list("report"))):
            with tracker.excused(name):
                tracker.artifact("run", sweep, name, name.rpartition("/")[0])
    tracker.metrics("run", {f"seconds/{stage}": seconds for stage, seconds in record["stages"].items()})
    if record.get("finished"):
        with tracker.excused("sweep.json"):
            tracker.artifact("run", sweep, "sweep.json")
        tracker.finish("run", time=unix_time(record["finished"]))


def choice_version(record: Mapping[str, Any], sweep: Storage) -> dict[str, Any]:
    """Arguments of :meth:`Tracker.register_model` that say of which sweep the chosen model is.

    ``<recipe>-<space>@best`` is the choice of whichever sweep of that recipe and space came to its conclusion last;
    ``@best-<hash>`` is this sweep's own, which no other takes over.
    """
    name = sweep.uri.rpartition("/")[2]
    return {
        "name": f"{record['name']}-{record['space_name']}",
        "version_alias": "best",
        "own_alias": f"best-{name.rpartition('-')[2]}",
        "concluded": summary.concluded_at(record),
        "tags": {"sweep": name, "records": sweep.uri, "trial": record["choice"]["trial"]},
    }


def _status_of(trial: Mapping[str, Any]) -> str:
    return "FAILED" if trial["state"] in ("diverged", "failed") else "FINISHED"


def _publish_trial(tracker: Tracker, record: Mapping[str, Any], trial: Mapping[str, Any], root: Storage) -> None:
    alias = trial_alias(trial)
    ended = trial["state"] in ENDS
    tags = {
        "kind": "trial",
        "recipe": record["name"],
        "model": record["model"],
        "trial": trial["number"],
        "records": " ".join(m["path"] for m in trial["models"]),
        # of a failed trial that is tried again too: tags that were sent once are not sent again, but each try has its time
        "state": trial["state"],
        "reason": trial["reason"],
        "started": trial["started"],
    }
    train = {**record["base"], **trial["parameters"]}
    name = f"trial {trial['number']}: {summary.parameters_text(trial['parameters'])}"
    tracker.start(alias, name, parent="run", tags=tags, params=flatten(train), time=unix_time(trial["started"]))
    log_datasets(tracker, alias, Record.from_json(record), JUDGED_BY)
    if len(trial["models"]) > 1:
        for model in trial["models"]:
            _publish_replicate(tracker, record, trial, model, root)
    _publish_means(tracker, alias, trial, root)
    if ended:
        exported = [_exported(root, model) for model in trial["models"]]
        if exported and all(exported):
            numbers: Mapping[str, float | None] = _means([model_metrics(model) for model in exported])
        else:
            clean = trial["epochs"][-1]["clean"] if trial["epochs"] else None
            seconds = trial["training_seconds"] / max(1, len(exported))
            numbers = model_metrics({"clean_validation": clean, "seconds": seconds})
        # at the end of this try: of one step MLflow shows the latest
        end = summary.ended_at(trial)
        tracker.metrics(alias, {**numbers, "epochs": float(len(trial["epochs"]))}, time=end)
        tracker.finish(alias, _status_of(trial), time=end)


def _publish_replicate(
    tracker: Tracker, record: Mapping[str, Any], trial: Mapping[str, Any], model: Mapping[str, Any], root: Storage
) -> None:
    """The run of one seed of a trial: as that of any other model."""
    alias = f"{trial_alias(trial)}/seed-{model['seed']}"
    tags = {"kind": "replicate", "recipe": record["name"], "model": record["model"], "records": model["path"]}
    train = {**record["base"], **trial["parameters"], "seed": model["seed"]}
    begin = unix_time(trial["started"])
    tracker.start(
        alias, f"seed {model['seed']}", parent=trial_alias(trial), tags=tags, params=flatten(train), time=begin
    )
    log_datasets(tracker, alias, Record.from_json(record), JUDGED_BY)
    for file in records.history_files(root, model["path"]):
        tracker.history(alias, epoch_of(file), partial(records.read_epoch, root, file))
    if exported := _exported(root, model):
        tracker.metrics(alias, model_metrics(exported))
    if trial["state"] in ENDS:
        tracker.finish(alias, _status_of(trial), time=summary.ended_at(trial))


def _publish_means(tracker: Tracker, alias: str, trial: Mapping[str, Any], root: Storage) -> None:
    """The history of a trial: of each epoch that all its models have, the means; with its robust accuracy, if that was measured."""
    robust = {e["epoch"] - 1: e["robust"] for e in trial["epochs"]}
    files = [{epoch_of(f): f for f in records.history_files(root, model["path"])} for model in trial["models"]]
    for epoch in sorted(set.intersection(*map(set, files))) if files else []:
        # measured a little later than trained; published together, once
        settled = epoch <= max(robust, default=-1) or trial["state"] in ("finished", "stopped", "diverged")
        if settled:
            tracker.history(alias, epoch, partial(_read_mean, root, [f[epoch] for f in files], robust.get(epoch)))


def _read_mean(root: Storage, files: Sequence[str], robust: float | None) -> dict[str, Any]:
    return _mean_epoch([records.read_epoch(root, file) for file in files], robust)


def _mean_epoch(several: Sequence[Mapping[str, Any]], robust: float | None) -> dict[str, Any]:
    """The record of one epoch, of models alike but for their seed, as that of one model: means at each step that all have, at the latest time."""
    steps = [
        {**_means(found), "step": found[0]["step"], "time": max(s["time"] for s in found)}
        for found in zip(*(e["steps"] for e in several), strict=False)
    ]
    validation = {**_means([e.get("validation") or {} for e in several]), "robust": robust}
    return {**several[0], "steps": steps, "validation": validation}


def _means(several: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Of the numbers that all have."""
    found = {name: [x for one in several if (x := one.get(name)) is not None] for name in several[0]}
    return {name: statistics.fmean(values) for name, values in found.items() if len(values) == len(several)}


def _exported(root: Storage, model: Mapping[str, Any]) -> dict[str, Any]:
    """What ``model.json`` says of a model, in the words of ``run.json``; empty where it is not trained to its end."""
    if not root.exists(f"{model['path']}/model.json"):
        return {}
    found: dict[str, Any] = root.read_json(f"{model['path']}/model.json")
    return {**found, "clean_validation": found["validation"].get("accuracy")}
