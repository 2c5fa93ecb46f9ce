"""The figures of the paper that a recipe asks for (``Experiment.figures``), drawn from records.

The caption of a figure says what was measured, on what and on how many images, and what the paper
says of its own figure. ``pipeline/evaluation/figure_data.py`` describes the arrays of figures.npz.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.records import RunRecord
from pipeline.reporting.figures.fig2 import fig2
from pipeline.reporting.figures.fig5 import fig5
from pipeline.reporting.figures.fig6 import fig6
from pipeline.reporting.figures.fig7 import fig7
from pipeline.reporting.figures.fig8 import fig8
from pipeline.reporting.plots.style import Plot


def draw(record: RunRecord, gallery: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, Plot]:
    """Return every figure that the recipe asks for and that has data, in the paper's order.

    Args:
        record: the run.
        gallery: the arrays of ``gallery.npz``.
        arrays: the arrays of ``figures.npz``.
    """
    makers: dict[str, Callable[[], Plot | None]] = {
        "fig2": lambda: fig2(arrays),
        "fig5": lambda: fig5(record, gallery),
        "fig6": lambda: fig6(arrays, record.roles),
        "fig7": lambda: fig7(record),
        "fig8": lambda: fig8(arrays, record.roles, record.bases),
    }
    figures = {name: make() for name, make in makers.items() if name in record.experiment.figures}
    return {name: figure for name, figure in figures.items() if figure is not None}
