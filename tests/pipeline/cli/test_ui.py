"""The command ``ui`` on a storage with a run, as a user starts and ends it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest
from commands import MAIN
from terminal import Terminal

from pipeline.main import main
from pipeline.runtime.storage import Storage
from pipeline.tracking import uri
from pipeline.tracking.tracker import Tracker


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Return a storage whose MLflow has one run."""
    storage = Storage(tmp_path_factory.mktemp("my runs"))
    tracker = Tracker(uri.default_uri(storage), storage / "runs/x", echo=lambda line: None)
    tracker.start("run", "x")
    assert tracker.flush()
    return storage


def run_of(storage: Storage) -> tuple[str, str]:
    tracker = Tracker(uri.default_uri(storage), storage / "runs/x", echo=lambda line: None)
    experiment, run = tracker.experiment_id, tracker.run_id()
    assert experiment
    assert run
    return experiment, run


@pytest.mark.slow
def test_the_command_that_a_run_ends_with_opens_that_run(storage: Storage, tmp_path: Path) -> None:
    experiment, run = run_of(storage)
    printed = uri.ui_command(uri.default_uri(storage), experiment, run)
    arguments = [*MAIN, *shlex.split(printed)[1:]]
    before = sorted(os.listdir(storage.local_root))
    environment = {**os.environ, "COLUMNS": "200", "TMPDIR": str(tmp_path)}
    with Terminal(arguments, environment) as shown:
        shown.wait_until(lambda text: "Ctrl-C" in text)
        found = re.search(r"MLflow: (http://127\.0\.0\.1:\d+/)#/experiments/(\d+)/runs/(\w+)\?", shown.text)
        assert found, shown.text
        assert found.groups()[1:] == (experiment, run)
        with urllib.request.urlopen(found[1]) as answer:
            assert b"mlflow" in answer.read().lower()
        started = psutil.Process(shown.pid).children(recursive=True)
        assert started
        # The address of a database may have a password, and every user can read command lines.
        assert not any(str(storage.local_root) in " ".join(process.cmdline()) for process in started)
        shown.ctrl_c()
        assert shown.end() == 0, shown.text
    assert "Traceback" not in shown.text
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert sorted(os.listdir(storage.local_root)) == before
    assert list(tmp_path.glob("defendpp-ui-*")) == []


@pytest.mark.slow
def test_why_mlflow_ended_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--tracking-uri", "mysql+nosuchdriver://me:secret@host/x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MLflow cannot be started: ")
    assert "secret" not in error


def test_a_port_that_is_taken_is_said(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--storage", str(storage.local_root), "--port", str(port)]) == 1
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_said(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--storage", str(storage.local_root), "--run", "abc"]) == 2
    assert "--run is 'abc'; it must be the id of a run in" in capsys.readouterr().err


def test_of_a_server_the_address_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--tracking-uri", "http://me:secret@host:5000"]) == 0
    assert capsys.readouterr().out == "http://***@host:5000/#/experiments?workflowType=machine_learning\n"


def test_nothing_is_created_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--storage", str(tmp_path / "none")]) == 1
    assert "there is no MLflow database" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
