"""A space in Optuna's terms. A module of its own, since only TPE needs Optuna."""

from __future__ import annotations

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from components.search import Choice, IntRange, LogUniform, Space


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
