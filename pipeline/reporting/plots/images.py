"""Rows of images: reconstructions and adversarial examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.reporting.plots.style import FRAME, TEXT, line_spines, prediction_label

MAX_IMAGES = 10
MAX_SIDE = 112
"""Most pixels a side of an image in a plot: it is as large on the page, and a file stays small."""
MANY_ROWS = 16
"""With more rows of images than this, images are smaller."""


@dataclass(frozen=True)
class ImageRow:
    """A row of images with its title, and the text over each image."""

    title: str
    images: np.ndarray
    """Shape [n,C,H,W], in [0,1]."""
    predictions: np.ndarray | None = None
    """Predicted classes [n], to compare with the true ones."""
    notes: Sequence[str] = ()
    """Text over each image, if there are no predictions."""


def reconstructions(gallery: Mapping[str, np.ndarray], models: Sequence[str]) -> Figure:
    """Draw clean images, their low-pass targets and the models' reconstructions, level by level."""
    # Level 0 has no stored target: its target is the image itself.
    levels = sorted({0, *(int(k.removeprefix("level_")) for k in gallery if k.startswith("level_"))})
    rows = [ImageRow(f"clean\n{_size(gallery['clean'])}", gallery["clean"])]
    for m in levels:
        if m > 0:
            rows.append(ImageRow(f"target of level {m}\n{_size(gallery[f'level_{m}'])}", gallery[f"level_{m}"]))
        for model in models:
            if (images := gallery.get(f"reconstruction_{m}__{model}")) is not None:
                rows.append(ImageRow(f"{model}: level {m}\n{_size(images)}", images))
    return image_rows(rows, gallery["label"])


def adversarial(
    gallery: Mapping[str, np.ndarray], rows: Sequence[tuple[str, str]], clean_predictions: np.ndarray | None
) -> tuple[Figure, float]:
    """Draw clean images, the examples made of them, and the amplified differences with their norms.

    Args:
        rows: (label, key) of each attack; the key follows ``adversarial__`` and ``prediction__``.
        clean_predictions: predicted classes of the clean images, None if they are not known.

    Returns:
        The figure, and the factor by which the differences are amplified.
    """
    clean = gallery["clean"]
    deltas = {key: gallery[f"adversarial__{key}"].astype(np.float64) - clean for _, key in rows}
    factor = amplification(list(deltas.values()))
    drawn = [ImageRow("clean", clean, clean_predictions)]
    for label, key in rows:
        l2, linf = perturbation_norms(deltas[key])
        notes = [f"L2 {a:.2f}\nLinf {b:.2f}" for a, b in zip(l2, linf, strict=True)]
        drawn.append(ImageRow(label, gallery[f"adversarial__{key}"], gallery.get(f"prediction__{key}")))
        drawn.append(ImageRow(f"difference × {factor:g}", 0.5 + factor * deltas[key], notes=notes))
    return image_rows(drawn, gallery["label"]), factor


def perturbation_norms(deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the L2 and Linf norms, float64 [n] each, of perturbations [n,C,H,W]."""
    flat = np.asarray(deltas, dtype=np.float64).reshape(len(deltas), -1)
    return np.sqrt((flat**2).sum(1)), np.abs(flat).max(1)


def amplification(deltas: Sequence[np.ndarray]) -> float:
    """Return a round factor by which perturbations [n,C,H,W] fill about the range of an image.

    It is 1, 2, 5, 10, 20, ..., so that the median of the largest changes is at most 0.5.
    """
    largest = statistics.median(float(x) for delta in deltas for x in perturbation_norms(delta)[1])
    value = 0.5 / max(1e-6, largest)
    if value < 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * max(step for step in (1, 2, 5) if step * power <= value)


def image_rows(rows: Sequence[ImageRow], labels: np.ndarray) -> Figure:
    """Draw rows of images. The first row shows the true classes ``labels`` [n]."""
    n = min(MAX_IMAGES, len(labels))
    side, gap, left = 0.82 if len(rows) <= MANY_ROWS else 0.66, 0.06, 1.9
    lines = [head.count("\n") + 1 if (head := _heads(row, labels, i == 0)[0][0]) else 0 for i, row in enumerate(rows)]
    heads = [0.12 * count + 0.06 if count else 0.02 for count in lines]
    width, height = left + n * (side + gap), sum(heads) + len(rows) * (side + gap) + 0.05
    figure = Figure(figsize=(width, height))
    # All images share one axes, in inches: an axes per image takes ten times as long.
    axis = figure.add_axes((0, 0, 1, 1))
    y = 0.0
    for i, row in enumerate(rows):
        y += heads[i]
        axis.text(left - 0.1, y + side / 2, row.title, ha="right", va="center", fontsize=8.5, linespacing=1.25)
        for j, (head, colour) in enumerate(_heads(row, labels, i == 0)[:n]):
            x = left + j * (side + gap)
            show_image(axis, row.images[j], (x, x + side, y + side, y))
            line = (0.5, FRAME) if row.predictions is None else (1.4, colour)
            axis.add_patch(Rectangle((x, y), side, side, fill=False, linewidth=line[0], edgecolor=line[1], zorder=3))
            axis.text(x + side / 2, y - 0.03, head, ha="center", va="bottom", fontsize=8, color=colour, linespacing=1)
        y += side + gap
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axis.set_axis_off()
    return figure


def _heads(row: ImageRow, labels: np.ndarray, first: bool) -> list[tuple[str, str]]:
    """Return the text over each image of a row, and its colour."""
    if row.predictions is None:
        notes = row.notes or ([f"is {int(label)}" for label in labels] if first else [""] * len(labels))
        return [(note, TEXT) for note in notes]
    heads = [prediction_label(int(p), int(label)) for p, label in zip(row.predictions, labels, strict=False)]
    if first:
        heads = [(f"is {int(label)}\n{head}", colour) for (head, colour), label in zip(heads, labels, strict=True)]
    return heads


def show_image(axis: Axes, image: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draw one image [C,H,W], clipped to [0,1].

    Without ``extent`` the image fills its axes, and gets a thin frame.
    """
    image = np.clip(_reduced(np.asarray(image, dtype=np.float32)), 0, 1)
    image = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none", extent=extent)
    if extent is None:
        axis.set(xticks=[], yticks=[])
        line_spines(axis, 0.5, FRAME)


def _reduced(image: np.ndarray) -> np.ndarray:
    """Return an image [C,H,W] of at most MAX_SIDE pixels a side, by means over square blocks."""
    channels, height, width = image.shape
    block = math.ceil(max(height, width) / MAX_SIDE)
    if block == 1:
        return image
    image = image[:, : height // block * block, : width // block * block]
    reduced: np.ndarray = image.reshape(channels, height // block, block, width // block, block).mean(axis=(2, 4))
    return reduced


def _size(images: np.ndarray) -> str:
    return f"{images.shape[-2]}×{images.shape[-1]}"
