"""Tune's events, written into the sweep's record, table and MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import ray

from components.errors import ConfigError, UserError
from pipeline import run_directory
from pipeline.runtime.console import say
from pipeline.runtime.polling import polling
from pipeline.runtime.storage import StorageError
from pipeline.sweep.report import summary
from pipeline.sweep.report.live_table import TrialTable
from pipeline.sweep.trials.plan import SweepPlan
from pipeline.sweep.trials.states import DIVERGED, ENDED, FAILED, FINISHED, RUNNING
from pipeline.sweep.trials.trial import TrialProgress, new_entry
from pipeline.training.jobs import TrainingJob

if TYPE_CHECKING:
    from pipeline.sweep.sweep_directory import Sweep

TRIAL_DEATHS = 3
"""How often a trial's own process is started again."""
LOOK_S = 1.0


class SweepMonitor:
    """Keeps record, terminal and MLflow up to date while Tune runs."""

    def __init__(self, sweep: Sweep, plan: SweepPlan, queue: Any, references: Sequence[TrainingJob]) -> None:
        self.sweep, self.plan, self.queue = sweep, plan, queue
        self.references = {job.name: (job, TrialProgress([job], plan.objective, sweep.root)) for job in references}
        self.measured: dict[str, dict[str, Any]] = {job.name: {"path": job.address} for job in references}
        self.entries: dict[str, dict[str, Any]] = {}
        """Tune's trial id -> entry of the record."""
        self.begun: dict[str, float] = {}
        self.error: UserError | None = None
        """What the sweep ends with at once, if anything."""
        self.failure: Exception | None = None
        """What ended the thread that looks, if anything did."""
        self.live: dict[int, str] = {}
        """Trial number -> how far its models are."""
        self.total = sweep.space.count if sweep.space.search == "tpe" else len(sweep.trials)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # Tune writes its callbacks down for a restore of its own, which this does not use

    def fail(self, error: UserError) -> None:
        """End the sweep with this. What runs is left as it is, for the next command."""
        self.error = self.error or error

    def start(self, trial_id: str, config: Mapping[str, Any]) -> None:
        if trial_id in self.entries:  # its process died
            return
        with self.sweep.lock:
            entry = self._entry_of(config)
            models = []
            with suppress(ConfigError):  # which its process reports, as any trial's end
                for job in self.plan.jobs(entry["parameters"]):
                    models.append({"seed": job.config.seed, "path": job.address})
            # of the same models, what is known stays known: it goes on there
            epochs = entry["epochs"] if entry["models"] == models else []
            entry.update(state=RUNNING, reason="", epochs=epochs, started=run_directory.now(), models=models)
            self.entries[trial_id], self.begun[trial_id] = entry, time.monotonic()
            self.sweep.save()

    def _entry_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        trials = self.sweep.trials
        if "listed" in config:
            found: dict[str, Any] = trials[config["listed"]["number"] - 1]
            return found
        taken = [id(e) for e in self.entries.values()]
        for entry in trials:
            if entry["state"] not in ENDED and entry["parameters"] == config and id(entry) not in taken:
                return entry
        trials.append(new_entry(len(trials) + 1, dict(config)))
        return trials[-1]

    def result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        with self.sweep.lock:
            entry = self.entries[trial_id]
            if result["state"] in (RUNNING, FINISHED):
                known = [e for e in entry["epochs"] if e["epoch"] >= result["epoch"]]  # by a trial started again
                if not known:
                    entry["epochs"].append({k: result[k] for k in ("epoch", "clean", "robust", "each", "n")})
                elif result["state"] == RUNNING:
                    return
            if result["state"] != RUNNING:
                entry.update(state=result["state"], reason=result.get("reason", ""))
            entry.update({k: result[k] for k in ("training_seconds", "objective_seconds")})
            entry["seconds"] = time.monotonic() - self.begun[trial_id]
            self.sweep.save()

    def is_whole(self, trial_id: str) -> bool:
        """Whether all models of a trial are exported, and measured after their last epoch."""
        last = self.plan.objective.file(self.plan.base.epochs - 1)
        homes = [self.sweep.root / model["path"] for model in self.entries[trial_id]["models"]]
        return all(home.exists("model.json") and home.exists(last) for home in homes)

    def end(self, trial_id: str, error: str = "") -> None:
        ray.get(self.queue.leave.remote(trial_id))
        with self.sweep.lock:
            entry = self.entries[trial_id]
            if error:
                entry.update(state=FAILED, reason=error)
            elif entry["state"] == RUNNING:
                entry.update(state="stopped", reason=f"among the worse after epoch {entry['epochs'][-1]['epoch']}")
            entry["seconds"] = time.monotonic() - self.begun[trial_id]
            self.sweep.save()
        say(summary.trial_line(entry, self.total))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The live table and the publication, in a thread, while the body runs."""
        table = TrialTable(self.sweep.record, self.live, self.total)
        published, failed = time.monotonic(), False

        def look() -> None:
            nonlocal published, failed
            if failed:
                return
            try:
                with suppress(StorageError, OSError):  # a file being replaced, a storage out of reach: look again
                    self._look()
                table.tell()
                if time.monotonic() - published >= 2 * LOOK_S:
                    published = time.monotonic()
                    with suppress(StorageError, OSError):
                        self.sweep.publish()
            except UserError as e:
                failed = True
                self.fail(e)
            except Exception as e:
                failed = True
                self.failure = e

        with table.shown(), polling(look, LOOK_S):
            yield
        table.print()

    def wait_for_references(self) -> None:
        """They were wanted from the start, so hardly ever is one still missing when the trials have ended."""
        while self.references and self.failure is None and self.error is None:
            time.sleep(LOOK_S)
        if self.failure is not None:
            raise self.failure

    def _look_at_references(self) -> None:
        for name, (job, followed) in list(self.references.items()):
            ((state, reason),) = ray.get(self.queue.follow.remote([job.request()], f"reference {name}"))
            found = self.measured[name]
            for result in followed.new_results():
                found |= {k: result[k] for k in ("clean", "robust", "n", "each")}
            if followed.finished:
                found["state"] = FINISHED
            elif state in (DIVERGED, FAILED):
                found |= {"state": state, "reason": reason}
            else:
                continue
            with self.sweep.lock:
                self.sweep.record["references"][name] = found
                self.sweep.save()
            del self.references[name]
            say(summary.reference_line(name, found))

    def _look(self) -> None:
        if said := ray.get(self.queue.error.remote()):
            raise UserError(said)
        self._look_at_references()
        for entry in list(self.entries.values()):
            if entry["state"] != RUNNING:
                self.live.pop(entry["number"], None)
                continue
            steps = []
            for model in entry["models"]:
                home = self.sweep.root / model["path"]
                if home.exists("live.json"):
                    live = home.read_json("live.json")
                    steps.append((live["done"], live["total"]))
            total = sum(t for _, t in steps)
            self.live[entry["number"]] = f"step {sum(d for d, _ in steps)} of {total}" if steps else "waiting"


def _callback(following: SweepMonitor) -> Any:
    from ray import tune

    @contextmanager
    def kept() -> Iterator[None]:
        """What a record cannot be told any more ends the sweep; raised, Tune would blame the trial."""
        try:
            yield
        except UserError as e:
            following.fail(e)

    class Callback(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with kept():
                following.start(trial.trial_id, trial.config)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            with kept():
                following.result(trial.trial_id, result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with kept():
                following.end(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with kept():
                following.end(trial.trial_id, f"its process failed more than {TRIAL_DEATHS} times: {trial.get_error()}")

    return Callback()


def _stopper(following: SweepMonitor) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        """Ends the sweep, not a trial: Tune tells no callback of it."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return following.error is not None

    return Stopper()
