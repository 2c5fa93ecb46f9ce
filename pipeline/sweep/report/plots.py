"""Plots of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.reporting.plots import style
from pipeline.sweep.report.summary import finished, interval, references, robust_of, value_text

NEUTRAL, FRONT, CHOICE = "#9ca3af", "#0072b2", "#d55e00"
BINS_PER_DECADE = 1
MAX_BINS = 8
"""Most bins of a logarithmic range of real numbers."""
UNIFORM_BINS = 4
"""Bins of a linear range of real numbers."""
MAX_CELLS = 12
"""Most values of a range of whole numbers along an axis of the heat map."""
PLOTS = {
    "pareto": "Clean against robust accuracy on validation images; the line joins what no other trial exceeds in both",
    "parallel": "Every finished trial as a line over its parameters and results",
    "heat-map": "Robust accuracy over two parameters: the mean of the trials in a cell, and how many they are",
}


def pareto(record: Mapping[str, Any]) -> bytes:
    """Plot robust over clean accuracy with 95 % intervals, and mark front and choice."""
    figure, (axis,) = style.grid(1, columns=1, width=3.6, height=4.4)
    trials = finished(record)
    choice = record["choice"]["trial"]
    for trial in trials:
        low, high = interval(trial)
        number = trial.number
        colour = CHOICE if number == choice else FRONT if number in record["front"] else NEUTRAL
        x, y = 100 * trial.last.clean, 100 * trial.last.robust
        axis.errorbar(x, y, yerr=[[y - 100 * low], [100 * high - y]], color=colour, linewidth=0.7, alpha=0.5, zorder=2)
        marker, size = ("*", 12) if number == choice else ("o", 5)
        axis.plot(x, y, marker, color=colour, markersize=size, zorder=3)
        if colour != NEUTRAL:
            axis.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    front = sorted((t for t in trials if t.number in record["front"]), key=lambda t: t.last.clean)
    axis.plot([100 * t.last.clean for t in front], [100 * t.last.robust for t in front], color=FRONT, linewidth=1)
    for name, scores in references(record).items():
        x, y = 100 * scores["clean"], 100 * scores["robust"]
        axis.plot(x, y, "D", color="#111827", markersize=5, zorder=3)
        axis.annotate(name, (x, y), xytext=(6, -9), textcoords="offset points", fontsize=8)
    axis.set_xlabel("clean accuracy, validation (%)")
    axis.set_ylabel(f"accuracy under {record['space']['attack']} (%)")
    axis.set_title("front (line), choice (star), references (diamonds)")
    return svg(figure)


def parallel(record: Mapping[str, Any]) -> bytes:
    """Plot parallel coordinates: a line per finished trial, darker where it is more robust."""
    from matplotlib import colormaps

    trials = sorted(finished(record), key=robust_of)
    names = list(record["space"]["parameters"])
    axes: dict[str, list[float]] = {}
    ticks: dict[str, list[tuple[float, str]]] = {}
    for name in names:
        axes[name], ticks[name] = _scaled(record["space"]["parameters"][name], [t.parameters[name] for t in trials])
    for name, key in (("clean %", "clean"), ("robust %", "robust")):
        values = [100 * getattr(t.last, key) for t in trials]
        low, high = math.floor(min(values)), math.ceil(max(values))
        span = max(high - low, 1)
        axes[name] = [(v - low) / span for v in values]
        ticks[name] = [(i / 4, f"{low + span * i / 4:g}") for i in range(5)]
    figure, (axis,) = style.grid(1, columns=1, width=max(3.2, 0.9 * len(axes)), height=4.0)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    shade = colormaps["viridis_r"]
    for i, trial in enumerate(trials):
        chosen = trial.number == record["choice"]["trial"]
        axis.plot(
            range(len(axes)),
            [values[i] for values in axes.values()],
            color=CHOICE if chosen else shade(i / max(1, len(trials) - 1)),
            linewidth=2.2 if chosen else 1.0,
            alpha=1.0 if chosen else 0.8,
        )
    for x, name in enumerate(axes):
        axis.axvline(x, color="#374151", linewidth=0.8)
        for y, text in ticks[name]:
            axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=7.5, va="center")
    axis.set_xticks(range(len(axes)), list(axes))
    axis.set_yticks([])
    axis.margins(x=0.08)
    axis.set_title("darker: more robust; orange: the choice")
    return svg(figure)


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


def heat_map(record: Mapping[str, Any]) -> bytes | None:
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
    width, height = 0.85 * len(x_labels) + 1.5, 0.6 * len(y_labels) + 1.4
    figure, (axis,) = style.grid(1, columns=1, width=width / 2, height=height)
    axis.grid(False)
    image = axis.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = float(np.nanmean(means))
    for (y, x), count in np.ndenumerate(counts):
        if count:
            colour = "white" if means[y, x] < middle else "black"
            axis.text(x, y, f"{means[y, x]:.1f}\n({count:.0f})", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(x_labels)), x_labels, fontsize=8)
    axis.set_yticks(range(len(y_labels)), y_labels, fontsize=8)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.set_title("robust accuracy in %: mean (trials)")
    figure.colorbar(image, ax=axis)
    return svg(figure)


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
