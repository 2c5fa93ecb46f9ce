"""Work of a training worker group's ranks: models one after the other, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from components.config import Shapes, TrainConfig, stored_levels
from components.errors import UserError
from components.fields import from_dict
from pipeline import ray_metrics
from pipeline.data import shards
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage, StorageError
from pipeline.training import pretrained
from pipeline.training.assignment import Assignment
from pipeline.training.finished_models import export_trained
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE
from pipeline.training.loop import NonFiniteLoss, RankData, Ranks, TrainingLoop

LIVE_INTERVAL_S = 1.0
"""Least time between two writes of live.json, and time between two looks at it."""
POLL_S = 2.0
"""Time between two looks at a model that another run trains."""


class ModelFailed(Exception):
    """A model failed on one of several ranks. The reason is recorded on the storage."""


def train_models(requests: Sequence[dict[str, Any]], root: Storage, ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Train models one after the other; every rank of a worker group calls it.

    A model that fails is recorded (FAILED_MODEL, NOT_FINITE) and does not stop the next ones. A
    model that another run trains is left to that run: this group trains the others and then waits.

    Args:
        requests: see :meth:`pipeline.training.jobs.TrainingJob.request`.
        settings: ``shapes``, and ``token``, which names this worker group also after a restart.

    Raises:
        StorageError, DataError: the storage or the shards fail, which all models share.
        ModelFailed: a model failed on one of several ranks. A new group takes the next one.
    """
    assignment = Assignment(requests, root, settings["token"])
    data = DataCache(root, ranks)
    try:
        while (request := ranks.agreed(assignment.take)) is not None:
            if not request:
                time.sleep(POLL_S)
                continue
            data.load(request)
            _train_or_record(request, root / request["address"], data, settings, _WhileLeased(ranks, assignment))
            assignment.leave()
    finally:
        assignment.leave()


def _train_or_record(
    request: dict[str, Any], home: Storage, data: DataCache, settings: Mapping[str, Any], callback: EpochCallback
) -> None:
    failure = ""
    try:
        train_model(request, home, data, settings, callback)
    except NonFiniteLoss as e:  # Every rank raises it.
        if data.ranks.rank == 0:
            home.write_json(NOT_FINITE, {"step": e.step, "token": settings["token"]})
            home.delete(FAILED_MODEL)  # It may be there from an earlier attempt.
    except StorageError:
        raise
    except Exception as e:
        if data.ranks.world > 1 and _lost_a_rank(e):
            raise
        failure = _reason_of(e)
    if failure:
        record_failure(home, failure, settings["token"])
        if data.ranks.world > 1:  # The other ranks wait for this one within a step.
            raise ModelFailed(failure)
        # Outside the except block the exception no longer keeps the failed batch's tensors alive.
        torch.cuda.empty_cache()


def record_failure(home: Storage, reason: str, token: str) -> None:
    """Record that a worker group could not train a model, and why."""
    home.write_json(FAILED_MODEL, {"reason": reason, "token": token})
    home.delete(NOT_FINITE)  # It may be there from an earlier attempt.


def _reason_of(error: Exception) -> str:
    """Return one line that says why a model could not be trained, and what to do about it."""
    if isinstance(error, UserError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        reason += ". Lower --train.batch-size or --train.width, or train on GPUs with more memory"
    return reason


def _lost_a_rank(error: Exception) -> bool:
    """Tell whether a collective failed because another rank is gone: no fault of the model."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


class DataCache:
    """Cache of the last data of each split: models in a row mostly train on the same data."""

    def __init__(self, root: Storage, ranks: Ranks) -> None:
        self.root, self.ranks = root, ranks
        self._loaded: dict[str, tuple[tuple[str, bool], RankData]] = {}

    def get(self, split: str, addresses: Mapping[str, str], levels: bool) -> RankData | None:
        """Return this rank's data of a split, or None if ``addresses`` lacks the split."""
        if split not in addresses:
            return None
        key = (addresses[split], levels)
        if split not in self._loaded or self._loaded[split][0] != key:
            # The old data go first, since both may not fit the memory.
            self._loaded.pop(split, None)
            ranks = self.ranks
            data = RankData(shards.load(self.root, key[0]), ranks.rank, ranks.world, ranks.device, levels=levels)
            self._loaded[split] = key, data
        return self._loaded[split][1]

    def load(self, request: Mapping[str, Any]) -> None:
        """Read the data of a model before it starts: damaged shards are no fault of the model."""
        self.get("train", request["pyramids"], levels=stored_levels(from_dict(TrainConfig, request["config"])))
        self.get("validation", request["pyramids"], levels=False)


class EpochCallback:
    """Hooks that every rank calls after an epoch. By default they do nothing.

    Epochs are not reported to Ray Train: ``ray.train.report`` blocks for up to 2 s, longer than an
    epoch of a small model. The driver follows the records on storage instead.
    """

    def measure(self, loop: TrainingLoop, record: Mapping[str, Any]) -> None:
        """Measure the model before the epoch counts as done; if killed, both are repeated."""

    def stop(self, loop: TrainingLoop) -> bool:
        """Tell whether to leave the model now. Every rank must give the same answer."""
        return False


class _WhileLeased(EpochCallback):
    """Callback that leaves a model once another run has taken it over."""

    def __init__(self, ranks: Ranks, assignment: Assignment) -> None:
        self.ranks, self.assignment = ranks, assignment

    def stop(self, loop: TrainingLoop) -> bool:
        return not self.ranks.agreed(lambda: self.assignment.holds)


def train_model(
    request: dict[str, Any], home: Storage, data: DataCache, settings: Mapping[str, Any], callback: EpochCallback
) -> None:
    """Train a model, or continue it, and export it; every rank of a worker group calls it.

    Raises:
        NonFiniteLoss: the loss is not finite; every rank raises it.
    """
    config = from_dict(TrainConfig, request["config"])
    train_data = data.get("train", request["pyramids"], levels=stored_levels(config))
    assert train_data is not None  # The driver always names a training set.
    loop = TrainingLoop(
        config,
        from_dict(Shapes, settings["shapes"]),
        train_data,
        data.get("validation", request["pyramids"], levels=False),
        ranks=data.ranks,
        weights=pretrained.load(data.root, request["weights"]) if request["weights"] else None,
    )
    if data.ranks.rank == 0:
        # Killed workers may have left half-written files.
        for directory in ("", "checkpoints", "history"):
            home.delete_stale(directory, HALF_WRITTEN_S)
    loop.resume(home / "checkpoints")
    live = _live_writer(home, data.ranks, loop.local_batch)
    while loop.epoch < config.epochs:
        record = loop.run_epoch(live)
        callback.measure(loop, record)
        if data.ranks.rank == 0:
            home.write_json(f"history/epoch-{record['epoch']:05d}.json", record)
            if loop.epoch % config.checkpoint_every_epochs == 0 or loop.epoch == config.epochs:
                loop.save(home / "checkpoints")
        if loop.epoch < config.epochs and callback.stop(loop):
            return
    # Others may be reading one that exists.
    if data.ranks.rank == 0 and not home.exists("model.json"):
        export_trained(loop, home, request)


def _live_writer(home: Storage, ranks: Ranks, batch: int) -> Callable[[int, int, Callable[[], float]], None]:
    """Return a function that counts a step's images, and writes live.json on rank 0 at times.

    Args:
        batch: images of a step on this rank.
    """
    last = 0.0

    def write(done: int, total: int, loss: Callable[[], float]) -> None:
        nonlocal last
        ray_metrics.images_trained(home.uri, batch)
        if ranks.rank == 0 and time.monotonic() - last >= LIVE_INTERVAL_S:
            last = time.monotonic()
            with suppress(StorageError):  # The file only moves the progress bar.
                home.write_json("live.json", {"done": done, "total": total, "loss": loss()})

    return write
