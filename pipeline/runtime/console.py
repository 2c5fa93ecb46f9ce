"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from pipeline.runtime import interrupts

# In a notebook, rich would show each line as a block of HTML, and no bar without ipywidgets.
console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
PLAIN_INTERVAL_S = 10.0
"""Shortest time between two plain lines of a stage."""


def say(text: str) -> None:
    """Print a line with the time of day at once."""
    # One call: below a live bar, rich redraws the line of a text that does not end it.
    console.print(Text.assemble((time.strftime("%H:%M:%S"), "dim"), " ", text))
    sys.stdout.flush()


def table_console() -> Console:
    """Return the console for tables: as wide as the terminal or $COLUMNS, and 100 columns in a pipe."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else 100)


class _Count(ProgressColumn):
    """What is done, and a note on it, which is cut off where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        """Return the text of the last update."""
        return Text(task.fields["count"], no_wrap=True, overflow="ellipsis")


class _Clocks(ProgressColumn):
    """Time since the stage began, and an estimate of what is left."""

    def render(self, task: Task) -> Text:
        """Return both times in words."""
        clocks = f"{_clock(task.elapsed or 0)} elapsed"
        if task.total is not None and task.time_remaining is not None:
            clocks += f", {_clock(task.time_remaining)} left"
        return Text(clocks, style="dim")


def _clock(seconds: float) -> str:
    """Return seconds as ``1:02`` or ``1:00:02``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """The progress of a stage. One thread may update it at any rate."""

    def __init__(self, title: str, live: Progress | None) -> None:
        self.title = title
        self._live = live
        self._task = live.add_task(title, total=None, count="") if live else None
        self._start = time.monotonic()
        self._printed = self._start
        self._first: tuple[float, int, int] | None = None
        """Time, number done and total of the first update with this total and a unit done."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` units are done, with a note about them."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, count=f"{done}/{total} {note}")
            return
        now = time.monotonic()
        # Another total means other units with another pace: reliability tests come after chunks.
        # Until one is done, the workers start.
        if self._first is None or self._first[1] == 0 or self._first[2] != total:
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
            BarColumn(bar_width=20),
            _Count(),
            _Clocks(table_column=Column(no_wrap=True)),
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
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", text))
