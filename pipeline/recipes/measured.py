"""What recipes cost where they were run: ``measured.csv``, a line a recipe."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.csv")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time of a whole run, with its provenance."""

    recipe: str
    seeds: int
    """Replicates of each model in that run."""
    seconds: int
    """Wall-clock of the run, or the sum of its stages."""
    machine: str
    date: str
    """ISO date."""
    revision: str
    """Commit that ran; empty if it is not recorded."""
    recorded_in: str
    """File that has the measurement."""
    note: str
    """Difference of that run from the recipe."""

    @property
    def duration(self) -> str:
        """Return the time as ``43 s``, ``40 min`` or ``2 h 54 min``."""
        if self.seconds < 60:
            return f"{self.seconds} s"
        hours, minutes = divmod(round(self.seconds / 60), 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


@functools.cache
def measurements() -> dict[str, Measurement]:
    """Return recipe -> its measurement. Other recipes were not measured."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values: list[dict[str, Any]] = [{**row, "seeds": int(row["seeds"]), "seconds": int(row["seconds"])} for row in rows]
    return {row["recipe"]: Measurement(**row) for row in values}
