"""Progress of the attack stage, counted in chunks of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.addresses import ExampleSet

Progress = Callable[[int, int, str], None]
"""Called with the number of units that are done, the number of all units, and a note."""
Chunk = tuple[int, int, int]
"""Number of a chunk, its first row and the row after its last."""


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks of one set of examples, computed by one task."""

    examples: ExampleSet
    chunks: list[Chunk]

    def __str__(self) -> str:
        """Return the note of a progress line, e.g. ", ATTACK on MODEL"."""
        return f", {task_name(self.examples)}"


def task_name(examples: ExampleSet) -> str:
    """Return ``ATTACK on MODEL``, or what needs no model."""
    if examples.attack == "none":
        return "clean images"
    return f"{examples.attack} on {examples.source.name}" if examples.source else examples.attack


class AttackProgress:
    """Count of the chunks that are left, reported after every task."""

    def __init__(self, pending: Sequence[ChunkBatch], total: int, report: Progress) -> None:
        self._left: Counter[str] = Counter()
        for batch in pending:
            self._left[batch.examples.address] += len(batch.chunks)
        self._total = total
        self._report = report
        self._straggler = ""

    def is_complete(self, address: str) -> bool:
        """Tell whether every chunk of a set of examples is made and judged."""
        return self._left[address] == 0

    def finish(self, batch: ChunkBatch) -> None:
        """Count the chunks of a task that has ended, and report."""
        self._left[batch.examples.address] -= len(batch.chunks)
        self.report(str(batch))

    def note_straggler(self, note: str) -> None:
        """Append a note to every report until the next note, and report."""
        self._straggler = note
        self.report()

    def report(self, note: str = "") -> None:
        """Report the chunks done so far."""
        done = self._total - self._left.total()
        self._report(done, self._total, f"chunks{note}{self._straggler}")
