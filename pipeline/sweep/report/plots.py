"""Plots of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.labels import attack_text
from pipeline.reporting.plots import style
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.plots.svg import LIGHT, settings
from pipeline.sweep.report.summary import finished, interval, references, robust_of, ties, value_text

NEUTRAL, FRONT, CHOICE = LIGHT["undefended-2"], LIGHT["blue"], LIGHT["vermilion"]
SHADES = "viridis"
NEAR = 0.035
"""Points that are nearer than this share of both axes have one label together."""
LABEL_OFFSETS = (8, -8, 20, -20)
"""Distances of labels from their points, in points of type."""
BINS_PER_DECADE = 1
MAX_BINS = 8
"""Most bins of a logarithmic range of real numbers."""
UNIFORM_BINS = 4
"""Bins of a linear range of real numbers."""
MAX_CELLS = 12
"""Most values of a range of whole numbers along an axis of the heat map."""


def draw(record: Mapping[str, Any]) -> dict[str, Plot]:
    """Return the plots of a sweep by name. A heat map needs two parameters."""
    with settings():
        plots = {"pareto": pareto(record), "parallel": parallel(record), "heat-map": heat_map(record)}
    return {name: plot for name, plot in plots.items() if plot is not None}


def pareto(record: Mapping[str, Any]) -> Plot:
    """Plot robust over clean accuracy with 95 % intervals, and mark front and choice."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.add_subplot()
    style.frame(axis)
    trials = finished(record)
    choice = record["choice"]["trial"]
    labels: list[tuple[float, float, str]] = []
    for trial in trials:
        low, high = interval(trial)
        number = trial.number
        colour = CHOICE if number == choice else FRONT if number in record["front"] else NEUTRAL
        x, y = 100 * trial.last.clean, 100 * trial.last.robust
        axis.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        marker, size, order = ("*", 12, 4) if number == choice else ("o", 5, 3)
        axis.plot(x, y, marker, color=colour, markersize=size, zorder=order)
        if colour != NEUTRAL:
            labels.append((x, y, str(number)))
    front = sorted((t for t in trials if t.number in record["front"]), key=lambda t: t.last.clean)
    axis.plot([100 * t.last.clean for t in front], [100 * t.last.robust for t in front], color=FRONT, linewidth=1)
    for name, scores in references(record).items():
        x, y = 100 * scores["clean"], 100 * scores["robust"]
        axis.plot(x, y, "D", color=style.TEXT, markersize=5, zorder=3)
        labels.append((x, y, name))
    axis.margins(0.1)
    axis.set_ylim(max(-4.0, axis.get_ylim()[0]), min(104.0, axis.get_ylim()[1]))
    axis.set_xlim(right=min(101.0, axis.get_xlim()[1]))
    # The margin may go beyond 0 and 100 %, but no number does.
    axis.set_xticks([t for t in axis.get_xticks() if max(0, axis.get_xlim()[0]) <= t <= min(100, axis.get_xlim()[1])])
    axis.set_yticks([t for t in axis.get_yticks() if max(0, axis.get_ylim()[0]) <= t <= min(100, axis.get_ylim()[1])])
    _label(axis, labels)
    axis.set_xlabel("clean accuracy, validation (%)")
    axis.set_ylabel(f"accuracy under {attack_text(record['space']['attack'])} (%)")
    caption = (
        "Validation images. Star: the choice. Blue: trials that no other trial exceeds in both accuracies, joined by a "
        "line. Grey: other trials. Diamonds: references. Numbers: trials. Vertical lines: 95 % interval."
    )
    return Plot("Clean against robust accuracy", caption, figure)


def _label(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a label beside each point. Points that are close together share one."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, text in sorted(points):
        near = (g for g in groups if abs(g[0] - x) < NEAR * (right - left) and abs(g[1] - y) < NEAR * (top - bottom))
        if (group := next(near, None)) is None:
            groups.append((x, y, [text]))
        else:
            group[2].append(text)
    for i, (x, y, texts) in enumerate(groups):
        # Labels go up and down in turn, in two rows each, so that those of neighbours do not touch.
        offset = LABEL_OFFSETS[i % len(LABEL_OFFSETS)]
        axis.annotate(
            ", ".join(texts),
            (x, y),
            xytext=(0, offset),
            textcoords="offset points",
            fontsize=8,
            ha="right" if x > (left + 3 * right) / 4 else "center",
            va="bottom" if offset > 0 else "top",
        )


def parallel(record: Mapping[str, Any]) -> Plot:
    """Plot parallel coordinates: a line per finished trial, shaded by its robust accuracy."""
    trials = sorted(finished(record), key=robust_of)
    names = list(record["space"]["parameters"])
    axes: dict[str, list[float]] = {}
    ticks: dict[str, list[tuple[float, str]]] = {}
    for name in names:
        axes[name], ticks[name] = _scaled(record["space"]["parameters"][name], [t.parameters[name] for t in trials])
    for name, key in (("clean %", "clean"), ("robust %", "robust")):
        low, high = _range([100 * getattr(t.last, key) for t in trials])
        axes[name] = [(100 * getattr(t.last, key) - low) / (high - low) for t in trials]
        marks = [m for m in MaxNLocator(5, integer=True).tick_values(low, high) if low <= m <= high]
        ticks[name] = [((mark - low) / (high - low), f"{mark:g}") for mark in marks]
    figure = Figure(figsize=(max(6.4, 1.8 * len(axes)), 4.2), layout="constrained")
    axis = figure.add_subplot()
    axis.spines[:].set_visible(False)
    shade = _shades(trials)
    for i, trial in enumerate(trials):
        chosen = trial.number == record["choice"]["trial"]
        axis.plot(
            range(len(axes)),
            [values[i] for values in axes.values()],
            color=CHOICE if chosen else shade(robust_of(trial)),
            linewidth=2.4 if chosen else 1.2,
            zorder=3 if chosen else 2,
        )
    for x, name in enumerate(axes):
        axis.axvline(x, color=style.FRAME, linewidth=0.8)
        for y, text in ticks[name]:
            axis.annotate(
                text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center", color=style.FAINT
            )
    axis.set_xticks(range(len(axes)), list(axes))
    axis.set_yticks([])
    axis.margins(x=0.08)
    tied = ties(record)
    shades = f"All lines have one colour, because {tied}." if tied else "The lighter a line, the more robust its trial."
    return Plot("Parameters and results", f"A line per finished trial. Orange: the choice. {shades}", figure)


def _range(percents: Sequence[float]) -> tuple[float, float]:
    """Return whole percents around the values, at least one apart, and within 0 to 100."""
    low, high = math.floor(min(percents)), math.ceil(max(percents))
    if low == high:
        low, high = (low, high + 1) if high < 100 else (low - 1, high)
    return low, high


def _shades(trials: Sequence[Any]) -> Any:
    """Return a function from robust accuracy to colour. Equal accuracies have the same colour."""
    values = [robust_of(trial) for trial in trials]
    low, high = min(values), max(values)
    # The lightest fifth of the scale can hardly be seen on white, the darkest on black.
    scale = Normalize(low, high) if high > low else Normalize(low - 1, low + 1)
    colours = matplotlib.colormaps[SHADES]
    return lambda value: colours(0.15 + 0.7 * float(scale(value)))


def _scaled(domain: Mapping[str, Any], values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the values of one parameter on an axis from 0 to 1, and the axis's ticks."""
    kind = domain["domain"]
    if kind == "Choice":
        allowed = domain["values"]
        places = {value: i / max(1, len(allowed) - 1) for i, value in enumerate(allowed)}
        return [places[v] for v in values], [(y, value_text(v)) for v, y in places.items()]
    low, high = domain["low"], domain["high"]
    if kind == "LogUniform":
        span = math.log(high / low)
        exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [math.log(v / low) / span for v in values], [
            (math.log(10**e / low) / span, f"{10.0**e:g}") for e in exponents
        ]
    whole = kind == "IntRange" and high - low < MAX_CELLS
    marks = range(low, high + 1) if whole else [low + (high - low) * i / 4 for i in range(5)]
    return [(v - low) / (high - low) for v in values], [((m - low) / (high - low), f"{m:g}") for m in marks]


def mapped_parameters(record: Mapping[str, Any]) -> list[str]:
    """Return the parameters of the heat map: those of the paper's claim, or the first two."""
    names = list(record["space"]["parameters"])
    return ["lam", "shared_blocks"] if {"lam", "shared_blocks"} <= set(names) else names[:2]


def heat_map(record: Mapping[str, Any]) -> Plot | None:
    """Plot mean robust accuracy over two parameters; None if the space has one.

    Ranges of real numbers are divided into bins.
    """
    names = mapped_parameters(record)
    if len(names) < 2:
        return None
    trials = finished(record)
    (columns, x_labels), (rows, y_labels) = (
        _cells(record["space"]["parameters"][name], [t.parameters[name] for t in trials]) for name in names
    )
    sums = np.zeros((len(y_labels), len(x_labels)))
    counts = np.zeros_like(sums)
    for trial, x, y in zip(trials, columns, rows, strict=True):
        sums[y, x] += 100 * robust_of(trial)
        counts[y, x] += 1
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    low, high = _range([float(mean) for mean in means[counts > 0]])
    figure = Figure(figsize=(max(4.6, 0.85 * len(x_labels) + 1.9), 0.62 * len(y_labels) + 1.3), layout="constrained")
    axis = figure.add_subplot()
    style.frame(axis)
    axis.grid(False)
    image = axis.imshow(means, cmap=SHADES, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="none")
    for (y, x), count in np.ndenumerate(counts):
        if count:
            colour = "#fcfcfc" if means[y, x] < (low + high) / 2 else "#101010"
            axis.text(x, y, f"{means[y, x]:.1f}\n({count:.0f})", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(x_labels)), x_labels, fontsize=8)
    axis.set_yticks(range(len(y_labels)), y_labels, fontsize=8)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    tied = ties(record)
    if not tied:
        figure.colorbar(image, ax=axis, label="robust accuracy (%)")
    caption = "Robust accuracy in %: the mean of the trials in a cell, and in brackets how many they are."
    caption += f" There is one shade, because {tied}." if tied else ""
    return Plot("Robust accuracy over two parameters", caption, figure)


def _cells(domain: Mapping[str, Any], values: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Return the cell of each value along an axis, and the cells' labels."""
    kind = domain["domain"]
    if kind == "Choice":
        allowed = list(domain["values"])
        return [allowed.index(v) for v in values], [value_text(v) for v in allowed]
    low, high = domain["low"], domain["high"]
    if kind == "IntRange" and high - low < MAX_CELLS:
        return [v - low for v in values], [str(v) for v in range(low, high + 1)]
    log = kind == "LogUniform"
    begin, end = (math.log10(low), math.log10(high)) if log else (low, high)
    count = min(MAX_BINS, max(2, round((end - begin) * BINS_PER_DECADE))) if log else UNIFORM_BINS
    shares = [((math.log10(v) if log else v) - begin) / (end - begin) for v in values]
    edges = [begin + (end - begin) * i / count for i in range(count + 1)]
    texts = [f"{10**edge if log else edge:.2g}" for edge in edges]
    labels = [f"{left} to\n{right}" for left, right in itertools.pairwise(texts)]
    return [min(count - 1, int(share * count)) for share in shares], labels
