"""Every recipe by its name."""

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
    """A recipe, alone or one scale of several."""

    make: Callable[[], Experiment]
    base: str
    """Name without the scale, which tables and figures have at its end."""
    scale: str = ""
    """One of SCALES, or empty."""

    @property
    def summary(self) -> str:
        """Return in one line what the recipe shows, at any of its scales."""
        return summary_of(PAPER[self.base]) if self.base in PAPER else self.make().description


RECIPES: dict[str, Recipe] = {
    "mnist-demo": Recipe(mnist_demo, "mnist-demo"),
    "mnist-smoke": Recipe(mnist_smoke, "mnist-smoke", "smoke"),
    "mnist-slim": Recipe(mnist_slim, "mnist-slim", "slim"),
    "mnist": Recipe(mnist, "mnist", "fast"),
}
for _name, _make in sorted(PAPER.items()):
    for _scale in SCALES:
        _full = f"{_name}-{_scale}"
        RECIPES[_full] = Recipe(functools.partial(_described, _make, _name, _scale), _name, _scale)
    RECIPES[_name] = RECIPES[f"{_name}-fast"]  # A table's name alone is its scale "fast".


def scales_of(base: str) -> tuple[str, ...]:
    """Return the scales that follow the name of a recipe; () if it comes at one alone."""
    return tuple(SCALES) if base in PAPER else ()


BASES = tuple(dict.fromkeys(recipe.base for recipe in RECIPES.values()))
"""Names of the recipes without their scales."""
