"""Four stages of a run: shards, training, attacks, report."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.attacks.spec import AttackSpec
from components.config import Experiment, roles
from components.fields import content_hash
from components.models import libraries
from pipeline.data import hub, pyramids, shards
from pipeline.evaluation import attack, gallery, plan, reliability, worst_case
from pipeline.records import RunRecord
from pipeline.reporting import report, results
from pipeline.reporting.tracked import mlflow_run
from pipeline.run_directory import Run, kinds_of_targets, shapes_of, splits_of
from pipeline.runtime import provenance
from pipeline.runtime.console import Bar, say, stage
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import StoredRecord, now
from pipeline.training import jobs, monitor, train


def make_pyramids(experiment: Experiment, stored: StoredRecord, root: Storage) -> ShardSets:
    """Build the shard sets of every split (stage 1).

    The training images have one shard set for each kind of targets that a model reads.
    """
    e, record = experiment, stored.content
    addresses: dict[str, str] = {}
    with stored.timed("pyramids"):
        for split in splits_of(e):
            for targets in kinds_of_targets(e) if split == "train" else ("none",):
                title = f"pyramids: {split}" + (f", {targets} targets" if targets != "none" else "")
                with stage(title) as bar:
                    progress = functools.partial(bar.update, note="images")
                    shard_set = pyramids.build(e.data, e.pyramids, root, split, targets=targets, progress=progress)
                    shard_set.verify()
                addresses[f"train/{targets}" if split == "train" else split] = shard_set.address
                rows = {**(record["data"] or {}).get("rows", {}), split: shard_set.num_rows}
                record["data"] = {**(record["data"] or {}), "rows": rows}
    without_levels = pyramids.address_of(e.data, e.pyramids, "train", targets="none") if e.trains else ""
    record["data"] |= {
        "source": e.data.source,
        "hash": content_hash(without_levels, addresses["test"]),
        "bare": without_levels,
        "splits": addresses,
        "levels": list(shapes_of(e).sizes),
    }
    if resolved := hub.resolved(e.data.source):
        record["data"]["resolved"] = resolved
    stored.save()
    return existing_pyramids(record["data"], root, verified=True)


@dataclass(frozen=True, kw_only=True)
class ShardSets:
    """Shard sets of a run: addresses of the training data, and the test images."""

    training: jobs.TrainingData
    test: shards.ShardSet


def existing_pyramids(data: Mapping[str, Any], root: Storage, *, verified: bool = False) -> ShardSets:
    """Return the shard sets that ``data`` of the record names, verified here unless they just were.

    Raises:
        DataError: a shard set is missing or damaged.
    """
    sets = {name: shards.load(root, address) for name, address in data["splits"].items()}
    if not verified:
        for shard_set in sets.values():
            shard_set.verify()
    train = {name.partition("/")[2]: s.address for name, s in sets.items() if name.startswith("train/")}
    validation = sets["validation"].address if "validation" in sets else ""
    return ShardSets(
        training=jobs.TrainingData(train=train, without_levels=data["bare"], validation=validation), test=sets["test"]
    )


def train_models(run: Run, sets: ShardSets) -> list[plan.Model]:
    """Train every model of the experiment, as many side by side as there is room for (stage 2)."""
    run.publish(attacks_follow=True)
    e = run.experiment
    for name, config in e.model_configs().items():
        for note in libraries.notes(config.arch, config.pretrained, config.normalize_mean):
            say(f"  {name}: {note}")
    if emulates_bfloat16(e):
        say(
            "  this processor has no bfloat16 arithmetic, so training takes about ten times as long as in float32 "
            "(--train.precision float32 --train.no-channels-last)"
        )
    with run.stored.timed("train"), stage(results.model_stage(e)) as bar:
        models = train.train(e, shapes_of(e), sets.training, run.root, TrainProgress(run, bar), run.tracker.uri)
    run.record["diverged"] = {name: model["diverged"] for name, model in models.items() if "diverged" in model}
    for name, step in run.record["diverged"].items():
        say(f"  {name}: diverged at step {step}; the run goes on without it (--allow-diverged)")
    run.stored.save()
    return as_subjects(e, {name: model for name, model in models.items() if "diverged" not in model})


def emulates_bfloat16(experiment: Experiment) -> bool:
    """Tell whether models are to be trained in bfloat16 on this processor, which lacks it."""
    if experiment.scaling.gpu or not provenance.lacks_bfloat16():
        return False
    return any(c.epochs and c.precision == "bfloat16" for c in experiment.model_configs().values())


class TrainProgress(monitor.Progress):
    """Progress that keeps the run's record, MLflow and the progress bar up to date."""

    def __init__(self, run: Run, bar: Bar) -> None:
        self.run, self.bar = run, bar
        self._started: set[str] = set()

    def on_live(self, done: int, total: int, note: str) -> None:
        self.bar.update(done, total, note)

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        if resumed := record.get("resumed"):
            since = f"from {resumed['from']}" if resumed["from"] else "from the beginning"
            say(f"  {name}: damaged: {', '.join(resumed['damaged'])}; training went on {since}")
        tracker = self.run.tracker
        if name not in self._started:
            mlflow_run.start_model(tracker, RunRecord.from_json(self.run.record), name, record["steps"][0]["time"])
            self._started.add(name)
        # Otherwise the epoch is read from its file when the model is finished.
        if not tracker.is_behind:
            tracker.history(f"model/{name}", record["epoch"], lambda: record)

    def on_external(self, name: str, why_no_autoencoder: str) -> None:
        if any(AttackSpec.parse(a).name == "adaptive" for a in self.run.experiment.evaluation.attacks):
            say(f"  {name}: the adaptive attack cannot run, it needs the model's auto-encoder: {why_no_autoencoder}")

    def on_model(self, name: str, model: dict[str, Any]) -> None:
        run = self.run
        run.record["models"][name] = {
            "path": model["path"],
            "train": model["train"],
            "parameters": model["parameters"],
            "clean_validation": model["validation"].get("accuracy"),
            "reconstruction_validation": model["validation"].get("reconstruction"),
            "seconds": model["seconds"],
            "images_per_second": model["images_per_second"],
            "autoencoder": "autoencoder" in model["parameters"],
        }
        run.stored.save()
        run.publish(attacks_follow=True)
        accuracy = model["validation"].get("accuracy")
        held_out = "" if accuracy is None else f", validation accuracy {100 * accuracy:.1f} %"
        done, total = len(run.record["models"]), len(run.experiment.model_configs())
        speed = f"{model['images_per_second']:.0f} images/s" if model["seconds"] else "taken as it is"
        say(f"  {results.model_stage(run.experiment)} {done}/{total}: {name}: {speed}{held_out}")


def trained_models(run: Run) -> list[plan.Model]:
    """Return the models that stage 2 has trained."""
    models = {}
    for name in run.experiment.model_configs():
        if name in run.record.get("diverged", {}):
            continue
        path = run.record["models"][name]["path"]
        models[name] = {**(run.root / path).read_json("model.json"), "path": path}
    return as_subjects(run.experiment, models)


def as_subjects(experiment: Experiment, models: dict[str, dict[str, Any]]) -> list[plan.Model]:
    """Return models as attacks see them: a reformer in front of its undefended classifier.

    A reformer without such a classifier, because that one diverged, is left out.

    Args:
        models: name -> model.json with "path".
    """
    subjects: dict[str, plan.Model] = {}
    reformers = {name for name, model in models.items() if "reformer.safetensors" in model["files"]}
    for name in sorted(models, key=lambda n: n in reformers):  # Classifiers come first.
        model = models[name]
        classifier = subjects.get(experiment.transfer_source_of(name) or "") if name in reformers else None
        if name in reformers and classifier is None:
            continue
        file = "reformer.safetensors" if name in reformers else "classifier.safetensors"
        subjects[name] = plan.Model(
            name=name,
            path=model["path"],
            sha256=model["files"][file],
            autoencoder=model["files"].get("autoencoder.safetensors", ""),
            classifier=classifier,
        )
    return [subjects[name] for name in models if name in subjects]


def attack_models(run: Run, models: list[plan.Model], test: shards.ShardSet) -> None:
    """Attack every model, and derive worst cases, flags and images (stage 3)."""
    results_before = {key: run.record.get(key) for key in ("evaluations", "worst_case", "reliability")}
    with run.stored.timed("attack"), stage("attack") as bar:
        evaluations = attack.attack(models, test, run.experiment, run.root, bar.update)
        run.record["evaluations"] = evaluations
        run.stored.save()
        names = [m.name for m in models]
        judgements = worst_case.EvaluationRecords(run.root, evaluations, run.experiment.evaluation.chunk_size)
        run.record["worst_case"] = worst_case.worst_cases(names, run.experiment, judgements)
        pairs = roles.pairs(run.experiment)
        run.record["worst_case_pairs"] = worst_case.paired_worst_cases(pairs, run.experiment, judgements)
        run.record["reliability"] = reliability.reliability(
            models, test, run.experiment, run.root, judgements, bar.update
        )
        results_now = {key: run.record[key] for key in ("evaluations", "worst_case", "reliability")}
        if results_now != results_before:
            run.record["evaluated"] = now()
        elif not run.record.get("evaluated"):  # An earlier revision attacked the models.
            run.record["evaluated"] = run.record["finished"] or now()
        gallery.make(test, models, evaluations, run.experiment, run.storage, run.root, bar.update)
    run.stored.save()
    run.publish(report_follows=True)


def make_report(run: Run) -> None:
    """Make table, plots and HTML from the records alone (stage 4)."""
    with run.stored.timed("report"), stage("report"):
        report.build(run.storage, run.root)


def finish_stage(run: Run) -> None:
    """Publish the records of one stage; the next stage continues the same MLflow run."""
    run.publish()
    run.tracker.finish("run")
    run.tracker.conclude()
