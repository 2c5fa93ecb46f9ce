"""The study of a sweep, opened by Optuna and by optuna-dashboard."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest
from documentation import blocks
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ports import free_port
from sweeps import entry

from components.search_space import Choice, IntRange, LogUniform, Space, Uniform
from pipeline.sweep.search.study import FILE, study_file

PARAMETERS = {
    "lam": LogUniform(1e-4, 10.0),
    "momentum": Uniform(0.5, 0.9),
    "shared_blocks": IntRange(1, 4),
    "schedule": Choice(["joint", "alternating"]),
}
TRIALS = [
    entry(1, {"lam": 0.1, "momentum": 0.5, "shared_blocks": 1, "schedule": "joint"}, "finished", 0.1, 0.3),
    entry(2, {"lam": 1e-4, "momentum": 0.75, "shared_blocks": 4, "schedule": "joint"}, "stopped", 0.2, reason="worse"),
    entry(
        3, {"lam": 10.0, "momentum": 0.8, "shared_blocks": 2, "schedule": "alternating"}, "diverged", reason="at step 7"
    ),
    entry(4, {"lam": 2.0, "momentum": 0.6, "shared_blocks": 3, "schedule": "joint"}, "failed", reason="out of memory"),
    entry(5, {"lam": 3.0, "momentum": 0.7, "shared_blocks": 3, "schedule": "alternating"}, "finished", 0.2, 0.4),
    entry(6, {"lam": 4.0, "momentum": 0.7, "shared_blocks": 3, "schedule": "joint"}, "pending"),
]


def record(search: str) -> dict[str, Any]:
    space = Space(parameters=PARAMETERS, search=search, trials=6)  # type: ignore[arg-type]
    choice = {"trial": 5, "parameters": TRIALS[4].parameters, "clean": 0.9, "robust": 0.4, "rule": "the best"}
    return {
        "name": "mnist-smoke",
        "space_name": "own",
        "seed": 0,
        "model": "defend",
        "space": space.to_dict(),
        "created": "2026-01-01T00:00:00+00:00",
        "trials": [trial.to_json() for trial in TRIALS],
        "front": [5],
        "choice": choice,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(study_file(json.loads(json.dumps(record("random")))))
    return tmp_path / FILE


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_optuna_reads_every_trial(tmp_path: Path, search: str) -> None:
    file = tmp_path / FILE
    file.write_bytes(study_file(json.loads(json.dumps(record(search)))))
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(file))))
    assert study.study_name == "mnist-smoke-own"
    assert study.metric_names == ["clean", "robust"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert study.user_attrs["choice"]["trial"] == 5
    assert [t.state for t in study.trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.WAITING,
    ]
    for theirs, ours in zip(study.trials, TRIALS, strict=True):
        assert theirs.params == ours.parameters
        assert theirs.user_attrs["trial"] == ours.number == theirs.number + 1
        assert theirs.user_attrs.get("reason", "") == ours.reason
        assert theirs.intermediate_values == {scores.epoch: scores.robust for scores in ours.epochs}
        assert theirs.distributions["shared_blocks"] == optuna.distributions.IntDistribution(1, 4)
        assert theirs.distributions["lam"] == optuna.distributions.FloatDistribution(1e-4, 10.0, log=True)
        assert theirs.distributions["momentum"] == optuna.distributions.FloatDistribution(0.5, 0.9)
        assert theirs.distributions["schedule"].choices == ("joint", "alternating")
    assert study.trials[0].values == [0.9, 0.3]
    assert [t.number + 1 for t in study.best_trials] == record(search)["front"]


def test_the_snippet_of_the_page_reads_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = [b.text for b in blocks("python") if b.page.name == "ecosystem.md" and "study.log" in b.text]
    monkeypatch.chdir(file.parent)
    exec(snippet, {})
    assert "COMPLETE" in capsys.readouterr().out


@pytest.mark.slow
def test_the_dashboard_shows_the_trials(file: Path) -> None:
    dashboard = Path(sys.executable).with_name("optuna-dashboard")
    if not dashboard.exists():
        pytest.skip("optuna-dashboard is not installed")
    port = free_port()
    with subprocess.Popen([dashboard, str(file), "--port", str(port)], stdout=-3, stderr=-3) as process:
        try:
            (summary,) = answer(port, "studies")["study_summaries"]
            assert summary["study_name"] == "mnist-smoke-own"
            trials = answer(port, f"studies/{summary['study_id']}")["trials"]
        finally:
            process.terminate()
    assert [t["state"] for t in trials] == ["Complete", "Pruned", "Fail", "Fail", "Complete", "Waiting"]
    assert trials[4]["values"] == [0.9, 0.4]
    assert {p["name"] for p in trials[4]["params"]} == PARAMETERS.keys()


def answer(port: int, path: str) -> dict[str, Any]:
    """Return what the dashboard's API answers once it has started."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as reply:
                content: dict[str, Any] = json.load(reply)
                return content
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
