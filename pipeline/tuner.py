"""Ray Tune over the trials of a sweep: what proposes them, what stops them early, and their events into the sweep's record."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray

from components.errors import ConfigError, UserError
from components.fields import content_hash
from pipeline import run, sweep_report
from pipeline.pool import Pool
from pipeline.runtime import user_errors
from pipeline.runtime.console import say
from pipeline.runtime.storage import StorageError
from pipeline.sweep.trials.plan import SweepPlan
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import DIVERGED, FAILED
from pipeline.training import ray_workers
from pipeline.training.jobs import TrainingJob
from pipeline.trial import ENDED, FINISHED, RUNNING, Followed, new_entry, run_trial
from pipeline.trial_table import TrialTable

if TYPE_CHECKING:
    from pipeline.sweep import Sweep

TRIAL_DEATHS = 3
"""How often a trial's own process is started again."""
LOOK_S = 1.0


def runs_at_once(sweep: Sweep, left: int) -> int:
    """How many Ray Train runs serve the trials."""
    room = min(ray_workers.parallel_runs(sweep.experiment), max(1, left) * sweep.experiment.seeds)
    return min(room, sweep.options.max_concurrent) if sweep.options.max_concurrent else room


def run_trials(
    sweep: Sweep, plan: SweepPlan, pending: Sequence[Mapping[str, Any]], references: Sequence[TrainingJob] = ()
) -> None:
    """Run what is left under Ray Tune, and the references beside it. Every event is in the record at once.

    Raises:
        UserError: the workers could not be kept up, or storage or shards failed. The trials that run then go on with the next command.
    """
    # before ray.tune is imported: no files of its own beside ours, no output, Ctrl-C as everywhere
    for name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):
        os.environ[name] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial whose process died is said by us
    scaling, space = sweep.experiment.scaling, sweep.space
    runs = runs_at_once(sweep, len(pending) + len(references))
    attempts = scaling.max_failures + 1
    # no CPU: the workers may have them all
    queue = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(JobQueue).remote(attempts)
    following = Following(sweep, plan, queue, references)
    deaths = attempts * (len(pending) + len(references))
    pool = Pool(queue, runs, plan, sweep.experiment, sweep.root, deaths=deaths, fail=following.fail)
    # one more trial than runs, so that no worker waits for the next; TPE had better wait for what it learns from
    at_once = max(1, runs // sweep.experiment.seeds) + (space.search != "tpe")
    # a byte of memory: Tune has no trials without any resource
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan, queue=queue), {"memory": 1})
    files = sweep.root / f"ray/{secrets.token_hex(8)}"
    param_space, search = search_algorithm(sweep, pending)
    tuner = tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            num_samples=len(pending) if search else 1,
            search_alg=search,
            scheduler=early_stopping(following),
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=files.root,
            storage_filesystem=files.fs,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_DEATHS),
            callbacks=[_callback(following)],
            stop=_stopper(following),
        ),
    )
    try:
        with following.shown():
            if pending:
                tuner.fit()
            following.wait_for_references()
        pool.close()
    except Exception as e:
        pool.close()
        # Tune wraps what a callback raises
        mine = following.error or user_errors.unwrap(e)
        if mine is None:
            raise
        raise mine from None
    finally:  # where the user interrupts, nobody waits for the pool
        with suppress(OSError):
            sweep.root.fs.delete_dir(files.root)
    if following.error is not None:
        raise following.error


def search_algorithm(sweep: Sweep, pending: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
    """Tune's param_space and search algorithm (None: the points as listed)."""
    if sweep.space.search != "tpe":
        from ray import tune

        points = [{"number": t["number"], "values": t["parameters"]} for t in pending]
        return {"listed": tune.grid_search(points)}, None
    import optuna

    from pipeline.optuna_space import UnrepeatedSearch, distributions

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = optuna.storages.InMemoryStorage()
    space = distributions(sweep.space)
    study = optuna.create_study(storage=known, study_name="sweep", directions=["maximize", "maximize"])
    for trial in sweep.trials:
        if trial["state"] in ENDED:
            study.add_trial(
                optuna.trial.create_trial(params=trial["parameters"], distributions=space, values=_scores(trial))
            )
        else:
            study.enqueue_trial(trial["parameters"])
    # continued, it must not draw again what it drew
    seed = int(content_hash(sweep.options.seed, len(sweep.trials))[:8], 16)
    sampler = optuna.samplers.TPESampler(seed=seed)
    asked = [trial["parameters"] for trial in sweep.trials]
    search = UnrepeatedSearch(
        sweep.space,
        asked,
        metric=["clean", "robust"],
        mode=["max", "max"],
        sampler=sampler,
        storage=known,
        study_name="sweep",
    )
    return {}, search


def _scores(trial: Mapping[str, Any]) -> list[float]:
    if trial["state"] == "diverged":  # to the search it is as bad as can be
        return [0.0, 0.0]
    return [trial["epochs"][-1]["clean"], trial["epochs"][-1]["robust"]]


def grace_of(sweep: Sweep) -> int:
    """Epochs after which a trial may first be stopped early; 0: none is."""
    asha = sweep.space.asha
    return asha.grace_epochs if asha is not None and asha.grace_epochs < sweep.base.epochs else 0


def early_stopping(following: Following) -> Any:
    """ASHA over the trials of the record, those of earlier commands included, or None."""
    sweep = following.sweep
    if not grace_of(sweep):
        return None
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """Knows a trial by its number: one that goes on has passed what it had passed, whatever Tune calls it now. (Tune pickles this
        class, and so whatever it refers to.)"""

        def of(self, number: int) -> Any:
            known = SimpleNamespace(trial_id=str(number))
            if known.trial_id not in self._trial_info:
                super().on_trial_add(None, known)  # type: ignore[arg-type]
            return known

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            """Its number is known when it starts."""

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            """It never started."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            number = following.entries[trial.trial_id]["number"]
            decision: str = super().on_trial_result(controller, self.of(number), result)
            ends = result["epoch"] >= following.plan.base.epochs
            if decision == TrialScheduler.STOP and not ends and following.is_whole(trial.trial_id):
                return TrialScheduler.CONTINUE  # there is nothing left to be saved
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, self.of(following.entries[trial.trial_id]["number"]), result)

    asha = sweep.space.asha
    scheduler = Asha(
        time_attr="epoch",
        metric="robust",
        mode="max",
        max_t=sweep.base.epochs,
        grace_period=asha.grace_epochs,
        reduction_factor=asha.reduction,
    )
    for trial in sweep.trials:
        for epoch in trial["epochs"]:
            super(Asha, scheduler).on_trial_result(None, scheduler.of(trial["number"]), epoch)
    return scheduler


class Following:
    """Keeps record, terminal and MLflow up to date while Tune runs."""

    def __init__(self, sweep: Sweep, plan: SweepPlan, queue: Any, references: Sequence[TrainingJob]) -> None:
        self.sweep, self.plan, self.queue = sweep, plan, queue
        self.references = {job.name: (job, Followed([job], plan.objective, sweep.root)) for job in references}
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
            entry.update(state=RUNNING, reason="", epochs=epochs, started=run._now(), models=models)
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
        say(sweep_report.trial_line(entry, self.total))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The live table and the publication, in a thread, while the body runs."""
        done = threading.Event()
        table = TrialTable(self.sweep.record, self.live, self.total)

        def look() -> None:
            published = time.monotonic()
            while not done.wait(LOOK_S):
                with suppress(StorageError, OSError):  # a file being replaced, a storage out of reach: look again
                    self._look()
                table.tell()
                now = time.monotonic()
                if now - published >= 2 * LOOK_S:
                    published = now
                    with suppress(StorageError, OSError):
                        self.sweep.publish()

        def guarded() -> None:
            try:
                look()
            except UserError as e:
                self.fail(e)
            except Exception as e:
                self.failure = e

        thread = threading.Thread(target=guarded, daemon=True)
        with table.shown():
            thread.start()
            interrupted = False
            try:
                yield
            except KeyboardInterrupt:
                interrupted = True
                raise
            finally:
                done.set()
                if not interrupted:  # it may be publishing to a server that does not answer
                    thread.join()
        table.print()

    def wait_for_references(self) -> None:
        """They were wanted from the start, so hardly ever is one still missing when the trials have ended."""
        while self.references and self.failure is None and self.error is None:
            time.sleep(LOOK_S)
        if self.failure is not None:
            raise self.failure

    def _look_at_references(self) -> None:
        for name, (job, followed) in list(self.references.items()):
            ((state, reason),) = ray.get(self.queue.follow.remote([job.order()], f"reference {name}"))
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
            say(sweep_report.reference_line(name, found))

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


def _callback(following: Following) -> Any:
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


def _stopper(following: Following) -> Any:
    from ray import tune

    class Stopper(tune.Stopper):
        """Ends the sweep, not a trial: Tune tells no callback of it."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return following.error is not None

    return Stopper()
