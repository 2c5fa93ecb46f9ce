"""A sweep's directory: its address and its record."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

from components.config import Experiment, TrainConfig
from components.errors import UserError
from components.fields import content_hash, to_dict
from components.search_space import Point, Space
from pipeline import run_directory
from pipeline.records import SCHEMA
from pipeline.reporting import records
from pipeline.runtime import provenance
from pipeline.runtime.console import say
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage
from pipeline.sweep.final_experiment import final_experiment
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.preflight import preflight_experiment, varied_model
from pipeline.sweep.report import mlflow_sweep
from pipeline.sweep.space_file import load_space
from pipeline.tracking import server, tracker
from pipeline.training import gpu_memory


@dataclass
class Sweep(run_directory.Run):
    """A sweep on its storage. ``record`` is sweep.json; ``experiment`` the recipe as the command line left it."""

    space: Space
    options: SweepOptions
    model: str
    """Name, in the recipe, of the model that is varied."""
    base: TrainConfig
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Guards the record, which the driver's threads share."""

    def save(self) -> None:
        with self.lock:
            if self.lease is not None:
                self.lease.check()
            self.storage.write_json("sweep.json", self.record)

    def publish(self) -> None:
        with self.lock:
            record = copy.deepcopy(self.record)
        # not under the lock: what is read from storage must not hold up the trials
        with self.tracker.excused("records"):
            mlflow_sweep.publish_sweep(self.tracker, record, self.storage, self.root)

    def final(self, point: Point) -> Experiment:
        """:func:`final_experiment`, as the options ask for it."""
        return final_experiment(
            self.experiment, self.model, point, "recipe" if self.options.evaluate == "recipe" else "full"
        )

    @property
    def trials(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.record["trials"]
        return found


def sweep_address(experiment: Experiment, name: str, space: Space, seed: int) -> str:
    """``sweeps/<recipe>-<space>-<hash>``. How many trials there are is not part of it: more of them go on with the same sweep."""
    said = {k: v for k, v in space.to_dict().items() if k != "trials"}
    return f"sweeps/{experiment.name}-{name}-{content_hash(run_directory.run_address(experiment), said, seed)}"


def open_sweep(experiment: Experiment, options: SweepOptions) -> tuple[Sweep, Experiment]:
    """Check all that can be checked before compute is spent, join Ray, and open the sweep's record.

    Returns:
        The sweep, which is this process's from then on, and an experiment with a model for each trial (:func:`preflight_experiment`).

    Raises:
        UserError: one of its kinds, naming what, where and what to do.
    """
    name, space = load_space(options)
    model, base = varied_model(experiment, space)
    probed = preflight_experiment(experiment, space, base, options.seed)
    root = Storage(experiment.storage)
    root.check_writable()
    storage = root / sweep_address(experiment, name, space, options.seed)
    if options.resume and not storage.exists("sweep.json"):
        raise UserError(
            f"there is no sweep at {storage.uri} to go on with: leave out --resume, or give the settings that it has"
        )
    Lease(storage).check_free()
    uri, experiment_name = server.choose(
        experiment.tracking_uri,
        experiment.experiment_name,
        root,
        required=not storage.exists("sweep.json"),
        echo=say,
    )
    sweep = Sweep(
        experiment=experiment,
        root=root,
        storage=storage,
        record={},
        tracker=tracker.Tracker(uri, storage, experiment=experiment_name, echo=say),
        space=space,
        options=options,
        model=model,
        base=base,
    )
    for point in space.points(options.seed) or [{}]:
        sweep.final(point)
    run_directory.check_and_join(experiment, probed, sweep.shapes, root, uri)
    gpu_memory.check_gpu_memory(probed, sweep.shapes)
    sweep.lease = Lease(storage).acquire()  # before its record is read
    try:
        _open_record(sweep, name)
    except BaseException:
        sweep.lease.release()
        raise
    return sweep, probed


def _open_record(sweep: Sweep, space_name: str) -> None:
    storage, experiment = sweep.storage, sweep.experiment
    record = records.read_record(storage, "sweep.json") if storage.exists("sweep.json") else None
    say(f"{'continuing' if record else 'new sweep at'} {storage.uri}")
    if record is not None:
        sweep.record = record
    else:
        sweep.record = {
            "schema": SCHEMA,
            "name": experiment.name,
            "space_name": space_name,
            "seed": sweep.options.seed,
            "model": sweep.model,
            "base": to_dict(sweep.base),
            "experiment": run_directory.recorded(experiment),
            "created": run_directory.now(),
            "data": None,
            "trials": [],
            "references": {},
            "front": [],
            "choice": None,
            "evaluation": None,
            "stages": {},
        }
    sweep.record.setdefault("earlier_evaluations", [])
    sweep.record |= {"space": sweep.space.to_dict(), "finished": None, **provenance.environment()}
    sweep.save()
