"""A fake run and MLflow databases for the tests of tracking."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_run
import pytest
from mlflow_server import MlflowServer
from mlflow_view import DatabaseMaker

from pipeline.reporting import report
from pipeline.runtime.storage import Storage
from pipeline.tracking.server import check_reachable


@pytest.fixture
def database() -> DatabaseMaker:
    """Return a function that creates a database. The first of a process takes MLflow seconds."""

    def make(directory: Path) -> str:
        uri = f"sqlite:///{directory / 'mlflow.db'}"
        check_reachable(uri)
        return uri

    return make


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a whole fake run with its report."""
    path = tmp_path_factory.mktemp("written") / "storage"
    report.build(fake_run.write(Storage(path)), Storage(path))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture
def run(root: Storage, written: Path) -> Storage:
    """The directory of a fake run in ``root``, which the test may change."""
    shutil.copytree(written, root.local_root)
    return root / "runs" / root.list("runs")[0]


@pytest.fixture
def server(database: DatabaseMaker, tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(database(tmp_path), tmp_path)
    server.start()
    yield server
    server.kill()
