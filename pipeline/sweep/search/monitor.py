"""Writes what Ray Tune reports of trials into the sweep's record, the terminal and MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from components.errors import ConfigError, UserError
from pipeline.runtime import interrupts
from pipeline.runtime.console import say
from pipeline.runtime.polling import polling
from pipeline.runtime.storage import StorageError
from pipeline.runtime.stored_record import now
from pipeline.sweep.report import summary
from pipeline.sweep.report.live_table import TrialTable
from pipeline.sweep.sweep_directory import Sweep
from pipeline.sweep.trials.entry import EpochScores, TrialEntry, TrialModel
from pipeline.sweep.trials.plan import SweepPlan
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import DIVERGED, FAILED, FINISHED, RUNNING, STOPPED
from pipeline.sweep.trials.trial import TrialProgress
from pipeline.training.jobs import TrainingJob

TRIAL_DEATHS = 3
"""How often a trial's own process is started again."""
POLL_S = 1.0


class SweepMonitor:
    """Keeps record, terminal and MLflow up to date while Tune runs.

    Args:
        references: models that are measured like the trials' own, beside them.
    """

    def __init__(self, sweep: Sweep, plan: SweepPlan, queue: JobQueue, references: Sequence[TrainingJob]) -> None:
        self.sweep, self.plan, self.queue = sweep, plan, queue
        self.error: UserError | None = None
        """Ends the sweep at once."""
        self._numbers: dict[str, int] = {}
        """Tune's trial id -> number of the trial."""
        self._begun: dict[str, float] = {}
        self._references = {job.name: (job, TrialProgress([job], plan.objective, sweep.root)) for job in references}
        """References that are not measured yet."""
        self._measured: dict[str, dict[str, Any]] = {job.name: {"path": job.address} for job in references}
        self._failure: Exception | None = None
        """An error that ended the polling thread."""
        self._live: dict[int, str] = {}
        """Trial number -> how far its models are."""
        self._total = sweep.space.count if sweep.space.search == "tpe" else len(sweep.trials)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # Tune pickles its callbacks for Tuner.restore(), which we do not use.

    def fail(self, error: UserError) -> None:
        """End the sweep with an error. Running trials stay as they are, for the next command."""
        self.error = self.error or error

    def number(self, trial_id: str) -> int:
        """Return the number of a trial of Tune's."""
        return self._numbers[trial_id]

    def trial(self, trial_id: str) -> TrialEntry:
        """Return the entry of a trial of Tune's."""
        return self.sweep.trial(self._numbers[trial_id])

    def start(self, trial_id: str, config: Mapping[str, Any]) -> None:
        """Note that a trial runs."""
        if trial_id in self._numbers:  # Its process died.
            return
        with self.sweep.stored.lock:
            trial = self._entry_of(config)
            models: tuple[TrialModel, ...] = ()
            with suppress(ConfigError):  # The trial's process reports it as the end of the trial.
                jobs = self.plan.jobs(trial.parameters)
                models = tuple(TrialModel(seed=job.config.seed, path=job.address) for job in jobs)
            # With the same models the trial goes on where it was, so its epochs stay known.
            epochs = trial.epochs if trial.models == models else ()
            trial = replace(trial, state=RUNNING, reason="", epochs=epochs, started=now(), models=models)
            self._numbers[trial_id], self._begun[trial_id] = trial.number, time.monotonic()
            self._save(trial)

    def _entry_of(self, config: Mapping[str, Any]) -> TrialEntry:
        if "listed" in config:
            return self.sweep.trial(config["listed"]["number"])
        trials = self.sweep.trials
        for trial in trials:
            if not trial.is_settled and trial.parameters == config and trial.number not in self._numbers.values():
                return trial
        return TrialEntry(number=len(trials) + 1, parameters=dict(config))

    def _save(self, trial: TrialEntry) -> None:
        self.sweep.put(trial)
        self.sweep.stored.save()

    def result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Note what a trial reports: an epoch's scores, or that it diverged or failed."""
        state = result["state"]
        with self.sweep.stored.lock:
            trial = self.trial(trial_id)
            if state in (RUNNING, FINISHED):
                # A trial that was started again reports its epochs again.
                if not any(e.epoch >= result["epoch"] for e in trial.epochs):
                    scores = EpochScores(**{k: result[k] for k in ("epoch", "clean", "robust", "each", "n")})
                    trial = replace(trial, epochs=(*trial.epochs, scores))
                elif state == RUNNING:
                    return
            if state != RUNNING:
                trial = replace(trial, state=state, reason=result.get("reason", ""))
            self._save(
                replace(
                    trial,
                    training_seconds=result["training_seconds"],
                    objective_seconds=result["objective_seconds"],
                    seconds=time.monotonic() - self._begun[trial_id],
                )
            )

    def is_trained(self, trial_id: str) -> bool:
        """Tell whether all models of a trial are exported, and measured after their last epoch."""
        last = self.plan.objective.file(self.plan.base.epochs - 1)
        homes = [self.sweep.root / model.path for model in self.trial(trial_id).models]
        return all(home.exists("model.json") and home.exists(last) for home in homes)

    def end(self, trial_id: str, error: str = "") -> None:
        """Note that a trial does not run any more; ``error`` says why its process failed."""
        self.queue.leave(trial_id)
        with self.sweep.stored.lock:
            trial = self.trial(trial_id)
            if error:
                trial = replace(trial, state=FAILED, reason=error)
            elif trial.state == RUNNING:
                trial = replace(trial, state=STOPPED, reason=f"among the worse after epoch {trial.last.epoch}")
            trial = replace(trial, seconds=time.monotonic() - self._begun[trial_id])
            self._save(trial)
        say(summary.trial_line(trial, self._total))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live table and publish to MLflow, in a thread, while the body runs."""
        table = TrialTable(self.sweep.record, self._live, self._total)
        published, failed = time.monotonic(), False

        def poll() -> None:
            nonlocal published, failed
            if failed:
                return
            try:
                # A file is being replaced, or the storage out of reach. The next poll looks again.
                with suppress(StorageError, OSError):
                    self._poll()
                table.print_progress()
                if time.monotonic() - published >= 2 * POLL_S:
                    published = time.monotonic()
                    with suppress(StorageError, OSError):
                        self.sweep.publish(report_follows=True)
            except UserError as e:
                failed = True
                self.fail(e)
            except Exception as e:
                failed = True
                self._failure = e

        with table.shown(), polling(poll, POLL_S):
            yield
        table.print()

    def wait_for_references(self) -> None:
        """Wait until the references are measured. Mostly they are before the trials end."""
        while self._references and self._failure is None and self.error is None:
            interrupts.raise_received()
            time.sleep(POLL_S)
        if self._failure is not None:
            raise self._failure

    def _poll(self) -> None:
        if error := self.queue.error():
            raise UserError(error)
        self._poll_references()
        for trial in self.sweep.trials:
            if trial.state == RUNNING and trial.number in self._numbers.values():
                self._live[trial.number] = self._progress_of(trial)
            else:
                self._live.pop(trial.number, None)

    def _poll_references(self) -> None:
        for name, (job, progress) in list(self._references.items()):
            ((state, reason),) = self.queue.follow([job.request()], f"reference {name}")
            reference = self._measured[name]
            for result in progress.new_results():
                reference |= {k: result[k] for k in ("clean", "robust", "n", "each")}
            if progress.finished:
                reference["state"] = FINISHED
            elif state in (DIVERGED, FAILED):
                reference |= {"state": state, "reason": reason}
            else:
                continue
            with self.sweep.stored.lock:
                self.sweep.record["references"][name] = reference
                self.sweep.stored.save()
            del self._references[name]
            say(summary.reference_line(name, reference))

    def _progress_of(self, trial: TrialEntry) -> str:
        homes = [self.sweep.root / model.path for model in trial.models]
        steps = [home.read_json("live.json") for home in homes if home.exists("live.json")]
        if not steps:
            return "waiting"
        return f"step {sum(s['done'] for s in steps)} of {sum(s['total'] for s in steps)}"


def tune_callback(monitor: SweepMonitor) -> Any:
    """Return the callback of Ray Tune that passes its events on to a monitor."""
    from ray import tune

    @contextmanager
    def ending_the_sweep() -> Iterator[None]:
        """End the sweep if its record cannot be written. Tune would attribute it to the trial."""
        try:
            yield
        except UserError as e:
            monitor.fail(e)

    class Callback(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with ending_the_sweep():
                monitor.start(trial.trial_id, trial.config)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            with ending_the_sweep():
                monitor.result(trial.trial_id, result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            with ending_the_sweep():
                monitor.end(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            error = f"its process failed more than {TRIAL_DEATHS} times: {trial.get_error()}"
            with ending_the_sweep():
                monitor.end(trial.trial_id, error)

    return Callback()


def sweep_stopper(monitor: SweepMonitor) -> Any:
    """Return the stopper of Ray Tune that ends the sweep once its monitor has an error."""
    from ray import tune

    class Stopper(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            interrupts.raise_received()
            return monitor.error is not None

    return Stopper()
