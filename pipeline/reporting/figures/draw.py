"""Figures of the paper that a recipe asks for (``Experiment.figures``), drawn from records alone.

Each comes with a caption that says what was measured, on what and on how many images, and what the paper says of its own
figure. figures.npz is described in ``pipeline/evaluation/gallery.py``, which writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.reporting.figures.common import Picture
from pipeline.reporting.figures.fig2 import fig2
from pipeline.reporting.figures.fig5 import fig5
from pipeline.reporting.figures.fig6 import fig6
from pipeline.reporting.figures.fig7 import fig7
from pipeline.reporting.figures.fig8 import fig8
from pipeline.reporting.records import experiment_of


def draw(
    record: Mapping[str, Any],
    gallery: Mapping[str, np.ndarray],
    stored: Mapping[str, np.ndarray],
    roles: Mapping[str, str],
) -> dict[str, Picture]:
    """Every figure that the recipe asks for and there are data for, by name, in the paper's order.

    Args:
        record: run.json. gallery: gallery.npz. stored: figures.npz.
        roles: model -> source, control or defended, in table order.
    """
    experiment = experiment_of(record)
    bases = experiment.base_names()
    made: dict[str, Callable[[], Picture | None]] = {
        "fig2": lambda: fig2(stored),
        "fig5": lambda: fig5(record, gallery, roles),
        "fig6": lambda: fig6(stored, roles),
        "fig7": lambda: fig7(record, roles),
        "fig8": lambda: fig8(stored, roles, bases),
    }
    found = {name: make() for name, make in made.items() if name in experiment.figures}
    return {name: picture for name, picture in found.items() if picture is not None}
