"""The options of a sweep beside its recipe's fields. Imports nothing heavy, so that a typo is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What the command line says of a sweep beside the recipe's fields."""

    space: str
    trials: int | None = None
    search: str | None = None
    seed: int = 0
    max_concurrent: int = 0
    """0: as many models at once as there is room for."""
    resume: bool = False
    evaluate: Literal["full", "recipe", "none"] = "full"
    """Under which attacks the choice is tested, if it is."""
