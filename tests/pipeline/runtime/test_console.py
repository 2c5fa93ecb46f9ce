"""Progress: plain lines where there is no terminal, a live bar on one."""

from __future__ import annotations

import os
import re
import sys

import pytest
from terminal import Terminal

from pipeline.runtime import console


def test_plain_lines_say_how_far_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.stage("train") as bar:
        now[0] += 60  # workers start: no part of the pace
        bar.update(10, 110, "steps")
        now[0] += 20
        bar.update(30, 110, "steps")
        bar.update(31, 110, "steps")  # too soon for another line
        now[0] += 80
        bar.update(1, 9, "tests")  # other units, another pace
        now[0] += 20
        bar.update(5, 9, "tests")
        now[0] += 10
        bar.update(0, 76, "chunks")
        now[0] += 10
        bar.update(1, 76, "chunks")  # the first unit has the start of its worker in it
        now[0] += 10
        bar.update(11, 76, "chunks")
    lines = [" ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "train ...",
        "train: 10/110 steps (60 s)",
        "train: 30/110 steps (80 s, about 80 s left)",
        "train: 1/9 tests (160 s)",
        "train: 5/9 tests (180 s, about 20 s left)",
        "train: 0/76 chunks (190 s)",
        "train: 1/76 chunks (200 s)",
        "train: 11/76 chunks (210 s, about 65 s left)",
        "train: done in 210.0 s",
    ]


LIVE = """
import time
from pipeline.runtime.console import say, stage
with stage("Ray"):
    time.sleep(0.3)
with stage("train") as bar:
    time.sleep(0.3)
    say("first model: done")
    bar.update(1, 3, "models")
    time.sleep(1.2)
    say("second model: done")
say("finished")
"""


def test_a_terminal_shows_the_time_of_every_line_and_no_unknown_totals() -> None:
    with Terminal([sys.executable, "-c", LIVE], {**os.environ, "TERM": "xterm", "COLUMNS": "120"}) as shown:
        assert shown.end() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.text).replace("\r", "\n")
    for line in ("Ray: done in", "first model: done", "second model: done", "train: done in", "finished"):
        assert re.search(rf"^\d\d:\d\d:\d\d {line}", text, re.MULTILINE), text
    assert "None" not in text
    assert re.search(r"train .* 1/3 models 0:0\d elapsed", text)
    assert "left" not in text.partition("1/3 models")[0], "nothing is known before the first model"


def test_tables_are_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.table_console().width == 100
    monkeypatch.setenv("COLUMNS", "160")
    assert console.table_console().width == 160
