"""Search by Optuna's TPE. A module of its own, since only TPE needs Optuna."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from components.search_space import DRAWS_PER_TRIAL, Point, Space
from pipeline.sweep.search.study import distributions


class UnrepeatedSearch(OptunaSearch):
    """Ray Tune's search by Optuna, but it proposes no point twice.

    The same point and seed would train the same model again.

    Args:
        proposed: points that were proposed before. Those that the study has waiting
            (``enqueue_trial``) come all the same.
    """

    def __init__(self, space: Space, proposed: Iterable[Point], **more: Any) -> None:
        super().__init__(distributions(space.to_dict()["parameters"]), **more)
        self._points = space
        self._proposed = {_key(point) for point in proposed}

    @property
    def study(self) -> Any:
        """Optuna's study, in which the trials are."""
        return self._ot_study

    def suggest(self, trial_id: str) -> Any:
        """Return the next point, or ``Searcher.FINISHED`` once the space has no more."""
        for _ in range(DRAWS_PER_TRIAL):
            waiting = bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
            point: Any = super().suggest(trial_id)
            if waiting or _key(point) not in self._proposed:
                self._proposed.add(_key(point))
                return point
            # The sampler learns nothing from a failed trial.
            self.study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            if self._points.size == len(self._proposed):
                return str(self.FINISHED)
        unproposed = (p for p in self._points.grid() if _key(p) not in self._proposed)
        if point := next(unproposed, None):
            self.study.enqueue_trial(point)
        return self.suggest(trial_id)


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))
