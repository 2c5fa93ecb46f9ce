"""A trial of a sweep as Ray Tune runs it.

It requests its models, follows their records on storage, and reports each epoch. This module does
not import torch: a trial's process trains nothing (worker.py does), and must stay small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from components.errors import UserError
from pipeline.runtime.storage import Storage, StorageError
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import DIVERGED, FAILED, FINISHED, RUNNING
from pipeline.training.jobs import TrainingJob

POLL_S = 0.5
WORST = {"clean": 0.0, "robust": 0.0}
"""Scores of a trial that failed, so that the search avoids its point."""


def run_trial(config: dict[str, Any], *, plan: SweepPlan, queue: JobQueue) -> None:
    """Run a trial: the trainable of Ray Tune.

    A trial that was killed and started again finds everything on storage and reports it again. A
    trial that fails reports that instead of raising, since Tune would start it again.

    Args:
        config: {"listed": {"values": point, ...}}, or the point itself.
    """
    from ray import tune

    try:
        jobs = plan.jobs(config["listed"]["values"] if "listed" in config else config)
    except UserError as e:
        seconds = {"training_seconds": 0.0, "objective_seconds": 0.0}
        tune.report({**WORST, **seconds, "epoch": plan.base.epochs, "state": FAILED, "reason": str(e)})
        return
    trial = tune.get_context().get_trial_id()
    requests = [job.request() for job in jobs]
    progress = TrialProgress(jobs, plan.objective, Storage(plan.root))
    while True:
        states = queue.follow(requests, trial)
        results = []
        # The workers, which must write to the storage, decide when to give it up.
        with suppress(StorageError, OSError):
            results = progress.new_results()
        for result in results:
            tune.report(result)
        if progress.finished:
            return
        for state, reason in states:
            if state in (DIVERGED, FAILED):
                tune.report({**WORST, **progress.totals(), "state": state, "reason": reason})
                return
        time.sleep(POLL_S)


class TrialProgress:
    """Follows the objectives of a trial's models on the storage."""

    def __init__(self, jobs: Sequence[TrainingJob], objective: Objective, root: Storage) -> None:
        self.jobs, self.objective, self.root = jobs, objective, root
        self.finished = False
        self._measured: list[dict[int, dict[str, Any]]] = [{} for _ in jobs]
        """For each model: epoch -> record of its objective."""
        self._last_reported = -1

    def new_results(self) -> list[dict[str, Any]]:
        """Return a result for each epoch that all models have reached since the last call.

        The last epoch's result, which ends the trial, comes only once every model is exported.
        """
        exported = True
        for job, measured in zip(self.jobs, self._measured, strict=True):
            home = self.root / job.address
            # Check model.json first: it is written last, so all objectives exist once it does.
            exported = home.exists("model.json") and exported
            for name in home.list(self.objective.directory):
                epoch = int(name.removeprefix("epoch-").removesuffix(".json"))
                if epoch not in measured:
                    try:
                        measured[epoch] = home.read_json(f"{self.objective.directory}/{name}")
                    except StorageError:  # The file is being replaced. The next call reads it.
                        exported = False
        last = self.jobs[0].config.epochs - 1
        common = set.intersection(*map(set, self._measured))
        new = sorted(e for e in common if e > self._last_reported and (e < last or exported))
        if new:
            self._last_reported = new[-1]
            self.finished = self._last_reported == last
        return [self._result(epoch) for epoch in new]

    def _result(self, epoch: int) -> dict[str, Any]:
        records = [measured[epoch] for measured in self._measured]
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
        """Return the seconds of all models so far, and the number of epochs of the schedule."""
        records = [record for measured in self._measured for record in measured.values()]
        return {
            "epoch": self.jobs[0].config.epochs,
            "training_seconds": sum(r["training_seconds"] for r in records),
            "objective_seconds": sum(r["seconds"] for r in records),
        }
