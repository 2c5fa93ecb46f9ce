"""Early stopping of trials (ASHA)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.sweep.sweep_directory import Sweep
from pipeline.sweep.search.monitor import SweepMonitor


def grace_of(sweep: Sweep) -> int:
    """Epochs after which a trial may first be stopped early; 0: none is."""
    asha = sweep.space.asha
    return asha.grace_epochs if asha is not None and asha.grace_epochs < sweep.base.epochs else 0


def early_stopping(following: SweepMonitor) -> Any:
    """ASHA over the trials of the record, those of earlier commands included, or None."""
    sweep = following.sweep
    if not grace_of(sweep):
        return None
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Asha(ASHAScheduler):
        """Knows a trial by its number: one that goes on has passed what it had passed, whatever Tune calls it now. (Tune pickles this
        class, and so whatever it refers to.)"""

        def of(self, number: int) -> Any:
            known = SimpleNamespace(trial_id=str(number))
            if known.trial_id not in self._trial_info:
                super().on_trial_add(None, known)  # type: ignore[arg-type]
            return known

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            """Its number is known when it starts."""

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            """It never started."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            number = following.entries[trial.trial_id]["number"]
            decision: str = super().on_trial_result(controller, self.of(number), result)
            ends = result["epoch"] >= following.plan.base.epochs
            if decision == TrialScheduler.STOP and not ends and following.is_whole(trial.trial_id):
                return TrialScheduler.CONTINUE  # there is nothing left to be saved
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, self.of(following.entries[trial.trial_id]["number"]), result)

    asha = sweep.space.asha
    scheduler = Asha(
        time_attr="epoch",
        metric="robust",
        mode="max",
        max_t=sweep.base.epochs,
        grace_period=asha.grace_epochs,
        reduction_factor=asha.reduction,
    )
    for trial in sweep.trials:
        for epoch in trial["epochs"]:
            super(Asha, scheduler).on_trial_result(None, scheduler.of(trial["number"]), epoch)
    return scheduler
