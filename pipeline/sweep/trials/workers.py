"""The Ray Train runs of a sweep: a few long-lived ones, which take model after model out of a queue.

Starting a Ray Train run costs half a minute on two cores, as much as a small model's training; so trials do not start one each.
A worker group that Ray Train starts again after a death takes up the model that it had.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from components.config import Experiment
from components.errors import UserError, first_line
from components.fields import from_dict, to_dict
from components.network import classifier_of
from pipeline.runtime.console import say
from pipeline.runtime.lease import WorkingLease
from pipeline.runtime.storage import Storage, StorageError
from pipeline.runtime.user_errors import unwrap
from pipeline.sweep.trials.objective import RobustAccuracyMeter
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.states import DIVERGED, DONE, FAILED
from pipeline.training import exports, loop, ray_runs, worker_group
from pipeline.training.jobs import NOT_FINITE
from pipeline.training.ranks import Ranks

POLL_S = 0.3
BUSY = "busy"
"""What is to be done with a model that another run is training: nothing. Its trial asks for it again."""
CLOSE_S = 60.0
"""How long the end of a sweep waits for its runs to end."""


class TrainingPool:
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
        plan: SweepPlan,
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
            "root": root.full_uri,
            "shapes": to_dict(plan.shapes),
            "objective": to_dict(plan.objective),
            "threads": experiment.scaling.threads_per_worker,
            "token": secrets.token_hex(8),
        }
        self._alive = runs
        self._lock = threading.Lock()

        def run(number: int) -> None:
            try:
                ray_runs.fit_workers(_serve, {**settings, "run": number}, experiment, root, max_failures=deaths)
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
                say(f"a Ray Train run of the sweep was lost for good, {self._alive} left: {first_line(mine or error)}")
                return
            self._fail(
                mine
                or ray_runs.TrainingError(
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
    ranks = Ranks(rank, world, device)
    agreed = ranks.agreed
    root, queue, number = Storage(settings["root"]), settings["queue"], settings["run"]
    objective = from_dict(Objective, settings["objective"])
    data = worker_group.DataCache(root, ranks)
    meter: RobustAccuracyMeter | None = None

    lease = WorkingLease(root, f"{settings['token']}-{number}")

    def next_order() -> tuple[dict[str, Any] | None, str]:
        order = ray.get(queue.take.remote(number))
        return order, what_to_do(order) if order else ""

    def what_to_do(order: Mapping[str, Any]) -> str:
        home = root / order["address"]
        left = _what_is_left(home, objective)
        if left != "train":
            return left
        # the run that held it may have finished the model in between
        return _what_is_left(home, objective) if lease.try_take(order["address"]) else BUSY

    def serve(order: Mapping[str, Any], left: str) -> tuple[str, str]:
        """Return state and reason."""
        home = root / order["address"]
        if left == BUSY:
            time.sleep(POLL_S)
            return "", ""
        try:
            if left == "train":
                between = _Between(
                    meter,
                    home,
                    objective,
                    agreed,
                    lambda a=order["address"]: ray.get(queue.cancelled.remote(a, number)) or not lease.held,
                )
                worker_group.train_model(dict(order), home, data, settings, between)
                return ("" if between.stopped else DONE), ""
            if left == "measure":
                _measure_finished(home, meter, objective, order["config"]["arch"], agreed)
            elif left == DIVERGED:
                raise loop.NonFiniteLoss(agreed(lambda: home.read_json(NOT_FINITE)["step"]))
        except loop.NonFiniteLoss as e:  # on every rank alike
            if rank == 0:
                home.write_json(NOT_FINITE, {"step": e.step})
            return DIVERGED, f"the loss was not finite at step {e.step}"
        return DONE, ""

    def serve_next() -> bool:
        """Take the next model and see it through. Returns False where there will be none any more."""
        nonlocal meter
        try:
            order, left = agreed(next_order)
            if order is None:
                return False
            if not order:
                time.sleep(POLL_S)
                return True
            if left == "train":
                data.load(order)
            meter = meter or RobustAccuracyMeter(objective, root, rank, world, device)
        except (UserError, OSError) as e:  # storage or shards: of no one model, and every next one would fail too
            ray.get(queue.close.remote(str(e) if isinstance(e, UserError) else f"{root.uri} cannot be read: {e}"))
            if world > 1:
                raise
            return True
        try:
            state, reason = serve(order, left)
        except StorageError as e:
            ray.get(queue.close.remote(str(e)))
            if world > 1:
                raise
            return True
        except Exception as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            ray.get(queue.end.remote(order["address"], FAILED, reason))
            if world > 1:  # other ranks wait for this one within a step: only a new group comes out of that
                raise
            torch.cuda.empty_cache()
            return True
        if rank == 0:
            ray.get(queue.end.remote(order["address"], state, reason))
        return True

    while serve_next():
        lease.release()


def _what_is_left(home: Storage, objective: Objective) -> str:
    if home.exists("model.json"):
        epochs = home.read_json("model.json")["train"]["epochs"]
        return DONE if home.exists(objective.file(epochs - 1)) else "measure"
    return DIVERGED if home.exists(NOT_FINITE) else "train"


class _Between(worker_group.EpochCallback):
    """Measures each epoch, and stops a model that nobody wants any more."""

    def __init__(
        self,
        meter: RobustAccuracyMeter,
        home: Storage,
        objective: Objective,
        agreed: Callable[[Callable[[], Any]], Any],
        cancelled: Callable[[], bool],
    ) -> None:
        self.meter, self.home, self.objective = meter, home, objective
        self.agreed, self.cancelled = agreed, cancelled
        self.stopped = False

    def measure(self, loop: loop.TrainingLoop, record: Mapping[str, Any]) -> None:
        epoch, clean = record["epoch"], record["validation"]["accuracy"]
        found = self.meter.record(classifier_of(loop.net), epoch, clean, record["seconds"])
        if self.meter.rank == 0:
            self.home.write_json(self.objective.file(epoch), found)

    def stop(self, loop: loop.TrainingLoop) -> bool:
        self.stopped = bool(self.agreed(self.cancelled))
        return self.stopped


def _measure_finished(
    home: Storage,
    meter: RobustAccuracyMeter,
    objective: Objective,
    arch: str,
    agreed: Callable[[Callable[[], Any]], Any],
) -> None:
    """Measure a model that another run trained without measuring it: only its last epoch can be."""
    model = agreed(lambda: home.read_json("model.json"))
    epoch, clean = model["train"]["epochs"] - 1, model["validation"]["accuracy"]
    classifier = exports.load_classifier(home.full_uri, meter.device, trusted=arch)
    found = meter.record(classifier, epoch, clean, 0.0)
    if meter.rank == 0:
        home.write_json(objective.file(epoch), found)
