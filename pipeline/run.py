"""A run from end to end: the stages in their order, its record on storage after each, MLflow published from the record.

Every stage is named by the hash of what it follows from, so a stage that is done is taken as it is, and a run that was
stopped at any point goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.config import Experiment, content_hash, level_sizes, to_dict
from components.errors import UserError
from pipeline import attack, cluster, environment, gallery, publish, pyramids, report, shards, sources, tracking, train
from pipeline.progress import Bar, say, stage
from pipeline.storage import Storage
from pipeline.train_step import Shapes

SCHEMA = 1
STAGES = ("pyramids", "train", "attack", "report")


@dataclass
class Run:
    """One experiment on its storage. Make it with :func:`open_run`."""

    experiment: Experiment
    root: Storage
    storage: Storage
    """runs/<recipe>-<hash> below root."""
    record: dict[str, Any]
    tracker: tracking.Tracker

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
    def splits(self) -> tuple[sources.Split, ...]:
        held_out: tuple[sources.Split, ...] = ("validation",) if self.experiment.data.validation_fraction else ()
        return ("train", *held_out, "test")

    def save(self) -> None:
        self.storage.write_json("run.json", self.record)

    def publish(self) -> None:
        publish.publish_run(self.tracker, self.storage, self.root)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a stage to the record; a stage that is continued counts on."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.record["stages"][name] = self.record["stages"].get(name, 0.0) + time.monotonic() - begin
            self.save()


def run_address(experiment: Experiment) -> str:
    """``runs/<recipe>-<hash>``: where a run is kept and who tracks it are no part of what it is."""
    config = to_dict(experiment)
    for field in ("storage", "tracking_uri", "description"):
        del config[field]
    # what the machine may use does not change the run either, but for the number of workers
    config["scaling"] = {"workers": config["scaling"]["workers"]}
    return f"runs/{experiment.name}-{content_hash(config)}"


def open_run(experiment: Experiment, *, records_only: bool = False) -> Run:
    """Check all that can be checked before compute is spent, join Ray, and open the run's record.

    Args:
        records_only: no sources, networks or cluster are needed (the report).

    Raises:
        UserError: one of its kinds, naming what, where and what to do.
    """
    if cluster.in_job() and experiment.storage.startswith("~"):
        say(f"storage {experiment.storage} is in the home directory of the node that runs this job")
    root = Storage(experiment.storage)
    root.check_writable()
    uri = experiment.tracking_uri or tracking.default_uri(root)
    tracking.check_reachable(uri)
    storage = root / run_address(experiment)
    if not records_only:
        shapes = Shapes(
            image_size=experiment.data.image_size,
            channels=experiment.data.channels,
            num_classes=experiment.data.num_classes,
            sizes=level_sizes(experiment.data.image_size, experiment.pyramids.levels),
        )
        train.check_models(experiment, shapes)
        sources.check_source(experiment.data)
        with stage("Ray"):
            cluster.connect()
        cluster.check_resources(experiment.scaling, experiment.scaling.wait_s)
    if storage.exists("run.json"):
        record = storage.read_json("run.json")
        if record.get("schema") != SCHEMA:
            raise UserError(f"{storage.uri}/run.json has schema {record.get('schema')}, this version reads {SCHEMA}")
        say(f"continuing {storage.uri}")
    elif records_only:
        raise UserError(f"there are no records at {storage.uri}: run the other stages with the same settings first")
    else:
        record = _new_record(experiment)
        say(f"new run at {storage.uri}")
    run = Run(
        experiment=experiment,
        root=root,
        storage=storage,
        record=record,
        tracker=tracking.Tracker(uri, storage, echo=say),
    )
    if not records_only:
        run.record |= environment.environment()
        run.save()
    return run


def _new_record(experiment: Experiment) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": experiment.name,
        "experiment": to_dict(experiment),
        "created": _now(),
        "finished": None,
        "data": None,
        "models": {},
        "evaluations": [],
        "stages": {},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_pyramids(run: Run) -> dict[str, shards.ShardSet]:
    """Stage 1: shard sets of every split."""
    e = run.experiment
    sets = {}
    with run.timed("pyramids"):
        for split in run.splits:
            with stage(f"pyramids: {split}") as bar:
                sets[split] = pyramids.build(
                    e.data,
                    e.pyramids,
                    run.root,
                    split,
                    progress=lambda done, total, b=bar: b.update(done, total, "images"),
                )
                sets[split].verify()
    run.record["data"] = {
        "source": e.data.source,
        "hash": content_hash(*(sets[s].address for s in run.splits)),
        "rows": {s: sets[s].num_rows for s in run.splits},
        "splits": {s: sets[s].address for s in run.splits},
        "levels": list(run.shapes.sizes),
    }
    run.save()
    return sets


def existing_pyramids(run: Run) -> dict[str, shards.ShardSet]:
    """The shard sets that an earlier ``pyramids`` made.

    Raises:
        UserError: there are none.
    """
    if run.record["data"] is None:
        raise UserError(
            f"{run.storage.uri} has no shards yet: run `pyramids {run.experiment.name}` with the same settings first"
        )
    sets = {s: shards.load(run.root, a) for s, a in run.record["data"]["splits"].items()}
    for shard_set in sets.values():
        shard_set.verify()
    return sets


def train_models(run: Run, sets: dict[str, shards.ShardSet]) -> list[attack.Model]:
    """Stage 2: every model of the experiment; as many side by side as there is room for."""
    addresses = {s: one.address for s, one in sets.items() if s != "test"}
    run.publish()
    with run.timed("train"), stage("train") as bar:
        models = train.train(run.experiment, run.shapes, addresses, run.root, _TrainProgress(run, bar))
    return [_as_subject(name, model) for name, model in models.items()]


class _TrainProgress(train.Progress):
    """Keeps the run's record and MLflow up to date while models train."""

    def __init__(self, run: Run, bar: Bar) -> None:
        self.run, self.bar = run, bar
        self.on_live = bar.update

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        publish.start_model(self.run.tracker, self.run.record, name, record["steps"][0]["time"])
        self.run.tracker.history(f"model/{name}", record)

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
        say(f"  train {done}/{total}: {name}: {model['images_per_second']:.0f} images/s{held_out}")


def trained_models(run: Run) -> list[attack.Model]:
    """The models that an earlier ``train`` made.

    Raises:
        UserError: one of them is not there.
    """
    models = []
    for name in run.experiment.variants():
        if name not in run.record["models"]:
            raise UserError(
                f"{run.storage.uri} has no model {name!r} yet: run `train {run.experiment.name}` with the same settings first"
            )
        path = run.record["models"][name]["path"]
        models.append(_as_subject(name, {**(run.root / path).read_json("model.json"), "path": path}))
    return models


def _as_subject(name: str, model: dict[str, Any]) -> attack.Model:
    return attack.Model(name=name, path=model["path"], sha256=model["files"]["classifier.safetensors"])


def attack_models(run: Run, models: list[attack.Model], test: shards.ShardSet) -> None:
    """Stage 3: every model under every threat model; then a few images for the plots."""
    with run.timed("attack"), stage("attack") as bar:
        run.record["evaluations"] = attack.attack(models, test, run.experiment, run.root, progress=bar.update)
        gallery.make(test, models, run.record["evaluations"], run.experiment, run.storage, run.root)
    run.save()
    run.publish()


def make_report(run: Run) -> None:
    """Stage 4: table, plots and HTML from the records alone."""
    with run.timed("report"), stage("report"):
        report.build(run.storage, run.root)


def register(run: Run, models: list[attack.Model]) -> None:
    """Register each classifier in MLflow's model registry, with its signature."""
    from pipeline import checkpoints

    data = run.experiment.data
    for model in models:
        classifier = checkpoints.load_classifier(f"{run.root.uri}/{model.path}")
        example = _example(data.channels, data.image_size)
        run.tracker.register_model(
            f"model/{model.name}",
            classifier,
            example,
            f"{run.experiment.name}-{model.name}",
            metadata={"path": f"{run.root.uri}/{model.path}", "sha256": model.sha256},
        )


def _example(channels: int, size: int) -> Any:
    import numpy as np

    return np.zeros((1, channels, size, size), np.float32)


def finish_stage(run: Run) -> None:
    """Publish what one stage left; the next one goes on with the same MLflow run."""
    run.publish()
    run.tracker.finish("run")
    run.tracker.flush()


def finish(run: Run) -> None:
    """Publish what is left, then show the table and where to look."""
    run.publish()
    run.tracker.flush()
    report.print_table(run.storage)
    say(f"report: {run.storage.uri}/report/report.html")
    say(f"MLflow: {tracking.ui_command(run.tracker.uri, run.tracker.experiment_id, run.tracker.run_id())}")


def execute(command: str, experiment: Experiment) -> None:
    """Run one stage, or all of them (``run``)."""
    run = open_run(experiment, records_only=command == "report")
    publish.start_run(run.tracker, run.record)
    try:
        if command == "report":
            make_report(run)
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
        attack_models(run, models, sets["test"])
        if command == "run":
            register(run, models)
        run.record["finished"] = _now()
        run.save()
        make_report(run)
        finish(run)
    except BaseException as e:
        run.tracker.finish("run", "KILLED" if isinstance(e, KeyboardInterrupt) else "FAILED")
        run.tracker.flush()
        say(f"stopped; all that was computed is kept at {run.root.uri}: the same command continues")
        raise
