"""The Ray Train runs of a sweep: a few long-lived ones, which take model after model out of a queue.

Starting a Ray Train run costs half a minute on two cores, as much as a small model's training; so trials do not start one each.
A worker group that Ray Train starts again after a death takes up the model that it had.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from components.config import Experiment, TrainConfig, from_dict, stored_levels, to_dict
from components.errors import UserError
from pipeline import checkpoints, train
from pipeline.cluster import unwrap
from pipeline.jobs import DIVERGED, DONE, FAILED, NOT_FINITE, Objective, Plan
from pipeline.objective import Meter
from pipeline.progress import say
from pipeline.storage import Storage, StorageError
from pipeline.train_step import classifier_of

POLL_S = 0.3
CLOSE_S = 60.0
"""How long the end of a sweep waits for its runs to end."""


class Pool:
    """So many Ray Train runs side by side, each in a thread of the driver, serving one queue until it is closed.

    Args:
        queue: handle of a JobQueue actor.
        deaths: how many deaths of its workers each run survives.
        fail: called, in a thread, with what ended the last run, if it was not the queue's end.
    """

    def __init__(
        self,
        queue: Any,
        runs: int,
        plan: Plan,
        experiment: Experiment,
        root: Storage,
        *,
        deaths: int,
        fail: Callable[[UserError], None],
    ) -> None:
        import ray

        self._queue, self._ray, self._fail = queue, ray, fail
        settings = {
            "queue": queue,
            "root": root.uri,
            "shapes": to_dict(plan.shapes),
            "objective": to_dict(plan.objective),
            "threads": experiment.scaling.threads_per_worker,
        }
        self._alive = runs
        self._lock = threading.Lock()

        def run(number: int) -> None:
            try:
                train.fit_workers(_serve, {**settings, "run": number}, experiment, root, max_failures=deaths)
            except Exception as e:
                self._lost(number, e)

        # daemons: an interrupted driver does not wait for them, and its end is theirs
        self._threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(runs)]
        for thread in self._threads:
            thread.start()

    def _lost(self, number: int, error: Exception) -> None:
        with self._lock:
            self._alive -= 1
            self._ray.get(self._queue.lost.remote(number))
            mine = unwrap(error)
            if self._alive:
                reason = next(iter(str(mine or error).splitlines()), type(error).__name__)
                say(f"a Ray Train run of the sweep was lost for good, {self._alive} left: {reason}")
                return
            self._fail(
                mine
                or train.TrainingError(
                    f"the training workers could not be kept up: {error}\nWhat was trained is kept; the same command continues"
                )
            )

    def close(self) -> None:
        """No more models; waits until the workers have ended, so that what they had is free again."""
        self._ray.get(self._queue.close.remote())
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _serve(settings: dict[str, Any]) -> None:
    """What each worker runs: take a model, train and measure it, until there will be none any more."""
    import ray
    import ray.train.torch

    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    root, queue, number = Storage(settings["root"]), settings["queue"], settings["run"]
    objective = from_dict(Objective, settings["objective"])
    data = train.DataCache(root, rank, world, device)
    meter: Meter | None = None

    def agreed(ask: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank."""
        found = [ask() if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(found, src=0, device=device)
        return found[0]

    def next_order() -> tuple[dict[str, Any] | None, str]:
        order = ray.get(queue.take.remote(number))
        return order, _what_is_left(root / order["address"], objective) if order else ""

    def load(order: Mapping[str, Any]) -> None:
        """The data that all trials share, before the model that is trained on them: damaged, they are not that model's fault."""
        data.get("train", order["pyramids"], levels=stored_levels(from_dict(TrainConfig, order["config"])))
        data.get("validation", order["pyramids"], levels=False)

    def serve(order: Mapping[str, Any], left: str) -> tuple[str, str]:
        """State and reason."""
        home = root / order["address"]
        try:
            if left == "train":
                between = _Between(
                    meter,
                    home,
                    objective,
                    agreed,
                    lambda a=order["address"]: ray.get(queue.cancelled.remote(a, number)),
                )
                train.train_model(dict(order), home, data, settings, between)
                return ("" if between.stopped else DONE), ""
            if left == "measure":
                _measure_finished(home, meter, objective)
            elif left == DIVERGED:
                raise train.NonFiniteLoss(home.read_json(NOT_FINITE)["step"])
        except train.NonFiniteLoss as e:  # on every rank alike
            if rank == 0:
                home.write_json(NOT_FINITE, {"step": e.step})
            return DIVERGED, f"the loss was not finite at step {e.step}"
        return DONE, ""

    while True:
        try:
            order, left = agreed(next_order)
            if order is None:
                return
            if not order:
                time.sleep(POLL_S)
                continue
            if left == "train":
                load(order)
            meter = meter or Meter(objective, root, rank, world, device)
        except (UserError, OSError) as e:  # storage or shards: of no one model, and every next one would fail too
            ray.get(queue.close.remote(str(e) if isinstance(e, UserError) else f"{root.uri} cannot be read: {e}"))
            if world > 1:
                raise
            continue
        try:
            state, reason = serve(order, left)
        except StorageError as e:
            ray.get(queue.close.remote(str(e)))
            if world > 1:
                raise
            continue
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            ray.get(queue.end.remote(order["address"], FAILED, reason))
            if world > 1:  # other ranks wait for this one within a step: only a new group comes out of that
                raise
            torch.cuda.empty_cache()
            continue
        if rank == 0:
            ray.get(queue.end.remote(order["address"], state, reason))


def _what_is_left(home: Storage, objective: Objective) -> str:
    if home.exists("model.json"):
        epochs = home.read_json("model.json")["train"]["epochs"]
        return DONE if home.exists(objective.file(epochs - 1)) else "measure"
    return DIVERGED if home.exists(NOT_FINITE) else "train"


class _Between(train.Between):
    """Measures each epoch, and stops a model that nobody wants any more."""

    def __init__(
        self,
        meter: Meter,
        home: Storage,
        objective: Objective,
        agreed: Callable[[Callable[[], Any]], Any],
        cancelled: Callable[[], bool],
    ) -> None:
        self.meter, self.home, self.objective = meter, home, objective
        self.agreed, self.cancelled = agreed, cancelled
        self.stopped = False

    def measure(self, loop: train.Loop, record: Mapping[str, Any]) -> None:
        epoch, clean = record["epoch"], record["validation"]["accuracy"]
        found = self.meter.record(classifier_of(loop.net), epoch, clean, record["seconds"])
        if self.meter.rank == 0:
            self.home.write_json(self.objective.file(epoch), found)

    def stop(self, loop: train.Loop) -> bool:
        self.stopped = bool(self.agreed(self.cancelled))
        return self.stopped


def _measure_finished(home: Storage, meter: Meter, objective: Objective) -> None:
    """A model that another run trained, which did not measure it: its last epoch alone can be."""
    model = home.read_json("model.json")
    epoch, clean = model["train"]["epochs"] - 1, model["validation"]["accuracy"]
    classifier = checkpoints.load_classifier(home.uri, meter.device)
    found = meter.record(classifier, epoch, clean, 0.0)
    if meter.rank == 0:
        home.write_json(objective.file(epoch), found)
