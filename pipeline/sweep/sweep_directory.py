"""A sweep's directory: its address and its record."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from components.config import Experiment, TrainConfig
from components.errors import UserError
from components.fields import content_hash, to_dict
from components.search_space import Point, Space
from pipeline import run_directory
from pipeline.records import SCHEMA, run_address
from pipeline.reporting import records
from pipeline.runtime import provenance
from pipeline.runtime.console import say
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import StoredRecord, now
from pipeline.sweep.final_experiment import final_experiment
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.preflight import preflight_experiment, varied_model
from pipeline.sweep.report import mlflow_sweep
from pipeline.sweep.space_file import load_space
from pipeline.sweep.trials.entry import TrialEntry, trials_of
from pipeline.sweep.trials.states import PENDING
from pipeline.tracking import server
from pipeline.tracking.tracker import Tracker
from pipeline.training import gpu_memory


@dataclass
class Sweep:
    """A sweep on its storage. Make it with :func:`open_sweep`."""

    experiment: Experiment
    """The recipe with the overrides of the command line."""
    root: Storage
    stored: StoredRecord
    """sweep.json in sweeps/<recipe>-<space>-<hash> below root."""
    tracker: Tracker
    space: Space
    options: SweepOptions
    model: str
    """Name of the recipe's model that the trials vary."""
    base: TrainConfig
    """Config of that model."""

    @property
    def record(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return self.stored.content

    @property
    def storage(self) -> Storage:
        """The sweep's directory."""
        return self.stored.storage

    @property
    def trials(self) -> list[TrialEntry]:
        """The trials that the record has by now."""
        return trials_of(self.record)

    def trial(self, number: int) -> TrialEntry:
        """Return the entry of a trial; numbers count from 1."""
        return TrialEntry.from_json(self.record["trials"][number - 1])

    def put(self, *trials: TrialEntry) -> None:
        """Put trials into the record, each in the place of its number or behind the last one."""
        with self.stored.lock:
            for trial in trials:
                self.record["trials"][trial.number - 1 : trial.number] = [trial.to_json()]

    def forget_pending(self, beyond: int) -> None:
        """Remove the last trials of the record that never ran, down to the number ``beyond``."""
        trials = self.record["trials"]
        with self.stored.lock:
            while len(trials) > beyond and trials[-1]["state"] == PENDING:
                trials.pop()

    def publish(self, *, report_follows: bool = False) -> None:
        """Publish what the record holds by now to MLflow; see :func:`mlflow_sweep.publish_sweep`."""
        with self.stored.lock:
            record = copy.deepcopy(self.record)
        # Publishing reads from the storage: outside the lock it does not hold up the trials.
        with self.tracker.excused("records"):
            mlflow_sweep.publish_sweep(
                self.tracker,
                record,
                self.storage,
                self.root,
                register=self.experiment.register,
                report_follows=report_follows,
            )

    def final(self, point: Point) -> Experiment:
        """Return the experiment that tests a point on test images as the options say."""
        return final_experiment(
            self.experiment, self.model, point, "recipe" if self.options.evaluate == "recipe" else "full"
        )


def sweep_address(experiment: Experiment, space_name: str, space: Space, seed: int) -> str:
    """Return ``sweeps/<recipe>-<space>-<hash>``.

    The number of trials is not part of it: with more trials the same sweep goes on.
    """
    settings = {k: v for k, v in space.to_dict().items() if k != "trials"}
    return f"sweeps/{experiment.name}-{space_name}-{content_hash(run_address(experiment), settings, seed)}"


def open_sweep(experiment: Experiment, options: SweepOptions) -> tuple[Sweep, Experiment]:
    """Check all that can be checked before compute is spent, join Ray, and open the sweep's record.

    Returns:
        The sweep, which this process holds from then on, and an experiment with a model for each
        trial (:func:`preflight_experiment`).
    """
    space_name, space = load_space(options)
    model, base = varied_model(experiment, space)
    preflight = preflight_experiment(experiment, space, base, options.seed)
    root = Storage(experiment.storage)
    root.check_writable()
    storage = root / sweep_address(experiment, space_name, space, options.seed)
    if options.resume and not storage.exists("sweep.json"):
        raise UserError(
            f"there is no sweep at {storage.uri} to go on with: leave out --resume, or give the settings that it has"
        )
    Lease(storage).check_free()
    uri, experiment_name = server.choose(
        experiment.tracking_uri, experiment.experiment_name, root, required=not storage.exists("sweep.json"), echo=say
    )
    sweep = Sweep(
        experiment=experiment,
        root=root,
        stored=StoredRecord(storage, "sweep.json", {}),
        tracker=Tracker(uri, storage, experiment=experiment_name, echo=say),
        space=space,
        options=options,
        model=model,
        base=base,
    )
    for point in space.points(options.seed) or [{}]:
        sweep.final(point)
    shapes = run_directory.shapes_of(experiment)
    run_directory.check_and_join(experiment, preflight, shapes, root, uri)
    gpu_memory.check_gpu_memory(preflight, shapes)
    sweep.stored.lease = Lease(storage).acquire()  # before the record is read
    try:
        sweep.stored.content = _read_record(storage) or _new_record(sweep, space_name)
        sweep.record.setdefault("earlier_evaluations", [])
        sweep.stored.content |= {"space": space.to_dict(), "finished": None, **provenance.environment()}
        sweep.stored.save()
        storage.write_bytes("requirements.txt", provenance.requirements().encode())
    except BaseException:
        sweep.stored.release()
        raise
    return sweep, preflight


def _read_record(storage: Storage) -> dict[str, Any] | None:
    record = records.read_record(storage, "sweep.json")
    say(f"{'continuing' if record else 'new sweep at'} {storage.uri}")
    return record


def _new_record(sweep: Sweep, space_name: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": sweep.experiment.name,
        "space_name": space_name,
        "seed": sweep.options.seed,
        "model": sweep.model,
        "base": to_dict(sweep.base),
        "experiment": run_directory.recorded(sweep.experiment),
        "created": now(),
        "data": None,
        "trials": [],
        "references": {},
        "front": [],
        "choice": None,
        "evaluation": None,
        "stages": {},
    }
