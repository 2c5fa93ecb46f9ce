"""The report of a sweep, from its record alone."""

from __future__ import annotations

import csv
import io
import re
import shlex
from html import unescape
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


POINTS = [{"lam": 10.0**-i, "shared_blocks": i} for i in range(1, 5)]


def test_a_tie_is_said_and_has_one_colour() -> None:
    tied = record(Space(parameters=BLOCKS), *(trial(i + 1, p, 0.0) for i, p in enumerate(POINTS)))
    assert summary.ties(tied) == "all 4 trials tie at 0.0 % robust accuracy"
    assert summary.conclusion(tied).endswith("there was nothing to choose by but clean accuracy")
    drawn = plots.draw(tied)
    assert "All lines have one colour, because all 4 trials tie" in drawn["parallel"].caption
    (axis,) = drawn["parallel"].figure.axes
    colours = {line.get_color() for line in axis.get_lines() if len(line.get_xdata()) == 4} - {plots.CHOICE}
    assert len(colours) == 1
    assert len(drawn["heat-map"].figure.axes) == 1, "a colour bar of one value says nothing"
    assert "There is one shade" in drawn["heat-map"].caption
    apart = record(Space(parameters=BLOCKS), *(trial(i + 1, p, 0.1 * i) for i, p in enumerate(POINTS)))
    assert summary.ties(apart) == summary.ties(record(Space(parameters=BLOCKS), trial(1, POINTS[0], 0.1))) == ""


def test_lines_are_shaded_by_value_not_by_rank() -> None:
    values = [0.3, 0.1, 0.1, 0.9]  # The first is the choice.
    sweep = record(
        Space(parameters=BLOCKS), *(trial(i + 1, p, v) for i, (p, v) in enumerate(zip(POINTS, values, strict=True)))
    )
    (axis,) = plots.draw(sweep)["parallel"].figure.axes
    colours = [line.get_color() for line in axis.get_lines() if len(line.get_xdata()) == 4]
    assert colours[0] == colours[1] != colours[3], "trials of one accuracy look alike"
    heat = plots.draw(sweep)["heat-map"].figure.axes[0].get_images()[0]
    assert heat.get_clim() == (10, 90)


@pytest.mark.parametrize("robust", [0.0, 1.0])
def test_no_axis_leaves_0_to_100_percent(robust: float) -> None:
    drawn = plots.draw(record(Space(parameters=BLOCKS), *(trial(i + 1, p, robust) for i, p in enumerate(POINTS))))
    low, high = drawn["heat-map"].figure.axes[0].get_images()[0].get_clim()
    assert 0 <= low < high <= 100
    for plot in drawn.values():
        for axis in plot.figure.axes:
            ticks = [t.get_text() for t in (*axis.get_xticklabels(), *axis.get_yticklabels(), *axis.texts)]
            assert not [t for t in ticks if t.startswith(("-", "\N{MINUS SIGN}"))]


def test_labels_of_points_at_one_place_are_joined() -> None:
    sweep = record(Space(parameters=BLOCKS), *(trial(i + 1, p, 0.3) for i, p in enumerate(POINTS)))
    sweep["front"] = [1, 2, 3]
    sweep["references"] = {"control": {"clean": 0.5, "robust": 0.1}, "no_defense": {"clean": 0.501, "robust": 0.101}}
    (axis,) = plots.draw(sweep)["pareto"].figure.axes
    assert sorted(t.get_text() for t in axis.texts) == ["1, 2, 3", "control, no_defense"]


def test_an_undefended_network_that_is_more_robust_is_named() -> None:
    sweep = record(Space(parameters=BLOCKS), trial(1, POINTS[0], 0.1), trial(2, POINTS[1], 0.05))
    sweep["references"] = {"control": {"clean": 0.9, "robust": 0.11}, "no_defense": {"clean": 0.9, "robust": 0.6}}
    assert "no_defense, without a defense, is more robust than the choice." in " ".join(summary.paragraphs(sweep))
    sweep["references"]["no_defense"]["robust"] = 0.12
    assert "more robust than" not in " ".join(summary.paragraphs(sweep))


def test_the_page_of_a_sweep_has_the_frame_of_a_runs_and_links_to_the_test_of_its_choice(tmp_path: Path) -> None:
    sweep = record(Space(parameters=BLOCKS), *(trial(i + 1, p, 0.1 * i) for i, p in enumerate(POINTS)))
    at = Storage(tmp_path) / "sweeps/mnist-smoke-s-0"
    at.write_bytes("report/pareto.png", b"an earlier revision's")
    html.build(sweep, at)
    assert not at.exists("report/pareto.png")
    text = at.read_bytes("report/report.html").decode()
    (address,) = re.findall(r'href="([^"]+)">report on test images', text)
    assert (at.local_root / "report" / address).resolve() == (
        tmp_path / "runs/mnist-smoke-best-1/report/report.html"
    ).resolve()
    assert text.count('<svg class="plot"') == 3
    assert "prefers-color-scheme: dark" in text
    assert 'aria-label="Contents"' in text


def test_the_command_that_repeats_the_choice_can_be_pasted(tmp_path: Path) -> None:
    sweep = record(Space(parameters=BLOCKS), *(trial(i + 1, p, 0.1 * i) for i, p in enumerate(POINTS)))
    at = Storage(tmp_path / "my runs")
    html.build(sweep, at)
    (command,) = re.findall(r"<pre>(.*)</pre>", at.read_bytes("report/report.html").decode())
    assert shlex.split(unescape(command))[-2:] == ["--from", f"{tmp_path}/my runs/best.json"]
