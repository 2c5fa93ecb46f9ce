"""Colours, line styles and frames of every plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.config.roles import first_replicates
from pipeline.reporting.plots.svg import LIGHT, svg

UNDEFENDED = tuple(LIGHT[f"undefended-{i}"] for i in (1, 2, 3, 4))
"""Greys of the undefended models, in every plot."""
DEFENDED = tuple(LIGHT[name] for name in ("blue", "vermilion", "green", "pink", "orange", "sky"))
"""Colours of the other models (Okabe & Ito). Colour-blind readers can tell them apart too."""
LINES = ("-", "--", ":", "-.")
"""Line styles. If there are more models than colours, the next ones take the next line style."""
TEXT, FAINT, FRAME = LIGHT["text"], LIGHT["faint"], LIGHT["frame"]
RIGHT, WRONG = LIGHT["right"], LIGHT["wrong"]
PHASE_STYLES = {
    "joint": ("joint", LIGHT["phase-joint"]),
    "autoencoder": ("auto-encoder only", LIGHT["phase-autoencoder"]),
    "classifier": ("classifier only", LIGHT["phase-classifier"]),
    "adversarial": ("adversarial training", LIGHT["phase-adversarial"]),
    "adversarial_joint": ("joint, on examples", LIGHT["phase-adversarial-joint"]),
    "adversarial_autoencoder": ("auto-encoder only, on examples", LIGHT["phase-adversarial-autoencoder"]),
    "reformer": ("reformer only", LIGHT["phase-reformer"]),
}
"""Phase of a training schedule -> (label, colour)."""
MANY_LINES = 12
"""With more models than this, curves show only the first replicate of each."""
MANY_BARS = 8
"""With more models than this, bars show means over the replicates. With still more, they lie."""
Styles = Mapping[str, Mapping[str, Any]]
"""Model -> keyword arguments of a line: color, linestyle. See :func:`styles`."""


@dataclass(frozen=True)
class Plot:
    """A plot with the words around it."""

    heading: str
    caption: str
    figure: Figure

    @cached_property
    def svg(self) -> bytes:
        """The figure as an SVG file."""
        return svg(self.figure)


def styles(roles: Mapping[str, str], bases: Mapping[str, str] | None = None) -> Styles:
    """Return the colour and the line style of each model.

    Both follow from a model's position, so compute them once, from all models of a run. First
    replicates come first: a plot with one entry per recipe model then has the same colours.

    Args:
        roles: model -> source, control, defended or given; all models of the run.
        bases: model -> name in the recipe; None if no model has replicates.
    """
    counts = {True: 0, False: 0}
    styles = {}
    for model in dict.fromkeys((*first_replicates(roles, bases or {m: m for m in roles}), *roles)):
        defended = roles[model] in ("defended", "given")
        palette = DEFENDED if defended else UNDEFENDED
        line, colour = divmod(counts[defended], len(palette))
        styles[model] = {"color": palette[colour], "linestyle": LINES[line % len(LINES)]}
        counts[defended] += 1
    return styles


def line_spines(axis: Axes, width: float, colour: str) -> None:
    """Draw the frame of an axes."""
    for spine in axis.spines.values():
        spine.set(linewidth=width, color=colour)


def prediction_label(prediction: int, label: int) -> tuple[str, str]:
    """Return the text over an example (✓ or ✗, and the predicted class), and its colour."""
    right = prediction == label
    return f"{'✓' if right else '✗'} {prediction}", RIGHT if right else WRONG


def grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with a number of panels, each ``width`` x ``height`` inches."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * max(columns, 2), height * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axis in axes:
        frame(axis)
    return figure, axes


def frame(axis: Axes, title_size: float = 10.5) -> None:
    """Give an axes a faint grid and no box."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=LIGHT["line"], linewidth=0.5)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(title_size)


def legend(model: str, roles: Mapping[str, str]) -> str:
    """Return a model's name and, if it differs, its role."""
    role = roles.get(model, model)
    return model if model == role else f"{model} ({'external' if role == 'given' else role})"
