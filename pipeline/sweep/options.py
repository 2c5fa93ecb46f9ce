"""Options of a sweep on the command line. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Evaluate = Literal["full", "recipe", "none"]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of a sweep beside the recipe's fields."""

    space: str
    """A file, or the name of one in ``tune_spaces/``."""
    trials: int | None = None
    """Instead of the space's."""
    search: str | None = None
    """Instead of the space's."""
    seed: int = 0
    """Seed of the search."""
    max_concurrent: int = 0
    """How many models are trained at once. 0: as many as there is room for."""
    resume: bool = False
    """Refuse to begin a new sweep."""
    evaluate: Evaluate = "full"
    """Attacks under which the choice is tested on test images."""
