"""What the recipes cost, against the records of the runs that were measured."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from repository import ROOT

from pipeline.main import main
from pipeline.recipes.measured import measurements
from pipeline.recipes.registry import RECIPES
from pipeline.recipes.scales import SCALES

RECORDED = sorted(name for name, m in measurements().items() if m.recorded_in.startswith("results/"))


@pytest.mark.parametrize("name", RECORDED)
def test_a_measurement_is_what_its_record_says(name: str) -> None:
    measured = measurements()[name]
    text = (ROOT / measured.recorded_in).read_text()
    seconds = re.search(r"^- Seconds: (.*)$", text, re.MULTILINE)
    assert seconds
    assert measured.seconds == sum(map(int, re.findall(r" (\d+)", seconds[1])))
    assert f"- Hardware: {measured.machine}\n" in text
    assert f"- Source: {measured.revision}" in text
    assert f"- Finished: {measured.date}" in text
    assert re.search(rf"- Command: `.* run {name} .*--seeds {measured.seeds}\b", text)


def test_every_measurement_is_of_a_recipe_and_names_where_it_is_recorded() -> None:
    assert measurements()
    for name, measured in measurements().items():
        assert name in RECIPES
        assert measured.seconds > 0
        assert measured.machine
        assert datetime.date.fromisoformat(measured.date).year >= 2026
        assert measured.recorded_in
        if (file := ROOT / measured.recorded_in).suffix == ".md":
            assert file.is_file()


def test_a_scale_shows_what_its_recipes_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--scale", "slim"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if "table1-slim" in line)
    assert row[:9] == ["table1-slim", "11", "6", "300", "3", "2", "h", "54", "min"]
    assert "not measured" in next(line for line in lines if "table7-slim" in line)
    assert max(map(len, lines)) <= 100


def test_json_has_every_recipe_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    entries = {entry["recipe"]: entry for entry in json.loads(capsys.readouterr().out)}
    # A table's name alone is another name of its scale "fast".
    assert set(RECIPES) - set(entries) == {name.removesuffix("-fast") for name in RECIPES if name.endswith("-fast")}
    assert {entry["scale"] for entry in entries.values()} == {*SCALES, ""}
    assert entries["mnist-demo"]["measured"]["seconds"] == measurements()["mnist-demo"].seconds
    assert entries["table1-paper"]["measured"] is None
