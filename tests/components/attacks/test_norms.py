"""Median norms, which every table shows with their number of images, or leaves out if those are few."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from rich.console import Console

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.metrics import summarize
from components.fields import from_dict
from pipeline.records import RunRecord
from pipeline.reporting import markdown, over_seeds, records, report, results, terminal
from pipeline.reporting.tracked import metrics
from pipeline.runtime.storage import Storage

DDN = str(AttackSpec.parse("ddn:steps=60"))


def metrics_of(broken: int, right: int = 200, n: int = 300, attack: str = DDN) -> dict[str, Any]:
    """Return metrics of n images: ``right`` classified correctly, ``broken`` of them broken at L2 norm 0.68."""
    index = np.arange(n)
    columns = {
        "label": np.zeros(n, dtype=np.int32),
        "clean_prediction": np.where(index < right, 0, 1),
        "adversarial_prediction": np.where((index >= broken) & (index < right), 0, 1),
        "rounded_prediction": np.where((index >= broken) & (index < right), 0, 1),
        "l2": np.full(n, 0.68),
        "linf": np.full(n, 0.068),
    }
    return summarize(columns, AttackSpec.parse(attack), 1.0, budgets={"l2": (1.5,), "linf": (0.3,)})


def record_of(root: Storage, transferred: int) -> tuple[Storage, dict[str, Any]]:
    """Write a run whose DDN breaks 200 images white-box, and ``transferred`` of them on the control."""
    run = fake_run.write(root, gallery=False)
    record = run.read_json("run.json")
    for e in record["evaluations"]:
        if e["attack"] == DDN:
            transfer_to_control = (e["threat_model"], e["model"]) == ("transfer", "control")
            e["metrics"] = metrics_of(transferred if transfer_to_control else 200)
    run.write_json("run.json", record)
    return run, record


def page_of(record: RunRecord, root: Storage) -> str:
    """Return the report without its plots, which take seconds."""
    return report.page(record, report.table_data(record, root), {}, [], root)


def shown(run: Storage, root: Storage) -> dict[str, str]:
    """Return the cell of the control under transferred DDN in every form of the table."""
    record = records.read_run(run)
    html = re.sub(r"<[^>]+>", " ", page_of(record, root))
    (cell,) = re.findall(r"control\s+control: undefended, another seed.*?\n", html)
    (line,) = [x for x in markdown.markdown(record).splitlines() if x.startswith("| control (control)")]
    out = io.StringIO()
    terminal.print_table(run, console=Console(file=out, width=200))
    row = out.getvalue()
    return {"html": " ".join(cell.split()), "markdown": line.split(" | ")[-1], "terminal": row}


@pytest.mark.parametrize(
    ("broken", "text"), [(0, "none broken"), (1, "1 broken"), (9, "9 broken"), (10, "L2 0.68 of 10")]
)
def test_a_median_says_of_how_many_and_is_left_out_under_ten(tmp_path: Path, broken: int, text: str) -> None:
    root = Storage(tmp_path)
    run, _ = record_of(root, broken)
    cells = shown(run, root)
    assert cells["html"].endswith(text)
    assert cells["markdown"].endswith(f", {text} |")
    assert text in cells["terminal"]
    assert "L2 0.68 of 200" in cells["html"], "white-box"


@pytest.mark.parametrize("broken", [9, 10])
def test_files_and_metrics_follow_the_same_rule(tmp_path: Path, broken: int) -> None:
    """table.csv, table.json and MLflow have no median or quartile of fewer than ten images."""
    root = Storage(tmp_path)
    run, stored = record_of(root, broken)
    record = records.read_run(run)
    shows_median = broken >= over_seeds.MIN_FOR_MEDIAN
    rows = list(csv.DictReader(io.StringIO(markdown.to_csv(record))))
    (row,) = [r for r in rows if (r["model"], r["threat_model"], r["attack"]) == ("control", "transfer", DDN)]
    quantiles = [f"{norm}_{q}" for norm in ("l2", "linf") for q in ("median", "q25", "q75")]
    assert [bool(row[q]) for q in quantiles] == [shows_median] * 6
    assert row["broken"] == str(broken)
    cells = {r["model"]: r["cells"] for r in report.table_data(record, root)["rows"]}
    cell = cells["control"]["transfer/ddn"]
    assert (cell["l2_median"], cell["broken"]) == ((0.68, 10) if shows_median else (None, 9))
    published = metrics.test_metrics(record, "control")
    assert ("norm/transfer/ddn_l2_median" in published) == shows_median
    for r in rows:  # White-box BIM breaks nearly all images.
        few = int(r["broken"]) < over_seeds.MIN_FOR_MEDIAN
        assert [bool(r[q]) for q in quantiles] == [not few] * 6, r
    assert run.read_json("run.json") == stored, "the record keeps what was measured"


def test_over_seeds_a_median_needs_ten_of_every_seed(tmp_path: Path) -> None:
    """A mean over only the seeds with enough broken images would not match the row's number of seeds."""
    run, record = record_of(Storage(tmp_path), 0)
    record["experiment"]["seeds"] = 3
    replicates = from_dict(Experiment, record["experiment"]).replicates()
    for counts, text in (
        ((10, 12, 30), "L2 0.68 of 10–30"),
        ((9, 12, 30), "9–30 broken"),
        ((0, 0, 0), "none broken"),
        ((12, 12, 12), "L2 0.68 of 12"),
    ):
        record["evaluations"] = [
            {"model": m, "source": "x", "threat_model": "transfer", "attack": DDN, "n": 300, "metrics": metrics_of(k)}
            for (m, (base, _)), k in zip(
                [item for item in replicates.items() if item[1][0] == "control"], counts, strict=True
            )
        ]
        (row,) = over_seeds.over_seeds(RunRecord.from_json(record))
        assert results.norms_over_seeds(row) == text
        run.write_json("run.json", {**record, "models": {}})
        out = io.StringIO()
        terminal.print_table(run, console=Console(file=out, width=160))
        assert text in out.getvalue()


def test_a_model_that_gets_nothing_right_cannot_be_broken(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run, record = record_of(root, 0)
    for e in record["evaluations"]:
        if (e["model"], e["attack"]) == ("control", DDN):
            e["metrics"] = metrics_of(0, right=0)
    run.write_json("run.json", record)
    for place, text in shown(run, root).items():
        assert "nothing to break" in text, place
        assert "none broken" not in text, place


def test_the_rule_is_said_where_there_are_medians(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run, record = record_of(root, 4)
    rule = "With fewer than 10 images, no median is shown."
    assert rule in page_of(records.read_run(run), root)
    assert rule in markdown.markdown(records.read_run(run))
    out = io.StringIO()
    terminal.print_table(run, console=Console(file=out, width=100))
    assert rule in " ".join(out.getvalue().split())
    record["evaluations"] = [e for e in record["evaluations"] if e["attack"] != DDN]
    assert rule not in markdown.markdown(RunRecord.from_json(record))
