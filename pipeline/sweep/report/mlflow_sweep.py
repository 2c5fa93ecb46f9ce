"""A sweep's records in MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.records import Record
from pipeline.reporting import records
from pipeline.reporting.tracked.metrics import training_metrics
from pipeline.reporting.tracked.mlflow_run import log_datasets, made_with_tags
from pipeline.reporting.tracked.models import network
from pipeline.reporting.tracked.names import code_tags, epoch_of, flatten, run_name, split_data, unix_time
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import summary
from pipeline.sweep.trials.entry import TrialEntry, TrialModel, trials_of
from pipeline.sweep.trials.states import DIVERGED, FAILED, OVER
from pipeline.tracking.registry import Registration
from pipeline.tracking.tracker import Tracker

SPLITS = ("train", "validation")
"""Splits that a sweep reads. The evaluation of its choice is another run, with the test images."""


def start_sweep(tracker: Tracker, record: Mapping[str, Any], root: Storage) -> None:
    """Start the parent run of a sweep, alias "run", from a record that may be new."""
    tags = {**made_with_tags(tracker, Record.from_json(record), "sweep"), "space": record["space_name"]}
    # The number of trials is no param: a sweep can go on with more, and a param cannot change.
    space = {k: v for k, v in record["space"].items() if k != "trials"}
    params = {**flatten(record["experiment"]), **flatten({"space": space}), "sweep.seed": record["seed"]}
    name = f"sweep {record['space_name']} of {run_name(Record.from_json(record))}"
    tracker.start("run", name, tags=tags, params=params, time=unix_time(record.get("created")))
    log_datasets(tracker, "run", Record.from_json(record), root, SPLITS)


def trial_alias(trial: TrialEntry) -> str:
    """Return the alias of a trial's run."""
    return f"trial/{trial.number:03d}"


def publish_sweep(
    tracker: Tracker,
    record: Mapping[str, Any],
    sweep: Storage,
    root: Storage,
    *,
    register: bool = False,
    report_follows: bool = False,
) -> None:
    """Publish all that ``sweep.json`` holds by now. Call it at any time.

    What is published already is skipped. The parent run has settings, the choice's numbers, report
    and best.json. Below it each trial has a run, with the metric names of a model's run (means over
    its seeds) and robust accuracy. Below that, each seed of several has a run. The choice has a
    logged model.

    Args:
        register: make the choice a version of a registered model, ``RECIPE-SPACE``.
        report_follows: as of :func:`pipeline.reporting.tracked.mlflow_run.publish_run`.
    """
    start_sweep(tracker, record, root)
    for trial in trials_of(record):
        if trial.started and not tracker.has_ended(trial_alias(trial), _status_of(trial)):
            with tracker.excused(trial_alias(trial)):
                _publish_trial(tracker, record, trial, root)
    if record["choice"]:
        _publish_conclusion(tracker, record, sweep, report_follows)
        with tracker.excused("logged model of the choice"):
            _publish_choice(tracker, record, sweep, root, register)
    if record.get("finished"):
        for file in ("sweep.json", "requirements.txt"):
            with tracker.excused(file):
                if sweep.exists(file):
                    tracker.artifact("run", sweep, file)
        tracker.finish("run", time=unix_time(record["finished"]))
    tracker.delete_earlier()


def _publish_conclusion(tracker: Tracker, record: Mapping[str, Any], sweep: Storage, report_follows: bool) -> None:
    states = [trial.state for trial in trials_of(record)]
    metrics = _scores(record["choice"]["clean"], record["choice"]["robust"])
    for name, scores in summary.references(record).items():
        metrics |= {f"reference/{name}/{k}_validation": v for k, v in scores.items()}
    metrics |= {f"trials/{state}": float(states.count(state)) for state in OVER}
    metrics["trials/on_the_front"] = float(len(record["front"]))
    # MLflow shows the latest step, which is that of the sweep as it went on last.
    ended = sum(state in OVER for state in states)
    tracker.metrics("run", metrics, step=ended, time=summary.concluded_at(record))
    tags = {
        "best_trial": record["choice"]["trial"],
        "evaluation": record["evaluation"] or "",  # Empty replaces that of an earlier choice.
    }
    tracker.start("run", "sweep", tags=tags)
    tracker.note("run", note(record))
    report = [] if report_follows else sweep.list("report")
    for name in ("best.json", *(f"report/{name}" for name in report)):
        with tracker.excused(name):
            tracker.artifact("run", sweep, name, name.rpartition("/")[0])


def note(record: Mapping[str, Any]) -> str:
    """Return the description of a sweep that has a choice: what it chose, links, and what it did."""
    links = {"Report": "report.html", "all trials": "trials.csv"}
    pages = (f"[{title}](artifact:report/{file})" for title, file in links.items())
    # MLflow folds what follows the first lines.
    first = [f"{summary.conclusion(record)}.", " · ".join(pages)]
    return "\n\n".join([*first, summary.overview(record), *summary.paragraphs(record)])


def _publish_choice(tracker: Tracker, record: Mapping[str, Any], sweep: Storage, root: Storage, register: bool) -> None:
    """Publish the chosen model, of several seeds the first, as the logged model of its trial."""
    trial = summary.chosen(record)
    alias, common = trial_alias(trial), Record.from_json(record)
    version = choice_version(record, sweep)
    chosen = network(
        root,
        common,
        f"trial {trial.number} of {record['name']} {record['space_name']}",
        trial.models[0].path,
        config={**record["base"], **trial.parameters},
        tags={"recipe": record["name"], "model": record["model"], **version["tags"]},
    )
    tracker.log_model(alias, chosen)
    scores = _scores(trial.last.clean, trial.last.robust)
    tracker.model_metrics(alias, scores, time=trial.ended_at, data=split_data(common, root, "validation"))
    if register:
        tracker.register(alias, Registration(weights=chosen.weights, **version))


def _scores(clean: float | None, robust: float | None) -> dict[str, float | None]:
    return {"accuracy/clean_validation": clean, "accuracy/robust_validation": robust}


def choice_version(record: Mapping[str, Any], sweep: Storage) -> dict[str, Any]:
    """Return the fields of the choice's :class:`Registration` that name its sweep.

    ``<recipe>-<space>@best`` is the choice of the sweep of that recipe and space that was concluded
    last. ``@best-<hash>`` is this sweep's own, which no other sweep takes over.
    """
    name = sweep.uri.rpartition("/")[2]
    return {
        "name": f"{record['name']}-{record['space_name']}",
        "version_alias": "best",
        "own_alias": f"best-{name.rpartition('-')[2]}",
        "concluded": summary.concluded_at(record),
        "tags": {"sweep": name, "records": sweep.uri, "trial": record["choice"]["trial"]},
    }


def _status_of(trial: TrialEntry) -> str:
    return "FAILED" if trial.state in (DIVERGED, FAILED) else "FINISHED"


def _publish_trial(tracker: Tracker, record: Mapping[str, Any], trial: TrialEntry, root: Storage) -> None:
    alias = trial_alias(trial)
    tags = {
        **code_tags(Record.from_json(record)),
        "kind": "trial",
        "recipe": record["name"],
        "model": record["model"],
        "trial": trial.number,
        "records": " ".join(model.path for model in trial.models),
        # Equal tags are not sent twice. The start time makes those of a retried trial differ.
        "state": trial.state,
        "reason": trial.reason,
        "started": trial.started,
    }
    train = {**record["base"], **trial.parameters}
    name = f"trial {trial.number}: {summary.parameters_text(trial.parameters)}"
    tracker.start(alias, name, parent="run", tags=tags, params=flatten(train), time=unix_time(trial.started))
    log_datasets(tracker, alias, Record.from_json(record), root, SPLITS)
    if len(trial.models) > 1:
        for model in trial.models:
            _publish_replicate(tracker, record, trial, model, root)
    _publish_means(tracker, alias, trial, root)
    if trial.is_over:
        robust = {"accuracy/robust_validation": trial.last.robust} if trial.epochs else {}
        metrics = {**_final_metrics(trial, root), **robust, "time/epochs": float(len(trial.epochs))}
        # MLflow shows the latest value of a step, so this try replaces an earlier one.
        tracker.metrics(alias, metrics, time=trial.ended_at)
        tracker.finish(alias, _status_of(trial), time=trial.ended_at)


def _final_metrics(trial: TrialEntry, root: Storage) -> dict[str, float | None]:
    """Return the metrics of a trial that is over, as means over its models if all are exported."""
    exported = [_exported(root, model) for model in trial.models]
    if exported and all(exported):
        return {**_means([training_metrics(model) for model in exported])}
    clean = trial.last.clean if trial.epochs else None
    seconds = trial.training_seconds / max(1, len(exported))
    return {**training_metrics({"clean_validation": clean, "seconds": seconds})}


def _publish_replicate(
    tracker: Tracker, record: Mapping[str, Any], trial: TrialEntry, model: TrialModel, root: Storage
) -> None:
    """Publish one seed of a trial like any other model."""
    alias = f"{trial_alias(trial)}/seed-{model.seed}"
    code = code_tags(Record.from_json(record))
    tags = {**code, "kind": "replicate", "recipe": record["name"], "model": record["model"], "records": model.path}
    params = flatten({**record["base"], **trial.parameters, "seed": model.seed})
    begin = unix_time(trial.started)
    tracker.start(alias, f"seed {model.seed}", parent=trial_alias(trial), tags=tags, params=params, time=begin)
    log_datasets(tracker, alias, Record.from_json(record), root, SPLITS)
    for file in records.history_files(root, model.path):
        tracker.history(alias, epoch_of(file), partial(records.read_epoch, root, file))
    if exported := _exported(root, model):
        tracker.metrics(alias, training_metrics(exported), time=trial.ended_at)
    if trial.is_over:
        tracker.finish(alias, _status_of(trial), time=trial.ended_at)


def _publish_means(tracker: Tracker, alias: str, trial: TrialEntry, root: Storage) -> None:
    """Publish the history of a trial: the means of each epoch that all its models have.

    Robust accuracy is part of an epoch, and is measured a little later than the rest. An epoch is
    published once it has it, or once the trial is over.
    """
    robust = {scores.epoch - 1: scores.robust for scores in trial.epochs}
    files = [{epoch_of(file): file for file in records.history_files(root, model.path)} for model in trial.models]
    for epoch in sorted(set.intersection(*map(set, files))) if files else []:
        if epoch <= max(robust, default=-1) or trial.is_settled:
            epoch_files = [files_of_model[epoch] for files_of_model in files]
            tracker.history(alias, epoch, partial(_read_mean, root, epoch_files, robust.get(epoch)))


def _read_mean(root: Storage, files: Sequence[str], robust: float | None) -> dict[str, Any]:
    """Return the record of an epoch of several seeds as that of one model.

    It has the means at each step that all seeds have, at the latest time of the step.
    """
    epochs = [records.read_epoch(root, file) for file in files]
    steps = [
        {**_means(replicates), "step": replicates[0]["step"], "time": max(s["time"] for s in replicates)}
        for replicates in zip(*(epoch["steps"] for epoch in epochs), strict=False)
    ]
    # MLflow's comparison of trials opens with the metric that was logged first.
    validation = {"robust": robust, **_means([epoch.get("validation") or {} for epoch in epochs])}
    return {**epochs[0], "steps": steps, "validation": validation}


def _means(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Return the mean of each metric that all have."""
    values = {name: [x for one in metrics if (x := one.get(name)) is not None] for name in metrics[0]}
    return {name: statistics.fmean(x) for name, x in values.items() if len(x) == len(metrics)}


def _exported(root: Storage, model: TrialModel) -> dict[str, Any]:
    """Return model.json with the keys of ``run.json``, or {} if the model is not exported."""
    file = f"{model.path}/model.json"
    if not root.exists(file):
        return {}
    described: dict[str, Any] = root.read_json(file)
    return {**described, "clean_validation": described["validation"].get("accuracy")}
