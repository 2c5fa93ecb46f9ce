"""Runs the trials of a sweep under Ray Tune."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from typing import Any

from components.fields import content_hash
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_errors import unwrap
from pipeline.sweep.search.early_stopping import early_stopping
from pipeline.sweep.search.monitor import TRIAL_DEATHS, SweepMonitor, sweep_stopper, tune_callback
from pipeline.sweep.sweep_directory import Sweep
from pipeline.sweep.trials.entry import TrialEntry
from pipeline.sweep.trials.plan import SweepPlan
from pipeline.sweep.trials.pool import TrainingPool
from pipeline.sweep.trials.queue import start_queue
from pipeline.sweep.trials.states import DIVERGED
from pipeline.sweep.trials.trial import run_trial
from pipeline.sweep.trials.worker import serve, worker_settings
from pipeline.training import ray_runs
from pipeline.training.jobs import TrainingJob


def runs_at_once(sweep: Sweep, left: int) -> int:
    """Return how many Ray Train runs serve the trials and references that are left."""
    room = min(ray_runs.parallel_runs(sweep.experiment), max(1, left) * sweep.experiment.seeds)
    return min(room, sweep.options.max_concurrent) if sweep.options.max_concurrent else room


def run_trials(
    sweep: Sweep, plan: SweepPlan, pending: Sequence[TrialEntry], proposals: int, references: Sequence[TrainingJob]
) -> None:
    """Run trials under Ray Tune, and references beside them. Events are in the record at once.

    Args:
        pending: the trials of the record to run.
        proposals: how many more TPE is to propose.

    Raises:
        UserError: the workers could not be kept up, or storage or shards failed. The next command
            continues the trials.
    """
    _import_tune()
    left = len(pending) + proposals
    runs = runs_at_once(sweep, left + len(references))
    attempts = sweep.experiment.scaling.max_failures + 1
    queue = start_queue(attempts)
    monitor = SweepMonitor(sweep, plan, queue, references)
    deaths = attempts * (left + len(references))
    pool = _start_pool(sweep, plan, monitor, runs, deaths)
    try:
        with monitor.shown():
            if left:
                with ray_runs.ray_files(sweep.root) as files:
                    _make_tuner(monitor, files, runs, pending, proposals).fit()
            monitor.wait_for_references()
    except Exception as e:
        pool.close()
        error = monitor.error or unwrap(e)  # Tune wraps what a callback raises.
        if error is None:
            raise
        raise error from None
    # A user who interrupts does not wait for the pool.
    pool.close()
    if monitor.error is not None:
        raise monitor.error


def _import_tune() -> None:
    """Import Ray Tune with our settings: it writes no files, prints nothing and leaves Ctrl-C to us.

    The threads of the pool import ray.train, which fails while another thread imports ray.tune.
    """
    for name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):
        os.environ[name] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    import ray.tune  # noqa: F401

    # The monitor reports trials whose process died.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def _start_pool(sweep: Sweep, plan: SweepPlan, monitor: SweepMonitor, runs: int, deaths: int) -> TrainingPool:
    """Start the Ray Train runs, each of which survives so many deaths of its workers."""
    threads = sweep.experiment.scaling.threads_per_worker
    settings = worker_settings(monitor.queue, plan, threads, token=secrets.token_hex(8))

    def fit(number: int) -> None:
        config = {**settings, "run": number}
        ray_runs.fit_workers(serve, config, sweep.experiment, sweep.root, max_failures=deaths)

    return TrainingPool(monitor.queue, runs, fit, fail=monitor.fail)


def _make_tuner(monitor: SweepMonitor, files: Storage, runs: int, pending: Sequence[TrialEntry], proposals: int) -> Any:
    from ray import tune

    sweep = monitor.sweep
    # One extra trial keeps every worker busy. Not for TPE, which learns from finished trials.
    at_once = max(1, runs // sweep.experiment.seeds) + (sweep.space.search != "tpe")
    # Tune does not run trials without any resource, so each asks for a byte of memory.
    trainable = tune.with_parameters(run_trial, plan=monitor.plan, queue=monitor.queue)
    param_space, search = search_algorithm(sweep, pending)
    return tune.Tuner(
        tune.with_resources(trainable, {"memory": 1}),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            num_samples=len(pending) + proposals if search else 1,
            search_alg=search,
            scheduler=early_stopping(monitor),
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=files.root,
            storage_filesystem=files.fs,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_DEATHS),
            callbacks=[tune_callback(monitor)],
            stop=sweep_stopper(monitor),
        ),
    )


def search_algorithm(sweep: Sweep, pending: Sequence[TrialEntry]) -> tuple[dict[str, Any], Any]:
    """Return Tune's param_space and search algorithm (None if the points are known beforehand)."""
    if sweep.space.search != "tpe":
        from ray import tune

        points = [{"number": trial.number, "values": trial.parameters} for trial in pending]
        return {"listed": tune.grid_search(points)}, None
    import optuna

    from pipeline.sweep.search.optuna_search import UnrepeatedSearch
    from pipeline.sweep.search.study import DIRECTIONS, distributions

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    space = distributions(sweep.space.to_dict()["parameters"])
    study = optuna.create_study(storage=storage, study_name="sweep", directions=list(DIRECTIONS))
    for trial in sweep.trials:
        if trial.is_settled:
            # The search avoids a point that diverged.
            scores = [0.0, 0.0] if trial.state == DIVERGED else [trial.last.clean, trial.last.robust]
            study.add_trial(optuna.trial.create_trial(params=trial.parameters, distributions=space, values=scores))
        else:
            study.enqueue_trial(trial.parameters)
    # A sweep that goes on draws other points, since the seed depends on the number of trials.
    seed = int(content_hash(sweep.options.seed, len(sweep.trials))[:8], 16)
    search = UnrepeatedSearch(
        sweep.space,
        [trial.parameters for trial in sweep.trials],
        metric=["clean", "robust"],
        mode=["max", "max"],
        sampler=optuna.samplers.TPESampler(seed=seed),
        storage=storage,
        study_name="sweep",
    )
    return {}, search
