"""Which class becomes which: counts of true and predicted classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from pipeline.reporting.plots.style import grid

MAX_CLASSES = 100
"""With more classes, the cells are too small to see."""
MAX_NUMBERED = 20
"""With more classes, the cells have no room for numbers."""

Confusions = Mapping[str, np.ndarray]
"""Title (a model and what it was shown) -> counts [true class, predicted class]."""


def counts(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Count the samples by true and predicted class; a prediction of -1 is no class and left out."""
    table = np.zeros((classes, classes), dtype=np.int64)
    valid = predictions >= 0
    np.add.at(table, (labels[valid], predictions[valid]), 1)
    return table


def most_frequent(table: np.ndarray) -> tuple[int, int, int] | None:
    """Return (true class, predicted class, samples) of the most frequent error; None without one."""
    errors = table - np.diag(np.diag(table))
    true, predicted = np.unravel_index(int(errors.argmax()), errors.shape)
    return (int(true), int(predicted), int(errors.max())) if errors.max() else None


def draw(confusions: Confusions, columns: int) -> Figure:
    """Draw a panel per table. Each row is shaded by its share of the true class."""
    classes = len(next(iter(confusions.values())))
    side = 2.85 if classes <= 10 else 4.2
    figure, axes = grid(len(confusions), columns=columns, width=side, height=side)
    for axis, (title, table) in zip(axes, confusions.items(), strict=True):
        shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
        axis.grid(False)
        axis.imshow(shares, vmin=0, vmax=1, cmap="cividis", interpolation="none")
        axis.set(title=title, xlabel="predicted class", ylabel="true class")
        if classes > MAX_NUMBERED:
            continue
        axis.set_xticks(range(classes))
        axis.set_yticks(range(classes))
        for i, j in np.argwhere(table > 0):
            colour = "#fcfcfc" if shares[i, j] < 0.55 else "#101010"
            axis.text(j, i, str(table[i, j]), ha="center", va="center", fontsize=7.5, color=colour)
    return figure
