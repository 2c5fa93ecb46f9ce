"""Ray Tune over the trials of a sweep: what proposes them, what stops them early, and their events into the sweep's record."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from components.fields import content_hash
from pipeline.runtime import user_errors
from pipeline.sweep.trials.plan import SweepPlan
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import ENDED
from pipeline.sweep.trials.trial import run_trial
from pipeline.sweep.trials.workers import TrainingPool
from pipeline.training import ray_runs
from pipeline.training.jobs import TrainingJob

if TYPE_CHECKING:
    from pipeline.sweep.sweep_directory import Sweep
from pipeline.sweep.search.early_stopping import early_stopping
from pipeline.sweep.search.monitor import TRIAL_DEATHS, SweepMonitor, _callback, _stopper


def runs_at_once(sweep: Sweep, left: int) -> int:
    """How many Ray Train runs serve the trials."""
    room = min(ray_runs.parallel_runs(sweep.experiment), max(1, left) * sweep.experiment.seeds)
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
    following = SweepMonitor(sweep, plan, queue, references)
    deaths = attempts * (len(pending) + len(references))
    pool = TrainingPool(queue, runs, plan, sweep.experiment, sweep.root, deaths=deaths, fail=following.fail)
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

    from pipeline.sweep.search.optuna_search import UnrepeatedSearch, distributions

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
