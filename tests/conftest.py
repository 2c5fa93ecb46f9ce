"""Fixtures of all tests. One Ray cluster serves the whole session: starting one takes 5-8 s."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before Ray and MLflow are imported by any test
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"  # as pipeline.tracking sets it, whichever test imports mlflow first
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this node away; it costs each run 7 s of CPU
# else tests starve beside anything else that runs; Ray spells it so
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_ADDRESS"] = "local"  # never join a cluster that happens to run on this machine

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parents[1] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``pytest -n 2 --dist loadgroup``: whatever starts Ray in one process, first, since two Rays at a time starve each
    other on two cores; the rest file by file in the other."""
    cluster = [item for item in items if _starts_ray(item)]
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _starts_ray(item) else item.path.name))
    items[:] = [*cluster, *(item for item in items if not _starts_ray(item))]


def _starts_ray(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cluster") is not None


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of 4 logical CPUs; its address, which a subprocess may join."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        # workers inherit it: classes that tests define are imported there by name
        environment.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=500_000_000,
        )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On networks this small a second thread gains nothing, and on a busy machine waiting for it costs twentyfold."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of the complete MNIST, CIFAR-10 and Imagenette Parquet files, where a machine has them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not on this machine")
    return SHARED_DATA
