"""A run's directory: its address, its record, and the checks before compute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from components.config import Experiment, level_sizes
from components.config.data import Shapes
from components.config.train import stored_levels
from components.errors import FEW_NAMES, ConfigError, UserError
from components.fields import from_dict, to_dict
from pipeline.data import pyramids
from pipeline.data.shard_plan import Targets
from pipeline.data.sources import base
from pipeline.data.sources.open import check_source, refuse_memory
from pipeline.program import program
from pipeline.records import SCHEMA, drop_unreadable, run_address
from pipeline.reporting import records
from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime import cluster, provenance
from pipeline.runtime.console import say, stage
from pipeline.runtime.lease import Lease
from pipeline.runtime.redaction import redacted
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage
from pipeline.runtime.stored_record import StoredRecord, now
from pipeline.tracking import server
from pipeline.tracking.tracker import Tracker
from pipeline.training import exports, gpu_memory, jobs, train


@dataclass
class Run:
    """One experiment on its storage, as :func:`open_run` makes it."""

    experiment: Experiment
    root: Storage
    stored: StoredRecord
    """run.json in ``runs/<recipe>-<hash>`` below root."""
    tracker: Tracker

    @property
    def record(self) -> dict[str, Any]:
        """Content of run.json."""
        return self.stored.content

    @property
    def storage(self) -> Storage:
        """Directory of the run."""
        return self.stored.storage

    def publish(self, *, attacks_follow: bool = False, report_follows: bool = False) -> None:
        """Publish the records in MLflow; an outage does not stop the run."""
        with self.tracker.excused("records"):
            mlflow_run.publish_run(
                self.tracker,
                self.storage,
                self.root,
                register=self.experiment.register,
                attacks_follow=attacks_follow,
                report_follows=attacks_follow or report_follows,
            )


def shapes_of(experiment: Experiment) -> Shapes:
    """Return the shapes of an experiment's data."""
    data = experiment.data
    return Shapes(
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        sizes=level_sizes(data.image_size, experiment.pyramids.levels),
    )


def splits_of(experiment: Experiment) -> tuple[base.Split, ...]:
    """Return the splits whose shards an experiment needs."""
    if not experiment.trains:
        return ("test",)
    held_out: tuple[base.Split, ...] = ("validation",) if experiment.data.validation_fraction else ()
    return ("train", *held_out, "test")


def open_run(
    experiment: Experiment,
    *,
    records_only: bool = False,
    needs: Literal["", "shards", "models"] = "",
    will_train: bool = False,
    needs_tracking: bool = True,
) -> Run:
    """Check what can be checked before compute is spent, join Ray, and open the record.

    Args:
        records_only: the command needs no sources, networks or cluster (the report).
        needs: what an earlier stage must have made: shards, or shards and models.
        will_train: the models that are not trained yet must fit the GPUs.
        needs_tracking: refuse a new run if MLflow does not answer. It is False within a sweep,
            whose compute is already spent. A run with a record continues in any case: the Tracker
            reports the outage and publishes once MLflow answers.

    Raises:
        UserError: of the kind that fits; the message names what, where and what to do.
    """
    if cluster.in_job() and experiment.storage.startswith("~"):
        say(f"storage {experiment.storage} is in the home directory of the node that runs this job")
    exports.trust(config.arch for config in experiment.model_configs().values())
    root = Storage(experiment.storage)
    storage = root / run_address(experiment)
    record = records.read_record(storage, "run.json")
    # A command that needs an earlier one must not create the storage that it does not find.
    if records_only and record is None:
        raise UserError(
            f"there are no records at {storage.uri}: run the other stages with the same settings first, or "
            f"name the storage that has them by --storage. {_runs_of(root, experiment.name)}"
        )
    if needs:
        _check_made(record or {}, experiment, storage, needs)
    root.check_writable()
    Lease(storage).check_free()
    uri, experiment_name = server.choose(
        experiment.tracking_uri,
        experiment.experiment_name,
        root,
        required=needs_tracking and record is None,
        echo=say,
    )
    if not records_only:
        shapes = shapes_of(experiment)
        check_and_join(experiment, experiment, shapes, root, uri)
        if will_train:
            gpu_memory.check_gpu_memory(experiment, shapes, lambda: finished_model_names(experiment, shapes, root, uri))
    # Before the record is read, since another process may still write it.
    lease = Lease(storage).acquire()
    try:
        tracker = Tracker(uri, storage, experiment=experiment_name, echo=say)
        return _opened(experiment, root, storage, tracker, lease, records_only)
    except BaseException:
        lease.release()
        raise


def check_and_join(
    experiment: Experiment, networks: Experiment, shapes: Shapes, root: Storage, tracking_uri: str
) -> None:
    """Check networks and data, join Ray, and check its resources and the nodes' shared storage.

    Args:
        networks: experiment whose models are built; for a sweep, those of its trials.
        tracking_uri: MLflow server of mlflow:... weights.

    Raises:
        UserError: of the kind that fits; the message names what, where and what to do.
    """
    refuse_memory(experiment.data)  # Its networks were in memory, too.
    for line in train.check_models(networks, shapes, tracking_uri):
        say(line)
    scaling, attacked = experiment.scaling, experiment.evaluation.test_images
    for line in check_source(experiment.data, trains=networks.trains, attacked=attacked, workers=scaling.workers):
        say(line)
    with stage("Ray"):
        cluster.connect()
    cluster.check_resources(scaling, scaling.wait_s)
    cluster.check_shared(root)


def _opened(
    experiment: Experiment, root: Storage, storage: Storage, tracker: Tracker, lease: Lease, records_only: bool
) -> Run:
    for directory in ("", "report", "report/plots"):
        storage.delete_stale(directory, HALF_WRITTEN_S)
    record = records.read_record(storage, "run.json")
    if record is None:
        record = new_record(experiment)
        say(f"new run at {storage.uri}")
    else:
        say(f"continuing {storage.uri}")
        if not records_only:
            record["experiment"] = _readable_experiment(record, experiment)
            if damaged := drop_unreadable(record):
                say(f"  {', '.join(damaged)} of run.json cannot be read: they are written anew")
                record = new_record(experiment) | record
    stored = StoredRecord(storage, "run.json", record, lease)
    if not records_only:
        stored.content |= provenance.environment()
        stored.save()
        storage.write_bytes("requirements.txt", provenance.requirements().encode())
    return Run(experiment=experiment, root=root, stored=stored, tracker=tracker)


def _readable_experiment(record: dict[str, Any], experiment: Experiment) -> Any:
    """Return the record's experiment, or this command's if a version with other fields wrote it.

    Both have the same address, so they differ at most in where and how the run is computed.
    """
    try:
        from_dict(Experiment, record.get("experiment"))
    except ConfigError:
        return recorded(experiment)
    return record["experiment"]


def _runs_of(root: Storage, recipe: str) -> str:
    """Return a sentence with the runs of a storage, those of a recipe first."""
    names = [name for name in root.list("runs") if (root / f"runs/{name}").exists("run.json")]
    names.sort(key=lambda name: not name.startswith(f"{recipe}-"))
    if not names:
        return f"{root.uri} has no run"
    shown = ", ".join(names[:FEW_NAMES]) + (f" and {len(names) - FEW_NAMES} more" if len(names) > FEW_NAMES else "")
    return f"It has the runs {shown}; `{program()} report --from {root.uri}/runs/NAME/run.json` reports one of them"


def _check_made(record: dict[str, Any], experiment: Experiment, storage: Storage, needs: str) -> None:
    """Refuse a stage whose predecessors have not run.

    Raises:
        UserError: a stage is missing; the message names it.
    """
    if "splits" not in (record.get("data") or {}):
        raise UserError(
            f"{storage.uri} has no shards yet: "
            f"first run `{program()} pyramids {experiment.name}` with the same settings"
        )
    if needs == "models":
        made = {**record.get("models", {}), **record.get("diverged", {})}
        missing = [name for name in experiment.model_configs() if name not in made]
        if missing:
            raise UserError(
                f"{storage.uri} has no model {missing[0]!r} yet: "
                f"first run `{program()} train {experiment.name}` with the same settings"
            )


def new_record(experiment: Experiment) -> dict[str, Any]:
    """Return the run.json of a run that has computed nothing yet (docs/records.md)."""
    return {
        "schema": SCHEMA,
        "name": experiment.name,
        "experiment": recorded(experiment),
        "created": now(),
        "finished": None,
        "data": None,
        "models": {},
        "evaluations": [],
        "stages": {},
    }


def recorded(experiment: Experiment) -> dict[str, Any]:
    """Return an experiment as records hold it, without user and password of the tracking server."""
    config: dict[str, Any] = redacted(to_dict(experiment))
    return {**config, "tracking_uri": config["tracking_uri"].replace("***@", "")}


def finished_model_names(experiment: Experiment, shapes: Shapes, root: Storage, tracking_uri: str) -> set[str]:
    """Return the names of the experiment's models that are finished on the storage.

    It reads the source's files to hash them.
    """

    def address(split: base.Split, targets: Targets) -> str:
        return pyramids.address_of(experiment.data, experiment.pyramids, split, targets=targets)

    data = jobs.TrainingData(
        train={targets: address("train", targets) for targets in kinds_of_targets(experiment)},
        without_levels=address("train", "none"),
        validation=address("validation", "none") if experiment.data.validation_fraction else "",
    )
    prepared = train.prepare_jobs(experiment, shapes, data, root, tracking_uri)
    return {job.name for job in prepared if (root / job.address).exists("model.json")}


def kinds_of_targets(experiment: Experiment) -> tuple[Targets, ...]:
    """Return the kinds of targets that models read from shards; ("none",) if there are none."""
    kinds = dict.fromkeys(c.targets for c in experiment.model_configs().values() if stored_levels(c))
    return tuple(kinds) or ("none",)
