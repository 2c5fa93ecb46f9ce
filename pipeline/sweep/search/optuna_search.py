"""A space in Optuna's terms, and the search over it. A module of its own, since only TPE needs Optuna."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from components.search_space import DRAWS_PER_TRIAL, Choice, IntRange, LogUniform, Point, Space


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Parameter -> Optuna's distribution of its domain."""
    found: dict[str, BaseDistribution] = {}
    for name, domain in space.parameters.items():
        if isinstance(domain, Choice):
            found[name] = CategoricalDistribution(tuple(domain.values))
        elif isinstance(domain, IntRange):
            found[name] = IntDistribution(domain.low, domain.high)
        else:
            found[name] = FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))
    return found


class UnrepeatedSearch(OptunaSearch):
    """Ray Tune's search by Optuna, which proposes no point a second time: trained from the same seed it would be the same model.

    Args:
        space: what is searched.
        asked: the points that were proposed before. Those that the study has waiting (``enqueue_trial``) come all the same.
        more: arguments of OptunaSearch.
    """

    def __init__(self, space: Space, asked: Iterable[Point], **more: Any) -> None:
        super().__init__(distributions(space), **more)
        self._points = space
        self._asked = {_key(point) for point in asked}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next point; ``Searcher.FINISHED`` once the space has no more."""
        study: Study = self._ot_study
        for _ in range(DRAWS_PER_TRIAL):
            waiting = bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
            point = super().suggest(trial_id)
            if waiting or _key(point) not in self._asked:
                self._asked.add(_key(point))
                return point
            study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)  # the sampler learns nothing from it
            if self._points.size == len(self._asked):
                return str(self.FINISHED)
        left = (p for p in self._points.grid() if _key(p) not in self._asked)
        if point := next(left, None):
            study.enqueue_trial(point)
        return self.suggest(trial_id)


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))
