"""``defendpp reproduction``: the paper's numbers beside those of several runs, with the control and a verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from components.config import EvaluationConfig, Experiment, TrainConfig
from components.fields import to_dict
from pipeline.main import main
from pipeline.records import RunRecord
from pipeline.reporting import reproduction
from pipeline.runtime.storage import Storage

TABLE = Experiment(
    name="small",
    paper="table2",
    scale="slim",
    seeds=3,
    train=TrainConfig(width=8),
    models=("no_defense:defense=none", "control:defense=none,seed=1", "comdefend:defense=comdefend", "defend:seed=1"),
    evaluation=EvaluationConfig(attacks=("fgsm:eps=0.2", "bim:eps=0.2,steps=3")),
)
# (model, threat model, attack) -> accuracy by seed. The paper's table 2 has 86.81 for ours under FGSM and 55.37 under
# BIM, 99.47 clean, and 85.69 for ComDefend under FGSM.
ACCURACIES: dict[tuple[str, str, str], list[float]] = {
    ("no_defense", "clean", "none"): [0.99, 0.98, 0.99],
    ("control", "clean", "none"): [0.99, 0.98, 0.99],
    ("defend", "clean", "none"): [0.99, 0.99, 1.0],
    ("no_defense", "white_box", "fgsm:eps=0.2"): [0.3, 0.32, 0.31],
    ("control", "white_box", "fgsm:eps=0.2"): [0.3, 0.4, 0.2],
    ("defend", "white_box", "fgsm:eps=0.2"): [0.2, 0.3, 0.4],
    ("control", "transfer", "fgsm:eps=0.2"): [0.60, 0.62, 0.61],
    ("defend", "transfer", "fgsm:eps=0.2"): [0.86, 0.87, 0.88],
    ("control", "white_box", "bim:eps=0.2,steps=3"): [0.02, 0.03, 0.04],
    ("defend", "white_box", "bim:eps=0.2,steps=3"): [0.0, 0.01, 0.02],
    ("comdefend", "grey_box", "fgsm:eps=0.2"): [0.5, 0.51, 0.5],
}


def evaluation(model: str, threat: str, attack: str, accuracy: float) -> dict[str, Any]:
    interval = {"accuracy_low": max(0, accuracy - 0.01), "accuracy_high": min(1, accuracy + 0.01)}
    metrics = {"accuracy": accuracy, **interval}
    return {"model": model, "source": model, "threat_model": threat, "attack": attack, "n": 300, "metrics": metrics}


def record(experiment: Experiment = TABLE) -> dict[str, Any]:
    """Return run.json of the table."""
    return {
        "schema": 1,
        "name": experiment.name,
        "experiment": to_dict(experiment),
        "data": {"rows": {"train": 9000, "test": 300}},
        "git": {"revision": "0123456789abcdef", "dirty": False},
        "evaluations": [
            evaluation(f"{model}-s{seed}", threat, attack, accuracy)
            for (model, threat, attack), accuracies in ACCURACIES.items()
            for seed, accuracy in enumerate(accuracies)
        ],
    }


def cells_by_place(run: RunRecord) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["row"], row["column"]): row for row in reproduction.cells(run)}


def test_a_cell_has_ours_and_the_controls_by_threat_model() -> None:
    cells = cells_by_place(RunRecord.from_json(record()))
    ours = {value["threat_model"]: value for value in cells["defend", "fgsm"]["ours"]}
    assert set(ours) == {"white_box", "transfer"}
    transfer = ours["transfer"]
    assert (transfer["mean"], transfer["n"], transfer["seeds"]) == (pytest.approx(0.87), 300, 3)
    assert transfer["control"]["mean"] == pytest.approx(0.61)
    assert (transfer["contains"], transfer["against"]) == (True, "more")
    assert (ours["white_box"]["contains"], ours["white_box"]["against"]) == (False, "not told apart")
    # The source of the examples has no control, and a number that no evaluation belongs to has no cell.
    assert cells["no_defense", "fgsm"]["ours"][0]["control"] is None
    assert ("defend", "cw") not in cells
    # A reformer's grey box is compared with what the same examples do to the control.
    grey = cells["comdefend", "fgsm"]["ours"][0]
    assert (grey["threat_model"], grey["control"]["mean"]) == ("grey_box", pytest.approx(0.61))


def test_the_verdict_names_the_threat_model_and_what_the_control_has() -> None:
    cells = cells_by_place(RunRecord.from_json(record()))
    assert reproduction.verdict(cells["defend", "fgsm"]) == (
        "in range: transfer; against the control: white-box not told apart, transfer more"
    )
    assert reproduction.verdict(cells["defend", "bim"]) == "out of range; against the control: white-box less"
    assert reproduction.verdict(cells["defend", "clean"]) == "in range"
    assert reproduction.verdict(cells["no_defense", "clean"]) == "in range"
    assert reproduction.verdict(cells["no_defense", "fgsm"]) == "in range: white-box"


def test_one_seed_tells_nothing_against_the_control() -> None:
    one = record(dataclasses.replace(TABLE, seeds=1))
    one["evaluations"] = [
        {**e, "model": e["model"].removesuffix("-s0")} for e in one["evaluations"] if e["model"].endswith("-s0")
    ]
    cell = cells_by_place(RunRecord.from_json(one))["defend", "fgsm"]
    assert {value["against"] for value in cell["ours"]} == {""}
    assert reproduction.verdict(cell) == "in range: transfer"


def test_the_command_writes_a_page_with_every_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Storage(tmp_path / "results/table2-small").write_json("run.json", record())
    out = tmp_path / "page.md"
    assert main(["reproduction", "results/table2-small", "--out", "page.md"]) == 0
    assert "1 run:" in capsys.readouterr().out
    page = out.read_text()
    assert "reproduction results/table2-small --out page.md" in page
    lines = page.splitlines()
    [row] = [line for line in lines if line.startswith("| ours | resnet18 | fgsm |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == "86.81"
    assert cells[4] == "white-box 30.0 ± 10.0 (19.0–41.0)<br>transfer 87.0 ± 1.0 (85.0–89.0)"
    assert cells[5] == "30.0 ± 10.0 (19.0–41.0)<br>61.0 ± 1.0 (59.0–63.0)"
    assert cells[6] == "300 x 3"
    for where in ("Table 1", "Table 8", "Section 4.3"):
        assert f"## {where}" in lines
    # The text of sec. 4.2 repeats numbers of table 2; the other data sets have no run.
    section = page[page.index("## Section 4.2") : page.index("## Section 4.3")]
    assert "| Defend++ | resnet18 | fgsm | 86.81 |" in section
    assert "No run has a value for 30 of the 30 numbers." in page[page.index("## Table 3") : page.index("## Table 4")]
    [numbers] = [line for line in lines if line.startswith("| Table 2 |") and "results/table2-small" in line]
    assert [cell.strip() for cell in numbers.strip("|").split("|")][2:] == ["3", "0", "1", "2", "4", "1", "2"]


def test_what_is_no_run_of_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.md"
    assert main(["reproduction", str(tmp_path), "--out", str(out)]) == 1
    assert "is not the directory of a run: it has no run.json" in capsys.readouterr().err
    Storage(tmp_path / "other").write_json("run.json", record(dataclasses.replace(TABLE, paper="")))
    assert main(["reproduction", str(tmp_path / "other"), "--out", str(out)]) == 1
    assert "none of these runs is of a table of the paper" in capsys.readouterr().err
    assert main(["reproduction", "--out", str(out)]) == 2
    assert "name a run's directory" in capsys.readouterr().err
    assert main(["reproduction", str(tmp_path)]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert not out.exists()
