"""The use of this machine while a run computes, as MLflow's system metrics."""

from __future__ import annotations

import contextlib
import threading
import time as clock
from collections.abc import Sequence
from datetime import datetime

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipeline.tracking.requests import reason_of
from pipeline.tracking.tracker import Tracker

INTERVAL_SECONDS = 10.0


class SystemMetrics:
    """A thread that measures processor, memory, disk, network and GPUs for the run "run".

    MLflow's own thread asks the server before each measurement, and ends at its first failure. Here
    its monitors measure, and the outbox sends, so an outage costs nothing. Only the machine of this
    process is measured.

    Args:
        created: when the run was created (ISO). Steps count intervals from then on, so those of a
            continued run follow those before.
    """

    def __init__(self, tracker: Tracker, created: str | None) -> None:
        self._tracker = tracker
        self._begin = datetime.fromisoformat(created).timestamp() if created else clock.time()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to measure. The run was started before."""
        threading.Thread(target=self._measure, name="system metrics", daemon=True).start()

    def stop(self) -> None:
        """Measure no more."""
        self._stopped.set()

    def _measure(self) -> None:
        monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # There is no GPU, or no library that measures it.
            monitors.append(GPUMonitor())
        while not self._stopped.wait(INTERVAL_SECONDS):
            try:
                values = _measured(monitors)
            except Exception as e:  # It ends no run, and leaves nothing that could be published later.
                self._tracker.outbox.echo(f"system metrics are missing from now on: {reason_of(e)}")
                return
            now = clock.time()
            step = round((now - self._begin) / INTERVAL_SECONDS)
            # What waits for MLflow takes memory, and these values are no result.
            if not self._tracker.is_behind:
                self._tracker.metrics("run", values, step=step, time=now, is_remembered=False)


def _measured(monitors: Sequence[BaseMetricsMonitor]) -> dict[str, float]:
    """Return what the monitors measure now, by the name of the metric."""
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values
