"""A model whose clean accuracy is that of guessing is named wherever its numbers stand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import fake_run
import pytest
from rich.console import Console

from components.config import DataConfig, Experiment
from components.fields import to_dict
from pipeline.records import RunRecord
from pipeline.reporting import records, report, terminal, verdicts
from pipeline.reporting.tracked.metrics import test_metrics as metrics_of
from pipeline.runtime.storage import Storage


def record(right: int, n: int, classes: int) -> RunRecord:
    interval = {"accuracy_low": 0.0, "accuracy_high": 1.0}
    clean = {"model": "m", "threat_model": "clean", "attack": "none", "n": n}
    experiment = Experiment(name="x", models=("m:defense=none",), data=DataConfig(num_classes=classes))
    evaluations = [
        {**clean, "threat_model": "white_box", "metrics": {"accuracy": 0.0, **interval}},
        {**clean, "metrics": {"accuracy": right / n, **interval}},
    ]
    return RunRecord.from_json({"name": "x", "experiment": to_dict(experiment), "evaluations": evaluations})


@pytest.mark.parametrize(
    ("right", "n", "classes", "said"),
    [
        (9, 100, 10, "9.0 % (n = 100) is near chance (10.0 %)"),
        (0, 100, 10, "0.0 % (n = 100) is below chance (10.0 %)"),
        (3, 1000, 1000, "0.3 % (n = 1000) cannot be told"),
        (1, 1000, 1000, "is near chance (0.1 %)"),
        (520, 1000, 2, "is near chance (50.0 %)"),
        (1, 4, 10, "cannot be told from chance (10.0 %) with so few images"),
        (0, 4, 10, "is near chance"),
        (34, 100, 10, ""),
        (4, 8, 10, ""),
        (60, 100, 2, "cannot be told"),
        (740, 1000, 2, ""),  # 1.5 times chance would be 75 %
        (30, 1000, 1000, ""),
    ],
)
def test_an_accuracy_of_guessing_is_named(right: int, n: int, classes: int, said: str) -> None:
    rows = verdicts.near_chance(record(right, n, classes))
    if not said:
        assert rows == []
        return
    (row,) = rows
    assert said in row["sentence"]
    assert "mean nothing" in row["sentence"]
    assert ("normalisation" in row["sentence"]) != ("test_images" in row["sentence"])


@pytest.mark.slow
def test_it_stands_in_terminal_report_and_mlflow(tmp_path: Path) -> None:
    root = Storage(str(tmp_path))
    run = fake_run.write(root)
    made = run.read_json("run.json")
    assert verdicts.near_chance(RunRecord.from_json(made)) == []
    (clean,) = [e for e in made["evaluations"] if (e["model"], e["threat_model"]) == ("control", "clean")]
    clean["metrics"]["accuracy"] = 0.09
    run.write_json("run.json", made)
    sentence = "control: the clean accuracy of 9.0 % (n = 300) is near chance (10.0 %)"
    out = io.StringIO()
    terminal.print_table(run, console=Console(file=out, width=400))
    assert sentence in out.getvalue()
    paths = report.build(run, root)
    assert sentence in run.read_bytes(paths["html"]).decode()
    assert sentence in run.read_bytes(paths["table_md"]).decode()
    (row,) = json.loads(run.read_bytes(paths["table_json"]))["near_chance"]
    assert row["model"] == "control"
    record_read = records.read_run(run)
    assert metrics_of(record_read, "control")["reliability/flag/clean_accuracy_near_chance"] == 1
    assert "reliability/flag/clean_accuracy_near_chance" not in metrics_of(record_read, "defend")
