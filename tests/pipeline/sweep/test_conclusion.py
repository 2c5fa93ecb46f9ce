"""The conclusion of a sweep: its choice and its report; and whose directory it is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sweeps import (
    BLOCKS,
    command,
    entry,
    opened,
)

from components.config import Experiment
from components.errors import UserError
from components.search_space import Choice, IntRange, LogUniform, Space
from pipeline import run
from pipeline.cli.arguments import parse_sweep
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.main import main
from pipeline.runtime import lease
from pipeline.runtime.storage import Storage
from pipeline.sweep import conclusion, sweep_directory
from pipeline.sweep.report import summary
from pipeline.sweep.report.html import build
from pipeline.sweep.space_file import load_space


def test_what_test_images_were_used_for_before_stays_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[Experiment] = []
    monkeypatch.setattr(run, "execute", lambda command, e, **_: tested.append(e))
    monkeypatch.setattr(conclusion, "write_report", lambda sweep: None)
    points = BLOCKS.points(0)
    sweep = opened(tmp_path, BLOCKS, [entry(1, points[0], "finished", 0.3), entry(2, points[1], "failed", 0.1)])

    def conclude(test: bool = True) -> tuple[str | None, list[dict[str, Any]]]:
        conclusion.conclude(sweep)
        if test:
            conclusion.evaluate_choice(sweep)
        saved = json.loads((tmp_path / "sweeps/s/sweep.json").read_text())
        earlier = saved["earlier_evaluations"]
        assert all(abs(datetime.now(UTC) - datetime.fromisoformat(e.pop("date"))) < timedelta(hours=1) for e in earlier)
        return saved["evaluation"], earlier

    first, earlier = conclude()
    assert earlier == []
    assert conclude() == (first, [])
    sweep.put(entry(2, points[1], "finished", 0.9))
    before = [{"evaluation": first, "trial": 1, "parameters": points[0]}]
    assert conclude(test=False) == (None, before), "what was tested is not the choice"
    second, earlier = conclude()
    assert second not in (first, None)
    assert earlier == before
    sweep.options = replace(sweep.options, evaluate="recipe")
    third, earlier = conclude()
    assert [e["evaluation"] for e in earlier] == [first, second], "under other attacks"
    sweep.put(replace(sweep.trial(2), state="failed"))
    sweep.options = replace(sweep.options, evaluate="full")
    assert conclude()[0] == first
    assert [e["evaluation"] for e in sweep.record["earlier_evaluations"]] == [second, third]
    assert len(tested) == 5


def test_a_sweep_that_was_taken_over_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    sweep = opened(tmp_path, BLOCKS, [])
    sweep.stored.lease = lease.Lease(sweep.storage).acquire()
    sweep.stored.save()
    other = {"host": "elsewhere", "pid": 7, "token": "other"}
    deadline = time.monotonic() + 30
    while sweep.stored.lease.held:
        assert time.monotonic() < deadline, "not noticed"
        sweep.storage.write_json(lease.FILE, other)
        time.sleep(0.02)
    with pytest.raises(UserError, match="taken over by process 7 on elsewhere"):
        sweep.stored.save()
    sweep.stored.lease.release()


def test_a_second_command_is_refused_before_it_joins_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = command("lambda_blocks", tmp_path)
    options, rest = parse_sweep(asked[1:])
    name, space = load_space(options)
    address = sweep_directory.sweep_address(parse_experiment("sweep", rest), name, space, 0)
    held = lease.Lease(Storage(tmp_path) / address).acquire()
    assert main(asked) == 1
    held.release()
    assert f"is being worked on by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_the_report_of_a_sweep_names_front_choice_and_what_cannot_be_told_apart(tmp_path: Path) -> None:
    points = replace(BLOCKS, trials=6).points(0)
    trials = [entry(i + 1, p, "finished", 0.1 * i) for i, p in enumerate(points[:4])]
    trials += [entry(5, points[4], "stopped", 0.1), entry(6, points[5], "diverged", reason="at step 1")]
    record = opened(tmp_path, replace(BLOCKS, trials=6), trials).record
    record |= {
        "front": [4],
        "choice": {"trial": 4, "parameters": points[3], "clean": 0.9, "robust": 0.3, "rule": summary.rule(0.01)},
        "references": {"control": {"clean": 0.95, "robust": 0.05}, "no_defense": {"state": "failed", "reason": "x"}},
    }
    names = build(record, Storage(str(tmp_path)))
    assert names == ["pareto.svg", "parallel.svg", "heat-map.svg", "trials.csv", "table.md", "report.html"]
    assert all((tmp_path / "report" / n).stat().st_size > 1000 for n in names if n.endswith(".svg"))
    html = (tmp_path / "report/report.html").read_text()
    for part in (
        "trial 4",
        "within 1 point of the best",
        "control: clean 95.0 %, robust 5.0 %",
        "--from",
        "chosen",
        "torch 2.",
    ):
        assert part in html
    # The intervals of 30 (21.9 to 39.6) and 20 of 100 (13.3 to 28.9) overlap. That of 10 does not.
    assert summary.indistinct(record) == [3]
    assert len((tmp_path / "report/trials.csv").read_text().splitlines()) == 7
    text = (tmp_path / "report/table.md").read_text()
    assert text == summary.markdown(record)
    for part in (
        "| 6 |",
        "robust on 100 under white-box PGD, eps 0.1, 10 steps.",
        "control: clean 95.0 %",
        f"`{record['command']}`",
        "torch 2.",
    ):
        assert part in text


@pytest.mark.parametrize("domain", [Choice([0.1, 0.2]), LogUniform(0.01, 1.0), IntRange(1, 4)])
def test_plots_of_one_parameter(tmp_path: Path, domain: Any) -> None:
    name = "shared_blocks" if isinstance(domain, IntRange) else "lam"
    space = Space(parameters={name: domain}, trials=2)
    record = opened(tmp_path, space, [entry(i + 1, p, "finished", 0.2) for i, p in enumerate(space.points(0))]).record
    record |= {"front": [1], "choice": {"trial": 1, "parameters": {}, "clean": 0.9, "robust": 0.2, "rule": ""}}
    assert build(record, Storage(str(tmp_path))) == [
        "pareto.svg",
        "parallel.svg",
        "trials.csv",
        "table.md",
        "report.html",
    ]
