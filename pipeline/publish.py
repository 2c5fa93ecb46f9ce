"""A whole run in MLflow, out of its records: the parent, a run per model, a run per evaluation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from pipeline import comparison, records, sweep_report, tables
from pipeline.runtime.storage import Storage
from pipeline.tracking.tracker import Tracker


def start_run(tracker: Tracker, record: Mapping[str, Any]) -> None:
    """The parent run, alias "run", out of what ``run.json`` holds from its first stage on."""
    tracker.start(
        "run",
        record["name"],
        tags=_made_with(tracker, record, "run"),
        params=flatten(record["experiment"]),
        time=_unix(record.get("created")),
    )
    _datasets(tracker, "run", record, ("train", "validation", "test"))


def _made_with(tracker: Tracker, record: Mapping[str, Any], kind: str) -> dict[str, Any]:
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
    role = records.roles(record).get(name)
    tags = {"kind": "model", "recipe": record["name"], "model": name, "role": role, "records": model.get("path")}
    tags["warning"] = next((row["sentence"] for row in records.near_chance(record) if row["model"] == name), None)
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
        begin = _unix(record.get("created"))
        with tracker.excused(f"first epoch of {name}"):
            begin = _first_step(root, model) or begin
        # Start it also if its files cannot be read: its evaluations are children of its run.
        start_model(tracker, record, name, begin)
        with tracker.excused(f"model {name}"):
            _publish_model(tracker, root, record, name, model, begin)
    labels = records.attack_labels(record)
    for order, evaluation in enumerate(record["evaluations"]):
        with tracker.excused("evaluation {model} {threat_model} {attack}".format(**evaluation)):
            _publish_evaluation(tracker, root, record, evaluation, labels[evaluation["attack"]], order)
    if record["evaluations"]:
        tracker.start("run", record["name"], tags={"mlflow.note.content": tables.markdown(record)})
    for row in comparison.over_seeds(record):
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
        tracker.finish("run", time=_unix(record["finished"]))


def _first_step(root: Storage, model: Mapping[str, Any]) -> float | None:
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
        tracker.history(alias, _epoch_of(file), partial(records.read_epoch, root, file))
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
    created = _unix(record.get("created"))
    # a millisecond apart, so that the UI, which shows the youngest first, lists them in the order of the table
    begin = None if created is None else created + 1 - order / 1000
    tags = {
        "kind": "evaluation",
        "recipe": record["name"],
        "model": model,
        "role": records.roles(record).get(model),
        "threat_model": threat,
        "attack": evaluation["attack"],
        "examples_made_on": evaluation.get("source"),
        "untrusted": "failed its active test" if records.is_untrusted(record, evaluation) else None,
        "records": f"{root.uri}/{evaluation['path']}" if evaluation.get("path") else None,
    }
    params = {
        "threat_model": threat,
        "attack": evaluation["attack"],
        "model": model,
        "source": evaluation.get("source"),
    }
    tracker.start(alias, short, parent=f"model/{model}", tags=tags, params=params, time=begin)
    metrics = comparison.shown_metrics(evaluation)
    budget = metrics.get("accuracy_at_budget") or {}
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    tracker.metrics(
        alias, {"n": evaluation["n"], **plain, **{f"accuracy_at/{_metric_name(k)}": v for k, v in budget.items()}}
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
    labels = records.attack_labels(record)
    found: dict[str, float] = {}
    for evaluation in record["evaluations"]:
        if evaluation["model"] != model:
            continue
        metrics = comparison.shown_metrics(evaluation)
        if evaluation["threat_model"] == "clean":
            found["clean/accuracy"] = metrics["accuracy"]
            continue
        key = f"{evaluation['threat_model']}/{labels[evaluation['attack']]}"
        found[key] = metrics["accuracy"]
        if records.is_untrusted(record, evaluation):
            found[f"untrusted/{key}"] = 1.0
        if norm := metrics["norm"]:
            found |= {f"{key}/{k}": metrics[k] for k in ("broken", f"{norm}_median") if metrics[k] is not None}
    for worst in records.worst_cases(record):
        if worst["model"] == model:
            key = f"worst_case/{worst['threat_model']}/{worst['norm']}_{worst['eps']:.4g}"
            found[key] = worst["accuracy"]
            if worst["untrusted"]:
                found[f"untrusted/{key}"] = 1.0
    if any(row["model"] == model for row in records.near_chance(record)):
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


def _unix(iso: str | None) -> float | None:
    return None if not iso else datetime.fromisoformat(iso).timestamp()


def _metric_name(text: str) -> str:
    """``text`` with what MLflow does not allow in a metric's name left out: ``l2<=1.5`` is ``l2_1.5``."""
    return re.sub(r"[^\w./: -]+", "_", text)


# -- sweeps ----------------------------------------------------------------------------------------------------------------


ENDS = ("finished", "stopped", "diverged", "failed")
"""States of a trial that is over, though a failed one is tried again by the next command."""
JUDGED_BY = ("train", "validation")
"""Splits that a sweep reads; the evaluation of its choice is a run of its own, and names the test images."""


def start_sweep(tracker: Tracker, record: Mapping[str, Any]) -> None:
    """The parent run of a sweep, alias "run", out of what ``sweep.json`` holds from its beginning on."""
    tags = {**_made_with(tracker, record, "sweep"), "space": record["space_name"]}
    # not how many trials: more of them go on with the same sweep, and a param cannot change
    space = {k: v for k, v in record["space"].items() if k != "trials"}
    params = {**flatten(record["experiment"]), **flatten({"space": space}), "sweep.seed": record["seed"]}
    name = f"sweep {record['name']} {record['space_name']}"
    tracker.start("run", name, tags=tags, params=params, time=_unix(record.get("created")))
    _datasets(tracker, "run", record, JUDGED_BY)


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
        for name, found in sweep_report.references(record).items():
            numbers |= {f"reference/{name}/{k}": v for k, v in found.items()}
        numbers |= {"best/clean": record["choice"]["clean"], "best/robust": record["choice"]["robust"]}
        numbers["front/size"] = float(len(record["front"]))
        # of a sweep that went on, MLflow shows the latest step
        ended = sum(state in ENDS for state in states)
        tracker.metrics("run", numbers, step=ended, time=sweep_report.concluded_at(record))
        tags = {
            "mlflow.note.content": sweep_report.markdown(record),
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
        tracker.finish("run", time=_unix(record["finished"]))


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
        "concluded": sweep_report.concluded_at(record),
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
    name = f"trial {trial['number']}: {sweep_report.parameters_text(trial['parameters'])}"
    tracker.start(alias, name, parent="run", tags=tags, params=flatten(train), time=_unix(trial["started"]))
    _datasets(tracker, alias, record, JUDGED_BY)
    if len(trial["models"]) > 1:
        for model in trial["models"]:
            _publish_replicate(tracker, record, trial, model, root)
    _publish_means(tracker, alias, trial, root)
    if ended:
        exported = [_exported(root, model) for model in trial["models"]]
        if exported and all(exported):
            numbers: Mapping[str, float | None] = _means([_model_metrics(model) for model in exported])
        else:
            clean = trial["epochs"][-1]["clean"] if trial["epochs"] else None
            seconds = trial["training_seconds"] / max(1, len(exported))
            numbers = _model_metrics({"clean_validation": clean, "seconds": seconds})
        # at the end of this try: of one step MLflow shows the latest
        end = sweep_report.ended_at(trial)
        tracker.metrics(alias, {**numbers, "epochs": float(len(trial["epochs"]))}, time=end)
        tracker.finish(alias, _status_of(trial), time=end)


def _publish_replicate(
    tracker: Tracker, record: Mapping[str, Any], trial: Mapping[str, Any], model: Mapping[str, Any], root: Storage
) -> None:
    """The run of one seed of a trial: as that of any other model."""
    alias = f"{trial_alias(trial)}/seed-{model['seed']}"
    tags = {"kind": "replicate", "recipe": record["name"], "model": record["model"], "records": model["path"]}
    train = {**record["base"], **trial["parameters"], "seed": model["seed"]}
    begin = _unix(trial["started"])
    tracker.start(
        alias, f"seed {model['seed']}", parent=trial_alias(trial), tags=tags, params=flatten(train), time=begin
    )
    _datasets(tracker, alias, record, JUDGED_BY)
    for file in records.history_files(root, model):
        tracker.history(alias, _epoch_of(file), partial(records.read_epoch, root, file))
    if exported := _exported(root, model):
        tracker.metrics(alias, _model_metrics(exported))
    if trial["state"] in ENDS:
        tracker.finish(alias, _status_of(trial), time=sweep_report.ended_at(trial))


def _publish_means(tracker: Tracker, alias: str, trial: Mapping[str, Any], root: Storage) -> None:
    """The history of a trial: of each epoch that all its models have, the means; with its robust accuracy, if that was measured."""
    robust = {e["epoch"] - 1: e["robust"] for e in trial["epochs"]}
    files = [{_epoch_of(f): f for f in records.history_files(root, model)} for model in trial["models"]]
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


def _epoch_of(file: str) -> int:
    """``.../history/epoch-00003.json`` is 3."""
    return int(re.sub(r"\D", "", file.rpartition("/")[2]))
