"""Plain progress lines, where there is no terminal."""

from __future__ import annotations

import pytest

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
    lines = [" ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "train ...",
        "train: 10/110 steps (60 s)",
        "train: 30/110 steps (80 s, about 80 s left)",
        "train: 1/9 tests (160 s)",
        "train: 5/9 tests (180 s, about 20 s left)",
        "train: done in 180.0 s",
    ]
