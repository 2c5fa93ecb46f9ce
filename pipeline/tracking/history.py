"""The record of an epoch as MLflow's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric

NOT_SHOWN = ("step", "time", "images_per_second")
"""Keys of a step that are no metric: its number, its time, and a speed that says little step by step."""


def epoch_metrics(record: Mapping[str, Any]) -> list[Metric]:
    """Return the steps of an epoch as metrics ``train/...``, and its ``validation/...``.

    Args:
        record: the content of a ``history/epoch-*.json``.
    """
    steps = [
        Metric(f"train/{key}", float(value), round(1000 * step["time"]), int(step["step"]))
        for step in record["steps"]
        for key, value in step.items()
        if key not in NOT_SHOWN and value is not None
    ]
    at, number = (steps[-1].timestamp, steps[-1].step) if steps else (0, 0)
    # MLflow's comparison opens with the metric that was logged first.
    validation = [
        Metric(f"validation/{key}", float(value), at, number)
        for key, value in (record.get("validation") or {}).items()
        if value is not None
    ]
    return validation + steps
