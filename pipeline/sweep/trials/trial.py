"""A trial of a sweep as Ray Tune runs it: says which models it wants, follows their records on storage, reports each epoch.

No torch here: a trial's process does no more than that (pipeline/sweep/trials/workers.py trains).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from components.errors import UserError
from components.search_space import Point
from pipeline.runtime.storage import Storage, StorageError
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.states import DIVERGED, FAILED, FINISHED, RUNNING
from pipeline.training.jobs import TrainingJob

POLL_S = 0.5


def run_trial(config: dict[str, Any], *, plan: SweepPlan, queue: Any) -> None:
    """The trainable. Killed and started again, it finds everything on storage and tells it again.

    Args:
        config: {"listed": {"values": point, ...}}, or the point itself.
        queue: handle of a JobQueue actor.
    """
    import ray
    from ray import tune

    # no exception where it cannot be: Tune would try again. To the search it is as bad as can be
    bad = {"clean": 0.0, "robust": 0.0, "state": FAILED}
    try:
        jobs = plan.jobs(config["listed"]["values"] if "listed" in config else config)
    except UserError as e:
        seconds = {"training_seconds": 0.0, "objective_seconds": 0.0}
        tune.report({**bad, **seconds, "epoch": plan.base.epochs, "reason": str(e)})
        return
    trial = tune.get_context().get_trial_id()
    orders = [job.request() for job in jobs]
    followed = TrialProgress(jobs, plan.objective, Storage(plan.root))
    while True:
        states = ray.get(queue.follow.remote(orders, trial))
        results = []
        with suppress(StorageError, OSError):  # out of reach: the workers, who must write, know when to give up
            results = followed.new_results()
        for result in results:
            tune.report(result)
        if followed.finished:
            return
        for state, reason in states:
            if state in (DIVERGED, FAILED):
                tune.report({**bad, **followed.totals(), "state": state, "reason": reason})
                return
        time.sleep(POLL_S)


class TrialProgress:
    """The objectives of a trial's models as they appear on storage."""

    def __init__(self, jobs: Sequence[TrainingJob], objective: Objective, root: Storage) -> None:
        self.jobs, self.objective, self.root = jobs, objective, root
        self.finished = False
        self._found: list[dict[int, dict[str, Any]]] = [{} for _ in jobs]
        self._told = -1

    def new_results(self) -> list[dict[str, Any]]:
        """A result for each epoch that all models have by now and that was not given before; the last one only once every
        model is exported, since a trial that has reported it is over."""
        whole = True
        for job, found in zip(self.jobs, self._found, strict=True):
            home = self.root / job.address
            whole = home.exists("model.json") and whole  # asked first: what it counts is there by then
            for name in home.list(self.objective.directory):
                epoch = int(name.removeprefix("epoch-").removesuffix(".json"))
                if epoch not in found:
                    try:
                        found[epoch] = home.read_json(f"{self.objective.directory}/{name}")
                    except StorageError:  # being replaced: at the next look
                        whole = False
        last = self.jobs[0].config.epochs - 1
        common = set.intersection(*(set(found) for found in self._found))
        ready = sorted(e for e in common if e > self._told and (e < last or whole))
        results = [self._result(e) for e in ready]
        if ready:
            self._told = ready[-1]
            self.finished = self._told == last
        return results

    def _result(self, epoch: int) -> dict[str, Any]:
        records = [found[epoch] for found in self._found]
        last = epoch == self.jobs[0].config.epochs - 1
        return {
            **self.totals(),
            "epoch": epoch + 1,
            "clean": statistics.fmean(r["clean"] for r in records),
            "robust": statistics.fmean(r["robust"] for r in records),
            "each": [[r["clean"], r["robust"]] for r in records],
            "n": records[0]["n"],
            "state": FINISHED if last else RUNNING,
        }

    def totals(self) -> dict[str, Any]:
        """Epochs (all of them, as a schedule counts) and seconds of training and measuring so far, over all models."""
        records = [r for found in self._found for r in found.values()]
        return {
            "epoch": self.jobs[0].config.epochs,
            "training_seconds": sum(r["training_seconds"] for r in records),
            "objective_seconds": sum(r["seconds"] for r in records),
        }


def new_entry(number: int, point: Point) -> dict[str, Any]:
    """What ``sweep.json`` holds of a trial that has not begun."""
    return {
        "number": number,
        "parameters": dict(point),
        "state": "pending",
        "reason": "",
        "epochs": [],
        "models": [],
        "seconds": 0.0,
        "training_seconds": 0.0,
        "objective_seconds": 0.0,
        "started": None,
    }
