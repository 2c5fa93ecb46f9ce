"""Early stopping of trials by asynchronous successive halving (ASHA)."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from pipeline.sweep.search.monitor import SweepMonitor
from pipeline.sweep.sweep_directory import Sweep


def grace_of(sweep: Sweep) -> int:
    """Return after how many epochs a trial may first be stopped early; 0 if none is."""
    asha = sweep.space.asha
    return asha.grace_epochs if asha is not None and asha.grace_epochs < sweep.base.epochs else 0


def early_stopping(monitor: SweepMonitor) -> Any:
    """Return an ASHA scheduler that knows the trials of earlier commands, or None."""
    sweep = monitor.sweep
    asha = sweep.space.asha
    if asha is None or not grace_of(sweep):
        return None
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """ASHA that identifies trials by their number in the record.

        A trial that goes on under another id of Tune's has passed the epochs that it had passed.
        Tune pickles this class, and so whatever it refers to.
        """

        def numbered(self, number: int) -> Any:
            """Return the trial of a number as ASHAScheduler knows it."""
            trial = SimpleNamespace(trial_id=str(number))
            if trial.trial_id not in self._trial_info:
                super().on_trial_add(None, trial)  # type: ignore[arg-type]
            return trial

        def add_epoch(self, number: int, result: dict[str, Any]) -> str:
            """Take an epoch of a trial into account, and return the decision about the trial."""
            decision: str = super().on_trial_result(None, self.numbered(number), result)  # type: ignore[arg-type]
            return decision

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            """Do nothing: the trial's number is known when it starts."""

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            """Do nothing: the trial never started."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = self.add_epoch(monitor.number(trial.trial_id), result)
            at_end = result["epoch"] >= monitor.plan.base.epochs
            if decision == TrialScheduler.STOP and not at_end and monitor.is_trained(trial.trial_id):
                # The trial has trained to its end: stopping it now would save no compute.
                return TrialScheduler.CONTINUE
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, self.numbered(monitor.number(trial.trial_id)), result)

    scheduler = Asha(
        time_attr="epoch",
        metric="robust",
        mode="max",
        max_t=sweep.base.epochs,
        grace_period=asha.grace_epochs,
        reduction_factor=asha.reduction,
    )
    for trial in sweep.trials:
        for scores in trial.epochs:
            scheduler.add_epoch(trial.number, asdict(scores))
    return scheduler
