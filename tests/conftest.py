"""Fixtures of all tests. One Ray cluster serves the whole session, because its start takes 5 to 8 s."""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# These variables must be set before any test imports Ray or MLflow.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"  # pipeline.tracking sets the same level.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
    "0"  # A local node is never preempted, and the watcher costs each run 7 s of CPU.
)
# With Ray's default niceness, tests starve beside other processes. Ray spells the name in mixed case.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_ADDRESS"] = "local"  # Never join a cluster that already runs on this machine.
# A test publishes to its own MLflow, never to that of the person who runs the tests.
for _name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING_")]:
    del os.environ[_name]
for _name in ("MLFLOW_EXPERIMENT_NAME", "DEFENDPP_REVISION"):
    os.environ.pop(_name, None)

# Hypothesis draws the same examples in every run, so failures repeat. A deadline would depend on the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parents[1] / "shared" / "data"


@functools.cache  # pytest asks for each of two thousand tests.
def _uses_session_cluster(file: Path) -> bool:
    return re.search(r"\bray_cluster\b", file.read_text()) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the session's cluster, and put their files first because they take longest."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
    items.sort(key=lambda item: not _uses_session_cluster(item.path))


class OneRay(LoadScopeScheduling):
    """Scheduler for ``pytest -n 2`` that starts Ray in one process only.

    One process runs the files that use the session's cluster, the other one the remaining files. Two
    clusters under load starve each other on two cores. (xdist 3.8's own loadgroup does not work with
    pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _uses_session_cluster(TESTS.parent / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay:
    return OneRay(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start a local Ray cluster of 4 logical CPUs, and give its address, which a subprocess may join."""
    import ray

    from pipeline.runtime import cluster

    with pytest.MonkeyPatch.context() as environment:
        # Workers inherit PYTHONPATH. They import the classes that tests define by name.
        folders = [TESTS.parent, *sorted({file.parent for file in TESTS.rglob("*.py")})]
        environment.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)), prepend=os.pathsep)
        cluster.start_local(num_cpus=4, object_store_memory=500_000_000)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run PyTorch on one thread in this process.

    On small networks a second thread gains nothing. On a busy machine, waiting for it takes twenty times
    as long.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def mute() -> Iterator[str]:
    """Start a server that accepts connections and never answers, and give its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the directory of the complete MNIST, CIFAR-10 and Imagenette files, or skip the test."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    return SHARED_DATA
