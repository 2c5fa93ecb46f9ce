"""Every recipe by its name, with its cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from components.config import Experiment
from pipeline.recipes.mnist import mnist, mnist_demo, mnist_slim, mnist_smoke
from pipeline.recipes.paper import PAPER
from pipeline.recipes.scales import SCALES


def summary_of(make: Callable[[str], Experiment]) -> str:
    """Return the first line of a recipe function's docstring."""
    return (make.__doc__ or "").partition("\n")[0]


def _described(make: Callable[[str], Experiment], name: str, scale: str) -> Experiment:
    """Make a recipe at a scale, with a description."""
    description = f"{summary_of(make)} Scale {scale}: {SCALES[scale]}."
    return replace(make(scale), name=f"{name}-{scale}", description=description)


@dataclass(frozen=True)
class Recipe:
    """A recipe and its cost, which was measured or, if the recipe was not run, estimated."""

    make: Callable[[], Experiment]
    cost: str


RECIPES: dict[str, Recipe] = {
    "mnist-smoke": Recipe(mnist_smoke, "2 to 4 minutes on 2 cores"),
    "mnist-demo": Recipe(mnist_demo, "5 minutes on 2 quiet cores without a GPU"),
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
