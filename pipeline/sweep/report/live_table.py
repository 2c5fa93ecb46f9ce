"""Progress of a sweep: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.runtime.console import PLAIN_INTERVAL_S, console, say
from pipeline.sweep.report import summary
from pipeline.sweep.trials.entry import TrialEntry, trials_of
from pipeline.sweep.trials.states import DIVERGED, FAILED, FINISHED, PENDING, RUNNING, STOPPED

STYLES = {FINISHED: "green", RUNNING: "bold", STOPPED: "dim", DIVERGED: "red", FAILED: "red"}
SPARE_LINES = 8
"""Lines of a terminal that are left for what stands around the table."""
LOG_ROWS = 20
LOG_WIDTH = 120
LOG_INTERVAL_S = 60.0
"""Least time between two tables in a log. Each of them also shows that another trial ended."""


class TrialTable:
    """The trials of a record, drawn anew whenever the terminal asks.

    Args:
        record: sweep.json, which other threads change meanwhile.
        live: trial number -> how far its models are.
        total: number of trials of the sweep.
    """

    def __init__(self, record: Mapping[str, Any], live: Mapping[int, str], total: int) -> None:
        self.record, self.live, self.total = record, live, total
        self.is_live = console.is_terminal
        self._printed_at = time.monotonic()
        self._drawn_at = -math.inf
        self._drawn_ended = self._count_ended()

    def _count_ended(self) -> int:
        return sum(trial.is_over for trial in trials_of(self.record))

    def print_progress(self) -> None:
        """Print to a log a line now and then, and the table once more trials have ended.

        Call it about once a second.
        """
        if self.is_live:
            return
        now = time.monotonic()
        if (ended := self._count_ended()) > self._drawn_ended and now - self._drawn_at >= LOG_INTERVAL_S:
            self._drawn_at, self._drawn_ended, self._printed_at = now, ended, now
            self.print(LOG_ROWS)
        elif now - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = now
            say(self.line())

    def line(self) -> str:
        """Return the progress of all trials in one line."""
        trials = trials_of(self.record)
        running = ", ".join(f"{t.number} {self._progress_of(t)}" for t in trials if t.state == RUNNING)
        best = summary.best_so_far(trials)
        best_text = "" if best is None else f"; most robust so far: {summary.trial_line(best, self.total)}"
        return f"trials: {self._count_ended()}/{self.total} ended; running: {running or 'none yet'}{best_text}"

    def _progress_of(self, trial: TrialEntry) -> str:
        epoch = f"epoch {trial.last.epoch}, " if trial.epochs else ""
        return f"({epoch}{self.live.get(trial.number, 'waiting')})"

    def __rich__(self) -> Table:
        return self._draw(console.height - SPARE_LINES)

    def _draw(self, rows: int | None) -> Table:
        trials = [trial for trial in trials_of(self.record) if trial.state != PENDING]
        ended = sum(trial.is_over for trial in trials)
        table = Table(box=box.SIMPLE_HEAD, title=f"{ended} of {self.total} trials ended", title_justify="left")
        parameters = list(self.record["space"]["parameters"])
        if rows is not None and len(trials) > rows:
            ranked = sorted(trials, key=lambda t: (t.state != RUNNING, -summary.robust_of(t)))
            trials = sorted(ranked[: max(rows, 1)], key=lambda t: t.number)
            table.caption = "those that run, and the most robust"
        cells = [self._cells(trial, parameters) for trial in trials]
        for i, heading in enumerate(("trial", *parameters, "clean %", "robust %", "epochs", "seconds")):
            # In a narrow table a heading is folded between its words, but no number is.
            widest = max((len(row[i]) for row in cells), default=0)
            table.add_column(heading.replace("_", " "), justify="right", overflow="fold", min_width=widest)
        table.add_column("state", no_wrap=True)
        for trial, row in zip(trials, cells, strict=True):
            table.add_row(*row, style=STYLES.get(trial.state, ""))
        return table

    def _cells(self, trial: TrialEntry, parameters: list[str]) -> list[str]:
        scores = ["", "", ""]
        if trial.epochs:
            scores = [f"{100 * trial.last.clean:.1f}", f"{100 * trial.last.robust:.1f}", str(trial.last.epoch)]
        return [
            str(trial.number),
            *(summary.value_text(trial.parameters[name]) for name in parameters),
            *scores,
            f"{trial.seconds:.0f}" if trial.seconds else "",
            self._progress_of(trial) if trial.state == RUNNING else trial.state,
        ]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table on a terminal while the body runs. In a log, show nothing."""
        if not self.is_live:
            yield
            return
        with Live(self, console=console, refresh_per_second=2, transient=True):
            yield

    def print(self, rows: int | None = None) -> None:
        """Print the trials once: all, or the most important in so many rows."""
        # A log has no width of its own.
        wide = console if self.is_live else Console(file=console.file, width=max(console.width, LOG_WIDTH))
        wide.print(self._draw(rows))
        console.file.flush()
