"""A run from end to end: the stages in their order, its record on storage after each, MLflow published from the record.

Every stage is named by the hash of what it follows from, so a stage that is done is taken as it is, and a run that was
stopped at any point goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from components.attacks.spec import AttackSpec
from components.config import Experiment, level_sizes, roles
from components.config.data import Shapes
from components.config.roles import roles_of
from components.config.train import stored_levels
from components.errors import UserError
from components.fields import content_hash, to_dict
from components.models import libraries
from pipeline.data import pyramids, shards
from pipeline.data.sources import base, open
from pipeline.evaluation import attack, gallery, plan, reliability, worst_case
from pipeline.reporting import mlflow_run, records, report, results, terminal
from pipeline.runtime import cluster, provenance
from pipeline.runtime.console import Bar, say, stage
from pipeline.runtime.lease import Lease
from pipeline.runtime.redaction import redacted
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage
from pipeline.tracking import server, uri
from pipeline.tracking.tracker import Tracker
from pipeline.training import exports, gpu_memory, jobs, monitor, train

STAGES = ("pyramids", "train", "attack", "report")


@dataclass
class Run:
    """One experiment on its storage. Make it with :func:`open_run`."""

    experiment: Experiment
    root: Storage
    storage: Storage
    """runs/<recipe>-<hash> below root."""
    record: dict[str, Any]
    tracker: Tracker
    lease: Lease | None = field(default=None, kw_only=True)
    """Held while this process works on the directory."""

    @property
    def shapes(self) -> Shapes:
        data = self.experiment.data
        return Shapes(
            image_size=data.image_size,
            channels=data.channels,
            num_classes=data.num_classes,
            sizes=level_sizes(data.image_size, self.experiment.pyramids.levels),
        )

    @property
    def splits(self) -> tuple[base.Split, ...]:
        if not self.experiment.trains:
            return ("test",)
        held_out: tuple[base.Split, ...] = ("validation",) if self.experiment.data.validation_fraction else ()
        return ("train", *held_out, "test")

    def save(self) -> None:
        if self.lease is not None:
            self.lease.check()
        self.storage.write_json("run.json", self.record)

    def publish(self) -> None:
        with self.tracker.excused("records"):
            mlflow_run.publish_run(self.tracker, self.storage, self.root)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a stage to the record; a stage that is continued counts on."""
        begin = time.monotonic()
        try:
            yield
        except BaseException as e:
            self.record["stages"][name] = self.record["stages"].get(name, 0.0) + time.monotonic() - begin
            if not isinstance(e, KeyboardInterrupt):  # a storage that does not answer would hold up the end
                with suppress(UserError):  # it would hide what went wrong
                    self.save()
            raise
        self.record["stages"][name] = self.record["stages"].get(name, 0.0) + time.monotonic() - begin
        self.save()


def run_address(experiment: Experiment) -> str:
    """``runs/<recipe>-<hash>``: where a run is kept and who tracks it are no part of what it is."""
    config = to_dict(experiment)
    for name in ("storage", "tracking_uri", "experiment_name", "description"):
        del config[name]
    # These settings came later. At their defaults they leave the addresses of earlier runs as they are.
    for name in ("test_split", "image_column", "label_column"):
        if not config["data"][name]:
            del config["data"][name]
    # what the machine may use does not change the run either, but for the number of workers
    config["scaling"] = {"workers": config["scaling"]["workers"]}
    return f"runs/{experiment.name}-{content_hash(config)}"


def open_run(
    experiment: Experiment,
    *,
    records_only: bool = False,
    needs: Literal["", "shards", "models"] = "",
    will_train: bool = False,
    needs_tracking: bool = True,
) -> Run:
    """Check all that can be checked before compute is spent, join Ray, and open the run's record.

    Args:
        records_only: no sources, networks or cluster are needed (the report).
        needs: what an earlier stage must have left: shards, or shards and models.
        will_train: the models that are not trained yet must fit the GPUs.
        needs_tracking: refuse a new run where MLflow does not answer. Not within a sweep, whose compute is spent. A run that has
            a record continues: as of any outage on the way, the Tracker tells of it, and publishes when MLflow answers.

    Raises:
        UserError: one of its kinds, naming what, where and what to do.
    """
    if cluster.in_job() and experiment.storage.startswith("~"):
        say(f"storage {experiment.storage} is in the home directory of the node that runs this job")
    exports.trust(config.arch for config in experiment.variants().values())
    root = Storage(experiment.storage)
    root.check_writable()
    storage = root / run_address(experiment)
    Lease(storage).check_free()
    record = _read_record(storage)
    if records_only and record is None:
        raise UserError(f"there are no records at {storage.uri}: run the other stages with the same settings first")
    if needs:
        _check_made(record or {}, experiment, storage, needs)
    uri, experiment_name = server.choose(
        experiment.tracking_uri,
        experiment.experiment_name,
        root,
        required=needs_tracking and record is None,
        echo=say,
    )
    if not records_only:
        shapes = Shapes(
            image_size=experiment.data.image_size,
            channels=experiment.data.channels,
            num_classes=experiment.data.num_classes,
            sizes=level_sizes(experiment.data.image_size, experiment.pyramids.levels),
        )
        check_and_join(experiment, experiment, shapes, root)
        if will_train:
            gpu_memory.check_gpu_memory(experiment, shapes, lambda name: is_trained(experiment, shapes, root, name))
    lease = Lease(storage).acquire()  # before the record is read
    try:
        tracker = Tracker(uri, storage, experiment=experiment_name, echo=say)
        return _opened(experiment, root, storage, tracker, lease, records_only)
    except BaseException:
        lease.release()
        raise


def check_and_join(experiment: Experiment, networks: Experiment, shapes: Shapes, root: Storage) -> None:
    """Check networks and data, join Ray, and check what it has and that its nodes share the storage.

    Args:
        networks: its models are built; a sweep's are those of its trials.

    Raises:
        UserError: one of its kinds, naming what, where and what to do.
    """
    for line in train.check_models(networks, shapes):
        say(line)
    scaling, attacked = experiment.scaling, experiment.evaluation.test_images
    for line in open.check_source(experiment.data, trains=networks.trains, attacked=attacked, workers=scaling.workers):
        say(line)
    with stage("Ray"):
        cluster.connect()
    cluster.check_resources(scaling, scaling.wait_s)
    cluster.check_shared(root)


def _read_record(storage: Storage) -> dict[str, Any] | None:
    return records.read_record(storage, "run.json") if storage.exists("run.json") else None


def _opened(
    experiment: Experiment, root: Storage, storage: Storage, tracker: Tracker, lease: Lease, records_only: bool
) -> Run:
    for directory in ("", "report", "report/plots"):
        storage.delete_stale(directory, HALF_WRITTEN_S)
    record = _read_record(storage)
    if record is None:
        record = _new_record(experiment)
        say(f"new run at {storage.uri}")
    else:
        say(f"continuing {storage.uri}")
    run = Run(
        experiment=experiment,
        root=root,
        storage=storage,
        record=record,
        tracker=tracker,
        lease=lease,
    )
    if not records_only:
        run.record |= provenance.environment()
        run.save()
    return run


def _check_made(record: dict[str, Any], experiment: Experiment, storage: Storage, needs: str) -> None:
    """Refuse a stage whose predecessors have left nothing.

    Raises:
        UserError: naming the stage that is missing.
    """
    if "splits" not in (record.get("data") or {}):
        raise UserError(
            f"{storage.uri} has no shards yet: run `pyramids {experiment.name}` with the same settings first"
        )
    if needs == "models":
        made = {**record.get("models", {}), **record.get("diverged", {})}
        missing = [name for name in experiment.variants() if name not in made]
        if missing:
            raise UserError(
                f"{storage.uri} has no model {missing[0]!r} yet: run `train {experiment.name}` with the same settings first"
            )


def _new_record(experiment: Experiment) -> dict[str, Any]:
    return {
        "schema": records.SCHEMA,
        "name": experiment.name,
        "experiment": recorded(experiment),
        "created": _now(),
        "finished": None,
        "data": None,
        "models": {},
        "evaluations": [],
        "stages": {},
    }


def recorded(experiment: Experiment) -> dict[str, Any]:
    """Return an experiment as records hold it: without the user and password of its tracking server."""
    config: dict[str, Any] = redacted(to_dict(experiment))
    return {**config, "tracking_uri": config["tracking_uri"].replace("***@", "")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_trained(experiment: Experiment, shapes: Shapes, root: Storage, name: str) -> bool:
    """Whether a model of the experiment lies finished on the storage. Reads the source's files to hash them."""

    def address(split: base.Split, targets: pyramids.Targets) -> str:
        return pyramids.address_of(experiment.data, experiment.pyramids, split, targets=targets)

    data = jobs.TrainingData(
        train={targets: address("train", targets) for targets in _kinds_of_targets(experiment)},
        bare=address("train", "none"),
        validation=address("validation", "none") if experiment.data.validation_fraction else "",
    )
    (job,) = (job for job in train.jobs_of(experiment, shapes, data, root) if job.name == name)
    return (root / job.address).exists("model.json")


def make_pyramids(run: Run) -> Sets:
    """Stage 1: shard sets of every split; of the training images one for each kind of targets that a model has."""
    e = run.experiment
    addresses: dict[str, str] = {}
    with run.timed("pyramids"):
        for split in run.splits:
            for targets in _kinds_of_targets(e) if split == "train" else ("none",):
                title = f"pyramids: {split}" + (f", {targets} targets" if targets != "none" else "")
                with stage(title) as bar:
                    made = pyramids.build(
                        e.data,
                        e.pyramids,
                        run.root,
                        split,
                        targets=targets,
                        progress=lambda done, total, b=bar: b.update(done, total, "images"),
                    )
                    made.verify()
                addresses[f"train/{targets}" if split == "train" else split] = made.address
                rows = {**(run.record["data"] or {}).get("rows", {}), split: made.num_rows}
                run.record["data"] = {**(run.record["data"] or {}), "rows": rows}
    bare = pyramids.address_of(e.data, e.pyramids, "train", targets="none") if e.trains else ""
    run.record["data"] |= {
        "source": e.data.source,
        "hash": content_hash(bare, addresses["test"]),
        "bare": bare,
        "splits": addresses,
        "levels": list(run.shapes.sizes),
    }
    run.save()
    return existing_pyramids(run, verified=True)


def _kinds_of_targets(experiment: Experiment) -> tuple[pyramids.Targets, ...]:
    kinds = dict.fromkeys(c.targets for c in experiment.variants().values() if stored_levels(c))
    return tuple(kinds) or ("none",)


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The shard sets of a run: where training data are, and the test images."""

    training: jobs.TrainingData
    test: shards.ShardSet


def existing_pyramids(run: Run, *, verified: bool = False) -> Sets:
    """Return the shard sets that an earlier ``pyramids`` made.

    Raises:
        DataError: one is missing or damaged.
    """
    data = run.record["data"]
    sets = {name: shards.load(run.root, address) for name, address in data["splits"].items()}
    if not verified:
        for shard_set in sets.values():
            shard_set.verify()
    kinds = {name.partition("/")[2]: one.address for name, one in sets.items() if name.startswith("train/")}
    validation = sets["validation"].address if "validation" in sets else ""
    return Sets(training=jobs.TrainingData(train=kinds, bare=data["bare"], validation=validation), test=sets["test"])


def train_models(run: Run, sets: Sets) -> list[plan.Model]:
    """Stage 2: every model of the experiment; as many side by side as there is room for."""
    run.publish()
    for name, config in run.experiment.variants().items():
        for note in libraries.notes(config.arch, config.pretrained, config.normalize_mean):
            say(f"  {name}: {note}")
    with run.timed("train"), stage(results.model_stage(run.experiment)) as bar:
        models = train.train(run.experiment, run.shapes, sets.training, run.root, _TrainProgress(run, bar))
    run.record["diverged"] = {name: model["diverged"] for name, model in models.items() if "diverged" in model}
    for name, step in run.record["diverged"].items():
        say(f"  {name}: diverged at step {step}; the run goes on without it (allow_diverged)")
    run.save()
    return _as_subjects(run.experiment, {name: model for name, model in models.items() if "diverged" not in model})


class _TrainProgress(monitor.Progress):
    """Keeps the run's record and MLflow up to date while models train."""

    def __init__(self, run: Run, bar: Bar) -> None:
        self.run, self.bar = run, bar
        self.on_live = bar.update

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        if resumed := record.get("resumed"):
            since = f"from {resumed['from']}" if resumed["from"] else "from the beginning"
            say(f"  {name}: damaged: {', '.join(resumed['damaged'])}; training went on {since}")
        tracker = self.run.tracker
        mlflow_run.start_model(tracker, self.run.record, name, record["steps"][0]["time"])
        if not tracker.is_behind:  # else it is read from its file when the model is finished
            tracker.history(f"model/{name}", record["epoch"], lambda: record)

    def on_given(self, name: str, without: str) -> None:
        if any(AttackSpec.parse(a).name == "adaptive" for a in self.run.experiment.evaluation.attacks):
            say(f"  {name}: the adaptive attack cannot run, it needs the model's auto-encoder: {without}")

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
        run.save()
        run.publish()
        accuracy = model["validation"].get("accuracy")
        held_out = "" if accuracy is None else f", validation accuracy {100 * accuracy:.1f} %"
        done, total = len(run.record["models"]), len(run.experiment.variants())
        speed = f"{model['images_per_second']:.0f} images/s" if model["seconds"] else "taken as it is"
        say(f"  {results.model_stage(run.experiment)} {done}/{total}: {name}: {speed}{held_out}")


def trained_models(run: Run) -> list[plan.Model]:
    """Return the models that an earlier ``train`` made."""
    models = {}
    for name in run.experiment.variants():
        if name in run.record.get("diverged", {}):
            continue
        path = run.record["models"][name]["path"]
        models[name] = {**(run.root / path).read_json("model.json"), "path": path}
    return _as_subjects(run.experiment, models)


def _as_subjects(experiment: Experiment, models: dict[str, dict[str, Any]]) -> list[plan.Model]:
    """Models as attacks see them: a reformer stands in front of the undefended classifier of its architecture."""
    found: dict[str, plan.Model] = {}
    reformers = {name for name, model in models.items() if "reformer.safetensors" in model["files"]}
    for name in sorted(models, key=lambda n: n in reformers):  # classifiers first
        model = models[name]
        behind = found.get(experiment.source_of(name) or "") if name in reformers else None
        if name in reformers and behind is None:  # its classifier diverged
            continue
        file = "reformer.safetensors" if name in reformers else "classifier.safetensors"
        found[name] = plan.Model(
            name=name,
            path=model["path"],
            sha256=model["files"][file],
            autoencoder=model["files"].get("autoencoder.safetensors", ""),
            classifier=behind,
        )
    return [found[name] for name in models if name in found]


def attack_models(run: Run, models: list[plan.Model], test: shards.ShardSet) -> None:
    """Stage 3: every model under every threat model; what that says together; then a few images for the plots."""
    with run.timed("attack"), stage("attack") as bar:
        evaluations = attack.attack(models, test, run.experiment, run.root, progress=bar.update)
        run.record["evaluations"] = evaluations
        run.save()
        names = [m.name for m in models]
        judgements = worst_case.EvaluationRecords(run.root, evaluations, run.experiment.evaluation.chunk_size)
        run.record["worst_case"] = worst_case.worst_cases(names, run.experiment, judgements)
        pairs = roles.pairs(run.record, roles_of(run.record))
        run.record["worst_case_pairs"] = worst_case.paired_worst_cases(pairs, run.experiment, judgements)
        run.record["reliability"] = reliability.reliability(
            models, test, run.experiment, run.root, judgements, progress=bar.update
        )
        gallery.make(test, models, evaluations, run.experiment, run.storage, run.root, progress=bar.update)
    run.save()
    run.publish()


def make_report(run: Run) -> None:
    """Stage 4: table, plots and HTML from the records alone."""
    with run.timed("report"), stage("report"):
        report.build(run.storage, run.root)


def register(run: Run, models: list[plan.Model]) -> None:
    """Register each classifier in MLflow's model registry, with its signature; of several seeds the first."""
    data = run.experiment.data
    replicates = run.experiment.replicates()
    for model in models:
        if replicates[model.name][1] > 0:
            continue
        if model.classifier is not None:  # a reformer alone is no classifier; what stands behind it is registered
            continue
        with run.tracker.excused(f"registration of {model.name}"):
            run.tracker.register_model(
                f"model/{model.name}",
                exports.load_classifier(run.root.join(model.path), sha256=model.sha256),
                _example(data.channels, data.image_size),
                f"{run.experiment.name}-{replicates[model.name][0]}",
                metadata={"path": f"{run.root.uri}/{model.path}", "sha256": model.sha256},
            )


def _example(channels: int, size: int) -> Any:
    import numpy as np

    return np.zeros((1, channels, size, size), np.float32)


def finish_stage(run: Run) -> None:
    """Publish what one stage left; the next one goes on with the same MLflow run."""
    run.publish()
    run.tracker.finish("run")
    run.tracker.conclude()


def finish(run: Run) -> None:
    """Publish what is left, then show the table and where to look."""
    run.publish()
    run.tracker.conclude()
    terminal.print_table(run.storage)
    say(f"report: {run.storage.uri}/report/report.html")
    say(f"MLflow: {uri.ui_command(run.tracker.uri, run.tracker.experiment_id, run.tracker.run_id())}")


def execute(command: str, experiment: Experiment, *, needs_tracking: bool = True) -> None:
    """Run one stage, or all of them (``run``). ``needs_tracking``: see :func:`open_run`."""
    needs: dict[str, Literal["shards", "models"]] = {"train": "shards", "attack": "models"}
    run = open_run(
        experiment,
        records_only=command == "report",
        needs=needs.get(command, ""),
        will_train=command in ("run", "train"),
        needs_tracking=needs_tracking,
    )
    mlflow_run.start_run(run.tracker, run.record)
    complete = False
    try:
        if command == "report":
            make_report(run)
            complete = True
            finish(run)
            return
        if command in ("run", "pyramids"):
            sets = make_pyramids(run)
            if command == "pyramids":
                finish_stage(run)
                return
        else:
            sets = existing_pyramids(run)
        models = train_models(run, sets) if command in ("run", "train") else trained_models(run)
        if command == "train":
            register(run, models)
            finish_stage(run)
            return
        attack_models(run, models, sets.test)
        if command == "run":
            register(run, models)
        run.record["finished"] = _now()
        run.save()
        make_report(run)
        complete = True
        finish(run)
    except BaseException as e:
        # a report that cannot be written spoils no result
        complete = complete or (isinstance(e, Exception) and bool(run.record["finished"]))
        run.tracker.stop_for(e, complete=complete)
        say(f"stopped; all that was computed is kept at {run.root.uri}: the same command continues")
        raise
    finally:
        if run.lease is not None:
            run.lease.release()
