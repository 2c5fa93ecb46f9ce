"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.runtime import interrupts

# In a notebook, rich would show each line as a block of HTML, and no bar without ipywidgets.
console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
PLAIN_INTERVAL_S = 10.0
"""Shortest time between two plain lines of a stage."""


def say(text: str) -> None:
    """Print a line with the time of day at once."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] ", end="")
    console.print(text, markup=False)
    sys.stdout.flush()


class Bar:
    """The progress of a stage. One thread may update it at any rate."""

    def __init__(self, title: str, live: Progress | None) -> None:
        self.title = title
        self._live = live
        self._task = live.add_task(title, total=None, note="") if live else None
        self._start = time.monotonic()
        self._printed = self._start
        self._first: tuple[float, int, int] | None = None
        """Time, number done and total of the first update with this total."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` units are done, with a note about them."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        # Another total means other units with another pace: reliability tests come after chunks.
        if self._first is None or self._first[2] != total:
            self._first = now, done, total
        if now - self._printed < PLAIN_INTERVAL_S:
            return
        self._printed = now
        # The pace counts from the first update: start-up and units of an earlier run say nothing.
        begin, done_before, _ = self._first
        left = ""
        if done_before < done < total:
            left = f", about {(now - begin) * (total - done) / (done - done_before):.0f} s left"
        say(f"{self.title}: {done}/{total} {note} ({now - self._start:.0f} s{left})")


@contextmanager
def stage(title: str) -> Iterator[Bar]:
    """Show the progress of a stage, and print how long it took.

    Raises:
        KeyboardInterrupt: the command was interrupted during the stage, which did not notice.
    """
    start = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as live:
            yield Bar(title, live)
    else:
        say(f"{title} ...")
        yield Bar(title, None)
    interrupts.raise_received()
    say(f"{title}: done in {time.monotonic() - start:.1f} s")


def print_error(text: str) -> None:
    """Print an error to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(text)}")
