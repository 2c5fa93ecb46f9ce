"""Colours, line styles and frames of every plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.config.roles import first_replicates

UNDEFENDED = ("#6b7280", "#9ca3af", "#374151", "#b8bec8")
DEFENDED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito: told apart by colour-blind readers too. Undefended models are grey in every plot."""
LINES = ("-", "--", ":", "-.")
"""Where there are more models than colours, the next ones take the next line."""
RIGHT, WRONG = "#00795c", "#c2410c"
PHASE_COLOURS = {
    "joint": "#f2e9d8",
    "autoencoder": "#dcebf5",
    "classifier": "#ececec",
    "adversarial": "#f6dfe4",
    "reformer": "#dff0e4",
}
PHASE_NAMES = {
    "joint": "joint",
    "autoencoder": "auto-encoder only",
    "classifier": "classifier only",
    "adversarial": "adversarial training",
    "reformer": "reformer only",
}
MANY_LINES = 12
"""With more models than this, curves show the first replicate of each alone."""
MANY_BARS = 8
"""With more models than this, bars show means over the replicates; with still more, they lie beside their names."""
Styles = Mapping[str, Mapping[str, Any]]
"""Model -> keyword arguments of a line: color, linestyle. See :func:`styles`."""


def styles(roles: Mapping[str, str], bases: Mapping[str, str] | None = None) -> Styles:
    """Return the colour and line of each model.

    Both follow from a model's position, so compute them once, from all models of a run, and give them to every plot of it.
    First replicates are numbered first. So a plot with one entry per recipe model (``bases`` as keys) has the same colours.

    Args:
        roles: model -> source, control, defended or given; all models of the run.
        bases: model -> name in the recipe; None if no model has replicates.
    """
    counts = {True: 0, False: 0}
    out = {}
    for model in dict.fromkeys((*first_replicates(roles, bases or {m: m for m in roles}), *roles)):
        defended = roles[model] in ("defended", "given")
        palette = DEFENDED if defended else UNDEFENDED
        line, colour = divmod(counts[defended], len(palette))
        out[model] = {"color": palette[colour], "linestyle": LINES[line % len(LINES)]}
        counts[defended] += 1
    return out


def line_spines(axis: Axes, width: float, colour: str) -> None:
    """The frame of an axes."""
    for spine in axis.spines.values():
        spine.set(linewidth=width, color=colour)


def prediction_label(prediction: int, label: int) -> tuple[str, str]:
    """What stands over an example: ✓ or ✗ and the class that it is taken for; and its colour."""
    right = prediction == label
    return f"{'✓' if right else '✗'} {prediction}", RIGHT if right else WRONG


def grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each ``width`` x ``height`` inches."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * max(columns, 2), height * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axis in axes:
        frame(axis)
    return figure, axes


def frame(axis: Axes, title_size: float = 10.5) -> None:
    """No box, a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#d1d5db", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(title_size)


def legend(model: str, roles: Mapping[str, str]) -> str:
    """A model's name and, where that is something else, its role."""
    role = roles.get(model, model)
    return model if model == role else f"{model} ({role})"


def png(figure: Figure) -> bytes:
    """The bytes of a figure; the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return out.getvalue()
