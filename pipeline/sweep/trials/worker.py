"""Worker of a sweep's Ray Train run: it trains and measures models of the queue."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from components.errors import UserError
from components.fields import from_dict, to_dict
from components.network import classifier_of
from pipeline.runtime.lease import WorkingLease
from pipeline.runtime.storage import Storage, StorageError
from pipeline.sweep.trials.objective import RobustAccuracyMeter
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.queue import JobQueue, NoRequest, Request
from pipeline.sweep.trials.states import DIVERGED, DONE, FAILED, ModelState
from pipeline.training import exports, ray_runs, worker_group
from pipeline.training.jobs import NOT_FINITE
from pipeline.training.loop import NonFiniteLoss, Ranks, TrainingLoop

POLL_S = 0.3


class Work(Enum):
    """What is left to do for a requested model."""

    TRAIN = "train"
    MEASURE = "measure"
    """Another run trained it without measuring it."""
    WAIT = "wait"
    """Another run is training it. The trial requests it again."""
    NOTHING = "nothing"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Task:
    """A requested model and what is left to do for it."""

    request: Request
    work: Work

    @property
    def address(self) -> str:
        """Where the model lies below the storage's root."""
        return str(self.request["address"])


def worker_settings(queue: JobQueue, plan: SweepPlan, threads: int, token: str) -> dict[str, Any]:
    """Return the settings of the workers of Ray Train runs. Each adds its number as ``run``.

    Args:
        token: names the command of the runs, also after their workers were started again.
    """
    return {
        "queue": queue,
        "root": plan.root,
        "shapes": to_dict(plan.shapes),
        "objective": to_dict(plan.objective),
        "threads": threads,
        "token": token,
    }


def serve(settings: Mapping[str, Any]) -> None:
    """Serve the queue of a sweep until it is closed, on one worker of a Ray Train run."""
    SweepWorker(settings, ray_runs.start_rank(settings["threads"])).serve()


class SweepWorker:
    """One rank of a group that trains and measures the models of a queue. Knows nothing of Ray.

    A group that was started again after a death gets the model again that it had.

    Args:
        settings: of :func:`worker_settings`, and ``run``.
    """

    def __init__(self, settings: Mapping[str, Any], ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.queue: JobQueue = settings["queue"]
        self.run: int = settings["run"]
        self.root = Storage(settings["root"])
        self.objective = from_dict(Objective, settings["objective"])
        self.data = worker_group.DataCache(self.root, ranks)
        self.lease = WorkingLease(self.root, f"{settings['token']}-{self.run}")

    @functools.cached_property
    def meter(self) -> RobustAccuracyMeter:
        """The meter of the objective."""
        return RobustAccuracyMeter(self.objective, self.root, self.ranks)

    def serve(self) -> None:
        """Train and measure models until the queue is closed."""
        while (task := self.next_task()) is not NoRequest.ANY_MORE:
            if isinstance(task, Task):
                self.carry_out(task)
            else:
                time.sleep(POLL_S)
            self.lease.release()

    def next_task(self) -> Task | NoRequest:
        """Take the next model, and load the data that it needs.

        An error of storage or shards closes the queue: every later model would fail the same way.
        """
        try:
            task = self.ranks.agreed(self._take)
            if isinstance(task, Task):
                if task.work is Work.TRAIN:
                    self.data.load(task.request)
                _ = self.meter  # Loads the validation images.
            return task
        except (UserError, OSError) as e:
            self.queue.close(str(e) if isinstance(e, UserError) else f"{self.root.uri} cannot be read: {e}")
            if self.ranks.world > 1:
                raise
            return NoRequest.YET

    def _take(self) -> Task | NoRequest:
        request = self.queue.take(self.run)
        return request if isinstance(request, NoRequest) else Task(request, self._work_on(request["address"]))

    def _work_on(self, address: str) -> Work:
        work = work_left(self.root / address, self.objective)
        if work is not Work.TRAIN:
            return work
        # The run that held the lease may have finished the model in between.
        return work_left(self.root / address, self.objective) if self.lease.try_take(address) else Work.WAIT

    def carry_out(self, task: Task) -> None:
        """Train and measure a model, and tell the queue how it ended.

        With several ranks, the others wait for this one within a step. Only a new group gets out of
        that, so errors are raised again.
        """
        try:
            state, reason = self._result_of(task)
        except StorageError as e:
            self.queue.close(str(e))
            if self.ranks.world > 1:
                raise
            return
        except Exception as e:
            state, reason = FAILED, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            if self.ranks.world > 1:
                self.queue.end(task.address, state, reason)
                raise
        if state == FAILED:
            torch.cuda.empty_cache()  # Here the exception no longer keeps the failed batch's tensors alive.
        if self.ranks.rank == 0:
            if state is None:
                self.queue.put_back(task.address)
            else:
                self.queue.end(task.address, state, reason)

    def _result_of(self, task: Task) -> tuple[ModelState | None, str]:
        """Do what is left for a model. Return its state (None: unfinished) and the reason."""
        home = self.root / task.address
        try:
            if task.work is Work.WAIT:
                time.sleep(POLL_S)
                return None, ""
            if task.work is Work.TRAIN:
                return (DONE if self._train(task, home) else None), ""
            if task.work is Work.MEASURE:
                self._measure_exported(task, home)
            elif task.work is Work.DIVERGED:
                raise NonFiniteLoss(self.ranks.agreed(lambda: home.read_json(NOT_FINITE)["step"]))
        except NonFiniteLoss as e:  # It is raised on every rank.
            if self.ranks.rank == 0:
                home.write_json(NOT_FINITE, {"step": e.step})
            return DIVERGED, f"the loss was not finite at step {e.step}"
        return DONE, ""

    def _train(self, task: Task, home: Storage) -> bool:
        """Train a model and measure every epoch. Return False if it was stopped on the way."""

        def unwanted() -> bool:
            return self.queue.cancelled(task.address, self.run) or not self.lease.held

        callback = _MeasureEpochs(self.meter, home, lambda: self.ranks.agreed(unwanted))
        worker_group.train_model(dict(task.request), home, self.data, self.settings, callback)
        return not callback.stopped

    def _measure_exported(self, task: Task, home: Storage) -> None:
        """Measure the last epoch of a model that another run trained without measuring it."""
        model = self.ranks.agreed(lambda: home.read_json("model.json"))
        epoch, clean = model["train"]["epochs"] - 1, model["validation"]["accuracy"]
        arch = task.request["config"]["arch"]
        classifier = exports.load_classifier(home.full_uri, self.ranks.device, trusted=arch)
        self.meter.measure(classifier, home, epoch=epoch, clean=clean, training_seconds=0.0)


def work_left(home: Storage, objective: Objective) -> Work:
    """Return what is left to do for the model of a directory."""
    if home.exists("model.json"):
        epochs = home.read_json("model.json")["train"]["epochs"]
        return Work.NOTHING if home.exists(objective.file(epochs - 1)) else Work.MEASURE
    return Work.DIVERGED if home.exists(NOT_FINITE) else Work.TRAIN


class _MeasureEpochs(worker_group.EpochCallback):
    """Measures a model after every epoch, and stops it once no trial requests it any more.

    Args:
        unwanted: asked on every rank, with the same answer.
    """

    def __init__(self, meter: RobustAccuracyMeter, home: Storage, unwanted: Callable[[], bool]) -> None:
        self.meter, self.home, self.unwanted = meter, home, unwanted
        self.stopped = False

    def measure(self, loop: TrainingLoop, record: Mapping[str, Any]) -> None:
        epoch, clean, seconds = record["epoch"], record["validation"]["accuracy"], record["seconds"]
        self.meter.measure(
            classifier_of(loop.trained_net), self.home, epoch=epoch, clean=clean, training_seconds=seconds
        )

    def stop(self, loop: TrainingLoop) -> bool:
        self.stopped = self.unwanted()
        return self.stopped
