"""Ray Train runs: start, restart and end of a worker group."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from components.config import Experiment
from components.errors import UserError, first_line
from pipeline.runtime import interrupts
from pipeline.runtime.cluster import room_for, train_bundle
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_errors import unwrap
from pipeline.training.assignment import ATTEMPT
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingJob
from pipeline.training.loop import Ranks
from pipeline.training.worker_group import record_failure, train_models

MAX_CONTROLLER_FAILURES = 3
"""How often Ray may fail to place the workers. Without a limit it would try for ever."""


class TrainingError(UserError):
    """Training stopped for a reason that a restart would not mend."""


def parallel_runs(experiment: Experiment) -> int:
    """Return how many Ray Train runs the cluster has room for at once."""
    scaling = experiment.scaling
    room = max(1, room_for(train_bundle(scaling)) // scaling.workers)
    return min(room, scaling.parallel_models) if scaling.parallel_models else room


def train_group(group: Sequence[TrainingJob], settings: dict[str, Any], experiment: Experiment, root: Storage) -> None:
    """Train models one after the other in one Ray Train run, and start it again after failures.

    Args:
        settings: ``shapes``, ``root``, ``threads`` and ``token``, as JSON types.

    Raises:
        TrainingError: the workers failed more than ``scaling.max_failures`` times without progress.
        UserError: a worker raised it.
    """
    import ray.train

    max_failures = experiment.scaling.max_failures
    token = f"{settings['token']}-{secrets.token_hex(4)}"
    config = {**settings, "jobs": [job.request() for job in group], "token": token}
    while True:
        before = _progress_of(group, root)
        try:
            return fit_workers(_worker, config, experiment, root, max_failures=max_failures)
        except Exception as e:
            user_error = unwrap(e)
            if user_error is not None:
                raise user_error from e
            # Failures count since the last progress, since days of training lose a spot node now
            # and then. After a ControllerError no model is to blame: no worker could even start.
            started = not isinstance(e, ray.train.ControllerError)
            if _progress_of(group, root) != before or (started and _blame(group, root, token, e)):
                continue
            names = ", ".join(j.name for j in group if not root.exists(f"{j.address}/model.json"))
            raise TrainingError(
                f"training of {names} failed more than scaling.max_failures={max_failures} times: {e}\n"
                f"Checkpoints are kept below {root.uri}/models; the same command continues from the last one"
            ) from e


def _worker(settings: dict[str, Any]) -> None:
    """Train the models of one Ray Train run, on one of its workers."""
    train_models(settings["jobs"], Storage(settings["root"]), start_rank(settings["threads"]), settings)


def start_rank(threads: int) -> Ranks:
    """Return this worker of a Ray Train run among its ranks, and let torch use so many threads."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(threads)
    context = ray.train.get_context()
    return Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _progress_of(group: Sequence[TrainingJob], root: Storage) -> list[Any]:
    """Return what changes on the storage when an epoch or a model of the group ends in any way."""
    homes = [root / job.address for job in group]
    ends = ("model.json", FAILED_MODEL, NOT_FINITE)
    return [
        (len(home.list("history")), [home.read_json(name) if home.exists(name) else None for name in ends])
        for home in homes
    ]


def _blame(group: Sequence[TrainingJob], root: Storage, token: str, error: Exception) -> bool:
    """Record the model at which the workers kept dying as failed, to train the next ones."""
    for home in (root / job.address for job in group):
        if home.exists(ATTEMPT) and home.read_json(ATTEMPT)["token"] == token:
            reason = f"its workers died again and again (killed for want of memory?): {first_line(error)}"
            record_failure(home, reason, token)
            home.delete(ATTEMPT)
            return True
    return False


def fit_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    experiment: Experiment,
    root: Storage,
    *,
    max_failures: int,
) -> None:
    """Run ``worker(config)`` on every rank of one Ray Train run. Raises what Ray Train raises."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipeline.training.process_group import NodeTorchConfig

    scaling = experiment.scaling
    with ray_files(root) as files:
        TorchTrainer(
            worker,
            train_loop_config=config,
            torch_config=NodeTorchConfig(backend="nccl" if scaling.gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scaling.workers, use_gpu=scaling.gpu, resources_per_worker=train_bundle(scaling)
            ),
            # Programs get ray.train's v2 classes, which have these fields; type checkers get v1.
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]
                name="train",
                storage_path=files.root,
                storage_filesystem=files.fs,
                failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                    max_failures=max_failures, controller_failure_limit=MAX_CONTROLLER_FAILURES
                ),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        ).fit()


@contextmanager
def ray_files(root: Storage) -> Iterator[Storage]:
    """Yield a directory for Ray's own files, and delete it after the body.

    Ray's state is never continued: the models' directories say how far they are.
    """
    files = root / f"ray/{secrets.token_hex(8)}"

    def delete() -> None:
        with suppress(OSError):
            root.fs.delete_dir(files.root)

    with interrupts.cleaning_up(delete):
        yield files
