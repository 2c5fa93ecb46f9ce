"""history.csv, and the snippets of docs/ecosystem.md that read it and a sweep's study."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import fake_run
import pandas
import pytest
from documentation import blocks

from pipeline.reporting import records, report
from pipeline.reporting.history import to_csv
from pipeline.runtime.storage import Storage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with made-up numbers and its report."""
    root = Storage(str(tmp_path_factory.mktemp("history")))
    storage = fake_run.write(root)
    report.build(storage, root)
    return storage.local_root


def test_a_line_has_the_numbers_of_its_step(run: Path) -> None:
    root = Storage(str(run.parents[1]))
    lines = list(csv.DictReader(io.StringIO((run / "report" / "history.csv").read_text())))
    expected = []
    for name, model in records.read_run(Storage(str(run))).models.items():
        for file in records.history_files(root, model.path):
            epoch = records.read_epoch(root, file)
            last = epoch["steps"][-1]["step"]
            for step in epoch["steps"]:
                validation = epoch["validation"] if step["step"] == last else {}
                values = {**step, **{f"validation_{k}": v for k, v in validation.items()}}
                numbers = {k: str(v) for k, v in values.items()}
                expected.append({"model": name, "epoch": str(epoch["epoch"]), "phase": epoch["phase"], **numbers})
    assert [{k: v for k, v in line.items() if v != ""} for line in lines] == expected
    assert list(lines[0])[:8] == ["model", "epoch", "step", "time", "phase", "lr", "images_per_second", "loss"]
    assert list(lines[0])[-2:] == ["validation_accuracy", "validation_reconstruction"]


def test_a_run_that_trained_nothing_has_no_line() -> None:
    assert to_csv({"given": []}) == "model,epoch,step,time,phase,lr,images_per_second,loss\n"


@pytest.mark.slow
def test_the_snippets_of_the_page_read_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    snippets = [b.text for b in blocks("python") if b.page.name == "ecosystem.md" and "history.csv" in b.text]
    assert len(snippets) == 2
    monkeypatch.chdir(run)
    for snippet in snippets:
        exec(snippet, {})
    history = pandas.read_csv(run / "report" / "history.csv")
    for model, steps in history.groupby("model"):
        events = accumulator.EventAccumulator(str(run / "tensorboard" / str(model))).Reload()
        loss = events.Scalars("loss")
        assert [e.step for e in loss] == steps["step"].tolist()
        assert [e.value for e in loss] == pytest.approx(steps["loss"].tolist())
        assert [e.wall_time for e in loss] == pytest.approx(steps["time"].tolist())
        assert len(events.Scalars("validation_accuracy")) == steps["epoch"].nunique()
