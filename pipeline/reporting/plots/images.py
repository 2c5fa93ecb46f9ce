"""Rows of images: reconstructions and adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.reporting.plots.style import FRAME, line_spines, prediction_label

MAX_IMAGES = 10
MANY_ROWS = 16
"""With more rows of images than this, images are smaller."""


def reconstructions(gallery: Mapping[str, np.ndarray], models: Sequence[str]) -> Figure:
    """Draw clean images, their low-pass targets and the models' reconstructions, level by level."""
    # Level 0 has no stored target: its target is the image itself.
    levels = sorted({0, *(int(k.removeprefix("level_")) for k in gallery if k.startswith("level_"))})
    rows: list[tuple[str, np.ndarray]] = [(f"clean\n{_size(gallery['clean'])}", gallery["clean"])]
    for m in levels:
        if m > 0:
            rows.append((f"target of level {m}\n{_size(gallery[f'level_{m}'])}", gallery[f"level_{m}"]))
        for model in models:
            if (images := gallery.get(f"reconstruction_{m}__{model}")) is not None:
                rows.append((f"{model}: level {m}\n{_size(images)}", images))
    return image_rows([(label, images, None) for label, images in rows], gallery["label"])


def adversarial(gallery: Mapping[str, np.ndarray], rows: Sequence[tuple[str, str]]) -> Figure:
    """Draw clean images and the examples made of them.

    Args:
        rows: (label, key) of each row; the key follows ``adversarial__`` and ``prediction__``.
    """
    examples = [(label, gallery[f"adversarial__{key}"], gallery.get(f"prediction__{key}")) for label, key in rows]
    return image_rows([("clean", gallery["clean"], None), *examples], gallery["label"])


def image_rows(rows: Sequence[tuple[str, np.ndarray, np.ndarray | None]], labels: np.ndarray) -> Figure:
    """Draw rows of images.

    Args:
        rows: (title, images [n,C,H,W] in [0,1], predictions [n] or None) of each row.
        labels: true classes [n].
    """
    n = min(MAX_IMAGES, len(labels))
    side, gap, left = 0.82 if len(rows) <= MANY_ROWS else 0.6, 0.06, 1.9
    heads = [0.19 if i == 0 or predictions is not None else 0.02 for i, (*_, predictions) in enumerate(rows)]
    width, height = left + n * (side + gap), sum(heads) + len(rows) * (side + gap) + 0.05
    figure = Figure(figsize=(width, height))
    # All images share one axes, in inches: an axes per image takes ten times as long.
    axis = figure.add_axes((0, 0, 1, 1))
    y = 0.0
    for i, (title, images, predictions) in enumerate(rows):
        y += heads[i]
        axis.text(left - 0.1, y + side / 2, title, ha="right", va="center", fontsize=8.5, linespacing=1.25)
        for j in range(n):
            x = left + j * (side + gap)
            show_image(axis, images[j], (x, x + side, y + side, y))
            head, colour, line = (f"is {int(labels[j])}" if i == 0 else ""), "black", (0.5, FRAME)
            if predictions is not None:
                head, colour = prediction_label(int(predictions[j]), int(labels[j]))
                line = (1.4, colour)
            axis.add_patch(Rectangle((x, y), side, side, fill=False, linewidth=line[0], edgecolor=line[1], zorder=3))
            axis.text(x + side / 2, y - 0.03, head, ha="center", va="bottom", fontsize=8.5, color=colour)
        y += side + gap
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.set_axis_off()
    return figure


def show_image(axis: Axes, image: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draw one image [C,H,W], clipped to [0,1].

    Without ``extent`` the image fills its axes, and gets a thin frame.
    """
    image = np.clip(np.asarray(image, dtype=np.float32), 0, 1)
    image = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    if extent is None:
        axis.set(xticks=[], yticks=[])
        line_spines(axis, 0.5, FRAME)


def _size(images: np.ndarray) -> str:
    return f"{images.shape[-2]}×{images.shape[-1]}"
