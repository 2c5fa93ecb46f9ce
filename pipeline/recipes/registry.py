"""Every recipe by its name, with what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from components.config import Experiment
from pipeline.recipes.mnist import mnist, mnist_demo, mnist_slim, mnist_smoke
from pipeline.recipes.paper import PAPER
from pipeline.recipes.scales import SCALES


def _described(make: Callable[[str], Experiment], name: str, scale: str) -> Experiment:
    """The recipe with its function's docstring as its description."""
    said = (make.__doc__ or "").partition("\n")[0]
    return replace(make(scale), name=f"{name}-{scale}", description=f"{said} Scale {scale}: {SCALES[scale]}.")


@dataclass(frozen=True)
class Recipe:
    """A recipe and what it costs, as measured or, where it was not run, as counted."""

    make: Callable[[], Experiment]
    cost: str


RECIPES: dict[str, Recipe] = {
    "mnist-smoke": Recipe(mnist_smoke, "2 to 4 minutes on 2 cores"),
    "mnist-demo": Recipe(mnist_demo, "6 to 8 minutes on 2 quiet cores without a GPU"),
    "mnist-slim": Recipe(mnist_slim, "8 minutes a seed on 2 cores"),
    "mnist": Recipe(mnist, "not measured yet: needs a GPU"),
}
_COSTS = {
    **dict.fromkeys(("table1-smoke", "table3-smoke", "table6-smoke"), "2 minutes"),
    **dict.fromkeys(("table5-smoke", "table7-smoke"), "1 minute"),
    "table1-slim": "40 minutes a seed",
    "eq3-slim": "30 minutes a seed",
    "robustness-slim": "about 4 hours",
}
"""Measured on 2 cores of an AMD EPYC without a GPU, 2026-11-23."""

for _name, (_make, _scales) in sorted(PAPER.items()):
    for _scale in _scales:
        _full = f"{_name}-{_scale}"
        RECIPES[_full] = Recipe(functools.partial(_described, _make, _name, _scale), _COSTS.get(_full, SCALES[_scale]))
    RECIPES[_name] = Recipe(RECIPES[f"{_name}-fast"].make, SCALES["fast"])
