"""What a person sees of a sweep while it goes on: a live table on a terminal, plain lines elsewhere."""

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

STYLES = {"finished": "green", "running": "bold", "stopped": "dim", "diverged": "red", "failed": "red"}
SPARE_LINES = 8
"""Of a terminal, for what stands around the table."""
LOG_ROWS = 20
LOG_WIDTH = 120
LOG_INTERVAL_S = 60.0
"""The least time between two tables where there is no terminal, as in the log of a job; each also shows another trial that ended."""


class TrialTable:
    """The trials of a record, drawn anew whenever the terminal asks.

    Args:
        record: sweep.json, changed by others meanwhile.
        live: trial number -> how far it is.
        total: trials in all.
    """

    def __init__(self, record: Mapping[str, Any], live: Mapping[int, str], total: int) -> None:
        self.record, self.live, self.total = record, live, total
        self.is_live = console.is_terminal
        self._said = time.monotonic()
        self._drawn_at = -math.inf
        self._drawn_ended = self._ended()

    def _ended(self) -> int:
        return sum(t["state"] not in ("pending", "running") for t in list(self.record["trials"]))

    def tell(self) -> None:
        """Where there is no terminal: a line now and then, and the table once more trials have ended. Call it about once a second."""
        now = time.monotonic()
        if self.is_live:
            return
        if (ended := self._ended()) > self._drawn_ended and now - self._drawn_at >= LOG_INTERVAL_S:
            self._drawn_at, self._drawn_ended, self._said = now, ended, now
            self._print(LOG_ROWS)
        elif now - self._said >= PLAIN_INTERVAL_S:
            self._said = now
            say(self.line())

    def line(self) -> str:
        """All of it in one line, where there is no terminal."""
        trials = list(self.record["trials"])
        running = [f"{t['number']} {self._now(t)}" for t in trials if t["state"] == "running"]
        best = summary.best_so_far(trials)
        shown = "" if best is None else f"; most robust so far: {summary.trial_line(best, self.total)}"
        return f"trials: {self._ended()}/{self.total} ended; running: {', '.join(running) or 'none yet'}{shown}"

    def _now(self, trial: Mapping[str, Any]) -> str:
        epochs = trial["epochs"]
        done = f"epoch {epochs[-1]['epoch']}, " if epochs else ""
        return f"({done}{self.live.get(trial['number'], 'waiting')})"

    def __rich__(self) -> Table:
        return self._drawn(console.height - SPARE_LINES)

    def _drawn(self, rows: int | None) -> Table:
        trials = [t for t in list(self.record["trials"]) if t["state"] != "pending"]
        ended = sum(t["state"] != "running" for t in trials)
        table = Table(box=box.SIMPLE_HEAD, title=f"{ended} of {self.total} trials ended", title_justify="left")
        names = list(self.record["space"]["parameters"])
        if rows is not None and len(trials) > rows:  # those that run, and the most robust
            first = sorted(trials, key=lambda t: (t["state"] != "running", -summary.robust_of(t)))
            trials = sorted(first[: max(rows, 1)], key=lambda t: t["number"])
            table.caption = "those that run, and the most robust"
        cells = [self._cells(trial, names) for trial in trials]
        for i, head in enumerate(("trial", *names, "clean %", "robust %", "epochs", "seconds")):
            # where it is narrow a heading is folded, between its words, and no number is
            widest = max((len(row[i]) for row in cells), default=0)
            table.add_column(head.replace("_", " "), justify="right", overflow="fold", min_width=widest)
        table.add_column("state", no_wrap=True)
        for trial, row in zip(trials, cells, strict=True):
            table.add_row(*row, style=STYLES.get(trial["state"], ""))
        return table

    def _cells(self, trial: Mapping[str, Any], names: list[str]) -> list[str]:
        epochs = trial["epochs"]
        return [
            str(trial["number"]),
            *(summary.value_text(trial["parameters"][name]) for name in names),
            *((f"{100 * epochs[-1][k]:.1f}" for k in ("clean", "robust")) if epochs else ("", "")),
            str(epochs[-1]["epoch"]) if epochs else "",
            f"{trial['seconds']:.0f}" if trial["seconds"] else "",
            self._now(trial) if trial["state"] == "running" else trial["state"],
        ]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live while the body runs, on a terminal; nothing elsewhere."""
        if not self.is_live:
            yield
            return
        with Live(self, console=console, refresh_per_second=2, transient=True):
            yield

    def print(self) -> None:
        """All trials, once."""
        self._print(None)

    def _print(self, rows: int | None) -> None:
        # a log has no width
        wide = console if self.is_live else Console(file=console.file, width=max(console.width, LOG_WIDTH))
        wide.print(self._drawn(rows))
        console.file.flush()
