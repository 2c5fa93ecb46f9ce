"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
PLAIN_INTERVAL_S = 10.0


def say(text: str) -> None:
    """One plain line, with the time of day, at once."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] ", end="")
    console.print(text, markup=False)
    sys.stdout.flush()


class Bar:
    """How far one stage is. ``update`` may be called as often as one likes, from any one thread."""

    def __init__(self, title: str, live: Progress | None) -> None:
        self.title = title
        self._live = live
        self._task = live.add_task(title, total=None, note="") if live else None
        self._start = time.monotonic()
        self._said = self._start
        self._first: tuple[float, int, int] | None = None

    def update(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units; ``note`` says what they are or how it goes."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        # another total is another kind of unit with a pace of its own: reliability tests come after chunks
        if self._first is None or self._first[2] != total:
            self._first = now, done, total
        if now - self._said < PLAIN_INTERVAL_S:
            return
        self._said = now
        # counted from the first sign of life: starting workers, and what an earlier run had done, is no measure of the rest
        since, before, _ = self._first
        left = f", about {(now - since) * (total - done) / (done - before):.0f} s left" if before < done < total else ""
        say(f"{self.title}: {done}/{total} {note} ({now - self._start:.0f} s{left})")


@contextmanager
def stage(title: str) -> Iterator[Bar]:
    """Show a stage from its begin to its end and say how long it took."""
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
    say(f"{title}: done in {time.monotonic() - start:.1f} s")


def complain(text: str) -> None:
    """One clear error, for a person."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(text)}")
