"""The training of all models of a run as one table, for pandas and TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

FILE = "report/history.csv"
_FIRST = ("lr", "images_per_second", "loss")
"""Columns behind those of every row. Terms of the loss and validation follow them."""


def to_csv(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return one line per model and step as CSV.

    Epochs and steps count from 0, ``time`` is in unix seconds. The last step of an epoch has the
    ``validation_...`` columns, which are empty elsewhere.

    Args:
        histories: model -> records of its epochs (docs/records.md).
    """
    rows = [row for model, epochs in histories.items() for epoch in epochs for row in _rows(model, epoch)]
    names = dict.fromkeys(name for row in rows for name in row)
    validation = sorted(name for name in names if name.startswith("validation_"))
    fixed = ("model", "epoch", "step", "time", "phase", *_FIRST)
    terms = sorted(name for name in names if name not in fixed and name not in validation)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*fixed, *terms, *validation], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _rows(model: str, epoch: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"model": model, "epoch": epoch["epoch"], "phase": epoch["phase"], **step} for step in epoch["steps"]]
    if rows:
        rows[-1] |= {f"validation_{name}": value for name, value in epoch.get("validation", {}).items()}
    return rows
