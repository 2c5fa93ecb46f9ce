"""A sweep by `ray job submit`. tests/end_to_end/test_run.py has a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job_shell import job_shell

pytestmark = [pytest.mark.cluster, pytest.mark.drill]
SMALL = [
    *("mnist-smoke", "--evaluation.threat-models", "white_box", "--evaluation.reliability-images", "0"),
    *("--data.train-limit", "200", "--data.test-limit", "10", "--train.epochs", "1"),
    *("--evaluation.attacks", "fgsm:eps=0.2", "--evaluation.test-images", "10"),
]


def test_a_job_sweeps_then_runs_the_whole_pipeline_on_the_choice(tmp_path: Path) -> None:
    space = ("--space", "tune_spaces/lambda_blocks.py", "--trials", "2", "--evaluate", "recipe")
    with job_shell(tmp_path) as shell:
        done = shell.submit("sweep", *SMALL, *space, "--max-concurrent", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = (tmp_path / "defendpp").glob("sweeps/*/sweep.json")
    record = json.loads(file.read_text())
    assert record["finished"]
    assert [t["state"] for t in record["trials"]] == ["finished", "finished"]
    assert "2 of 2 trials ended" in done.stdout
    assert "choice: trial" in done.stdout
    (run,) = (tmp_path / "defendpp").glob("runs/*/run.json")
    assert json.loads(run.read_text())["finished"]
    assert "white-box" in done.stdout
