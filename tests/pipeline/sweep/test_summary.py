"""The report of a sweep, from its record alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from sweeps import recipe

from components.evaluation.statistics import wilson_interval
from components.fields import to_dict
from components.search_space import Choice, IntRange, LogUniform, Space
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import html, plots, summary

BLOCKS = {"lam": LogUniform(1e-4, 10.0), "shared_blocks": IntRange(1, 4)}


def trial(number: int, point: dict[str, Any], *each: float) -> dict[str, Any]:
    """Return a trial that finished after one epoch, with the robust accuracy of each seed on 100 images."""
    mean = sum(each) / len(each)
    epoch = {"epoch": 1, "clean": 0.9, "robust": mean, "each": [[0.9, r] for r in each], "n": 100}
    return {
        "number": number,
        "parameters": point,
        "state": "finished",
        "reason": "",
        "epochs": [epoch],
        "models": [{"seed": i, "path": f"models/{number}-{i}"} for i in range(len(each))],
        "training_seconds": 1.0,
        "objective_seconds": 1.0,
        "seconds": 90.0,
        "started": f"2026-05-28T21:{number:02d}:00+00:00",
    }


def record(space: Space, *trials: dict[str, Any]) -> dict[str, Any]:
    first = trials[0]
    return {
        "name": "mnist-smoke",
        "space_name": "s",
        "seed": 0,
        "model": "defend",
        "experiment": to_dict(recipe(seeds=len(first["models"]))),
        "space": space.to_dict(),
        "trials": list(trials),
        "references": {},
        "front": [1],
        "choice": {"trial": 1, "parameters": first["parameters"], "clean": 0.9, "robust": 0.3, "rule": "the best"},
        "evaluation": "runs/mnist-smoke-best-1",
        "command": "python pipeline/main.py sweep mnist-smoke",
        "git": {},
        "hardware": {},
        "versions": {},
        "stages": {},
        "finished": None,
    }


def test_seeds_do_not_narrow_an_interval_since_they_are_attacked_on_the_same_images() -> None:
    points = [{"lam": 0.1, "shared_blocks": 1}, {"lam": 0.2, "shared_blocks": 2}]
    one = record(Space(parameters=BLOCKS), trial(1, points[0], 0.3), trial(2, points[1], 0.2))
    three = record(Space(parameters=BLOCKS), trial(1, points[0], 0.2, 0.3, 0.4), trial(2, points[1], 0.1, 0.2, 0.3))
    for sweep in (one, three):
        assert summary.interval(summary.chosen(sweep)) == wilson_interval(30, 100)
        assert summary.indistinct(sweep) == [2]
    assert summary.seed_deviation(summary.chosen(one)) is None
    assert summary.seed_deviation(summary.chosen(three)) == pytest.approx(0.1)
    assert "robust 30.0 % (21.9 to 39.6); 1 of 1 other" in summary.conclusion(one)
    assert "robust 30.0 % (21.9 to 39.6, sd over 3 seeds 10.0); 1 of 1 other" in summary.conclusion(three)
    assert [row["sd over seeds"] for row in summary.table(three)] == ["10.0", "10.0"]
    assert "sd over seeds" not in summary.table(one)[0]
    written = [next(csv.DictReader(io.StringIO(summary.to_csv(r))))["robust_sd"] for r in (one, three)]
    assert written == ["", str(summary.seed_deviation(summary.chosen(three)))]


def test_the_heat_map_is_of_lambda_and_shared_blocks_wherever_they_stand() -> None:
    decoder = Choice(["pyramid", "hourglass"])
    for parameters, axes in (
        (BLOCKS, ["lam", "shared_blocks"]),
        ({"decoder": decoder, "shared_blocks": IntRange(1, 4), "lam": LogUniform(0.01, 1)}, ["lam", "shared_blocks"]),
        ({"decoder": decoder, "lam": LogUniform(0.01, 1), "width": IntRange(4, 8)}, ["decoder", "lam"]),
    ):
        space = Space(parameters=parameters)
        one = record(space, *(trial(i + 1, point, 0.1) for i, point in enumerate(space.points(0)[:3])))
        assert plots.mapped_parameters(one) == axes
        assert plots.heat_map(one)


def test_a_report_tells_that_the_test_images_were_used_before(tmp_path: Path) -> None:
    sweep = record(Space(parameters=BLOCKS), trial(1, {"lam": 0.1, "shared_blocks": 1}, 0.3))
    assert summary.earlier_choices(sweep) == [], "of a sweep of an earlier version too"
    first = {"evaluation": "runs/mnist-smoke-best-0", "trial": 7, "parameters": {"lam": 0.5, "shared_blocks": 2}}
    sweep["earlier_evaluations"] = [first, {**first, "trial": 8, "date": "2026-05-28T20:26:40+00:00"}]
    html.build(sweep, Storage(tmp_path))
    for text in ((tmp_path / "report/report.html").read_text(), summary.markdown(sweep)):
        assert "Choice no. 1 was tested on the test images, before" in text
        assert "trial 7: lam=0.5 shared_blocks=2: runs/mnist-smoke-best-0" in text
        assert "Choice no. 2 was tested on the test images on 2026-05-28 20:26 UTC, before" in text


def test_a_conclusion_is_of_the_time_at_which_its_last_trial_ended() -> None:
    point = {"lam": 0.1, "shared_blocks": 1}
    running = {**trial(3, point, 0.1), "state": "running"}
    sweep = record(Space(parameters=BLOCKS), trial(2, point, 0.3), trial(1, point, 0.3), running)
    assert summary.concluded_at(sweep) == 1780002210.0, "21:02:00 and 90 s"
