"""The trial table of a sweep: live on a terminal, now and then in a log."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from pipeline.runtime import console as runtime_console
from pipeline.runtime.console import PLAIN_INTERVAL_S
from pipeline.sweep.report import live_table
from pipeline.sweep.report.live_table import LOG_INTERVAL_S, LOG_ROWS, LOG_WIDTH, SPARE_LINES, TrialTable
from pipeline.sweep.trials.entry import EpochScores, TrialEntry
from pipeline.sweep.trials.states import TrialState


def entry(number: int, state: TrialState, robust: float | None = None) -> dict[str, Any]:
    epochs = () if robust is None else (EpochScores(epoch=2, clean=0.912, robust=robust, each=(), n=100),)
    return TrialEntry(
        number=number,
        parameters={"lam": 0.0123 * number, "shared_blocks": number % 4 + 1},
        state=state,
        reason="at step 7" if state == "diverged" else "",
        epochs=epochs,
        seconds=41.6 if epochs else 0.0,
    ).to_json()


def record(*trials: dict[str, Any]) -> dict[str, Any]:
    return {"space": {"parameters": {"lam": {}, "shared_blocks": {}}}, "trials": list(trials)}


def console(monkeypatch: pytest.MonkeyPatch, **more: Any) -> io.StringIO:
    """The terminal or log that a sweep writes to from now on."""
    file = io.StringIO()
    made = Console(file=file, highlight=False, soft_wrap=True, **more)
    monkeypatch.setattr(runtime_console, "console", made)
    monkeypatch.setattr(live_table, "console", made)
    return file


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return console(monkeypatch, force_terminal=True, width=100, height=20)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """As a job has it: no terminal, and so 80 columns."""
    return console(monkeypatch, force_terminal=False, width=80)


def rows(drawn: str) -> list[list[str]]:
    """The cells of the table's rows, of the last table that was drawn."""
    lines = [line.split() for line in Text.from_ansi(drawn.rpartition("trials ended")[2]).plain.splitlines()]
    return [line for line in lines if line and line[0].isdigit()]


def test_the_live_table_follows_the_record_while_the_sweep_runs(terminal: io.StringIO) -> None:
    trials = record(entry(1, "running"), entry(2, "running"), entry(3, "pending"))
    live: dict[int, str] = {}
    table = TrialTable(trials, live, 3)
    with table.shown():
        first = terminal.getvalue()
        live[1] = "step 3 of 16"
        trials["trials"][0] = entry(1, "running", 0.25)
        trials["trials"][1] = entry(2, "diverged")
        table.print_progress()  # It prints to logs only.
    assert "0 of 3 trials ended" in first
    assert rows(first) == [["1", "0.0123", "2", "(waiting)"], ["2", "0.0246", "3", "(waiting)"]]
    last = terminal.getvalue()[len(first) :]
    assert last.count("1 of 3 trials ended") == 1
    assert rows(last)[0] == ["1", "0.0123", "2", "91.2", "25.0", "2", "42", *["(epoch", "2,", "step", "3", "of", "16)"]]
    assert rows(last)[1] == ["2", "0.0246", "3", "diverged"]
    assert "\x1b[" in last, "drawn over the one before"
    table.print()
    assert "\x1b[1A" not in terminal.getvalue().rpartition("trials ended")[2], "the last one stays"


def test_where_there_are_more_trials_than_lines_those_that_run_and_the_best_are_shown(terminal: io.StringIO) -> None:
    ended = [entry(i, "finished", i / 100) for i in range(1, 41)]
    table = TrialTable(record(*ended, entry(41, "running"), entry(42, "pending")), {}, 42)
    with table.shown():
        pass
    shown = rows(terminal.getvalue())
    assert [int(row[0]) for row in shown] == [*range(30, 42)][-(20 - SPARE_LINES) :]
    assert "those that run, and the most robust" in terminal.getvalue()
    before = len(terminal.getvalue())
    table.print()
    assert [int(row[0]) for row in rows(terminal.getvalue()[before:])] == [*range(1, 42)], "at the end all"


def test_the_line_of_a_log_says_how_far_it_is_and_what_is_best(log: io.StringIO) -> None:
    trials = record(entry(1, "finished", 0.2), entry(2, "stopped", 0.9), entry(3, "finished", 0.3), entry(4, "running"))
    table = TrialTable(trials, {4: "step 1 of 16"}, 8)
    line = table.line()
    assert line.startswith("trials: 3/8 ended; running: 4 (step 1 of 16); most robust so far: trial 3/8: lam=0.0369 ")
    assert "robust 30.0 % after epoch 2" in line
    assert TrialTable(record(), {}, 8).line() == "trials: 0/8 ended; running: none yet"


def test_a_log_gets_lines_and_a_table_once_more_trials_have_ended(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(live_table, "time", SimpleNamespace(monotonic=lambda: clock.now))
    trials = record(*(entry(i, "running") for i in range(1, 41)))
    table = TrialTable(trials, {}, 40)
    tables, most = 0, 0
    for second in range(600):
        clock.now += 1
        if second % 30 == 15:  # one ends every half minute
            number = second // 30 + 1
            trials["trials"][number - 1] = entry(number, "finished", 0.01 * number)
        before = len(log.getvalue())
        table.print_progress()
        if "trials ended" in (printed := log.getvalue()[before:]):
            tables, most = tables + 1, max(most, len(rows(printed)))
            if tables == 1:
                assert second == 15, "the first that ends is shown at once"
    assert tables == 600 // LOG_INTERVAL_S, "not one for each trial"
    assert most == LOG_ROWS
    lines = log.getvalue().count("most robust so far") + log.getvalue().count("running: 1 (waiting)")
    assert 600 / PLAIN_INTERVAL_S - 2 * tables <= lines <= 600 / PLAIN_INTERVAL_S
    for _ in range(2):
        before = len(log.getvalue())
        clock.now += LOG_INTERVAL_S + 1
        table.print_progress()
    assert "trials ended" not in log.getvalue()[before:], "nothing new"


def test_a_log_is_as_wide_as_the_table_needs(log: io.StringIO) -> None:
    values = {"reconstruction_weight": 3.21, "reconstruction_reduction": "mean", "lr_schedule": "one_cycle"}
    trials = {"space": {"parameters": values}, "trials": [{**entry(1, "finished", 0.2), "parameters": values}]}
    TrialTable(trials, {}, 1).print()
    assert rows(log.getvalue()) == [["1", "3.21", "mean", "one_cycle", "91.2", "20.0", "2", "42", "finished"]]
    assert log.getvalue().count("reconstruction") == 2, "no word is folded"
    assert 80 < max(map(len, log.getvalue().splitlines())) <= LOG_WIDTH
