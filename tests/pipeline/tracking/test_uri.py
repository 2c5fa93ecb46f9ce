"""Addresses and limits that are checked without a run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from ports import free_port

from components.errors import UserError
from pipeline.runtime.storage import Storage
from pipeline.tracking import uri
from pipeline.tracking.requests import http_limits
from pipeline.tracking.server import check_reachable

pytestmark = pytest.mark.slow


def test_a_dead_server_is_refused_quickly() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{uri} cannot be used: connection refused.*--tracking-uri"):
        check_reachable(uri)
    assert time.monotonic() - begin < 10


def test_a_server_that_never_answers_is_refused_quickly(mute: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{mute} cannot be used: timed out"):
        check_reachable(mute)
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns"])
def test_file_stores_are_refused_with_a_hint(uri: str) -> None:
    with pytest.raises(UserError, match=r"sqlite:////.*mlruns\.db"):
        check_reachable(uri)


def test_databases_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes.db"
    other.write_text("no database at all, but long enough to have a header of one hundred bytes. " * 3)
    with pytest.raises(UserError, match=r"notes\.db cannot be used: file is not a database"):
        check_reachable(f"sqlite:///{other}")
    assert other.read_text().startswith("no database")
    with pytest.raises(UserError, match=r"relative path.*sqlite:////"):
        check_reachable("sqlite:///mlflow.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/mlflow\.db cannot be used"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_default_database_lies_in_the_storage(tmp_path: Path) -> None:
    assert uri.default_uri(Storage(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"memory://elsewhere is not on this machine.*--tracking-uri"):
        uri.default_uri(Storage("memory://elsewhere"))


def test_ui_command_names_the_run() -> None:
    assert uri.ui_command("sqlite:////data/my runs/mlflow.db", "7", "abc") == (
        "defendpp ui --storage '/data/my runs' --run abc"
    )
    assert uri.ui_command("sqlite:////data/other.db", "7", None) == (
        "defendpp ui --tracking-uri sqlite:////data/other.db"
    )
    address = "http://host:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert uri.ui_command("http://host:5000/", "7", "abc") == address
    compared = "#/compare-runs?runs=[%22a%22,%22b%22]&experiments=[%227%22]&workflowType=machine_learning"
    assert uri.comparison_page("7", ["a", "b"]) == compared


def test_limits_of_several_threads_leave_nothing_behind() -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    before = [os.environ.get(name) for name in names]
    upload, check = http_limits(timeout=120), http_limits(timeout=1, retries=0)
    upload.__enter__()
    check.__enter__()
    assert [os.environ[name] for name in names] == ["1", "0"]
    upload.__exit__(None, None, None)  # of a thread that is done first, though it began first
    assert [os.environ[name] for name in names] == ["1", "0"]
    check.__exit__(None, None, None)
    assert [os.environ.get(name) for name in names] == before
