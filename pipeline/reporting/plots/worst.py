"""Charts with a row per model: what is left in the worst case, and the norms that break a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeline.reporting.labels import norm_text
from pipeline.reporting.plots.charts import Bar
from pipeline.reporting.plots.style import FAINT, FRAME, TEXT, Styles, frame


@dataclass(frozen=True)
class Quartiles:
    """Norms of the examples that broke an image: lower quartile, median, upper quartile."""

    low: float
    median: float
    high: float
    broken: int


def worst_case(rows: Mapping[str, tuple[Bar, Bar | None]], styles: Styles, whiskers: str) -> Figure:
    """Draw a bar per model for the accuracy in the worst case, and a mark for clean images.

    Args:
        rows: model -> (accuracy in the worst case, accuracy on clean images or None).
        styles: as of :func:`pipeline.reporting.plots.style.styles`.
        whiskers: what the whiskers are, for the legend.
    """
    longest = max(len(name) for name in rows)
    figure = Figure(figsize=(4.7 + 0.06 * longest, 0.4 * len(rows) + 0.85), layout="constrained")
    axis = figure.add_subplot()
    for y, (model, (worst, clean)) in enumerate(rows.items()):
        axis.barh(y - 0.1, 100 * worst.accuracy, 0.42, color=styles[model]["color"])
        _whisker(axis, y - 0.1, worst, TEXT)
        if clean is not None:
            _whisker(axis, y + 0.27, clean, FRAME)
            axis.plot(
                100 * clean.accuracy, y + 0.27, "D", markersize=4.5, color=styles[model]["color"], fillstyle="none"
            )
        bounds = f"({100 * worst.low:.1f}–{100 * worst.high:.1f})"
        axis.text(106, y, f"{100 * worst.accuracy:.1f} {bounds}", va="center", fontsize=9, color=TEXT, clip_on=False)
    axis.set(xlim=(0, 104), ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy (%)")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=9.5, color=TEXT)
    axis.set_xticks(range(0, 101, 25))
    frame(axis)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    # The text beside the bars belongs to the axes, so that the layout leaves room for it.
    handles = [
        Patch(color=FAINT, label=f"under attack, {whiskers}"),
        Line2D([], [], marker="D", fillstyle="none", linestyle="none", color=FAINT, label="clean"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def norms(panels: Mapping[str, tuple[str, Mapping[str, Quartiles]]], styles: Styles) -> Figure:
    """Draw the median norms that break a model, with the quartiles.

    Args:
        panels: title (an attack) -> (norm, model -> quartiles).
    """
    models = list(dict.fromkeys(model for _, rows in panels.values() for model in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    names = 0.075 * max(map(len, models))
    figure = Figure(figsize=(names + 2.9 * columns + 0.4, (0.32 * len(models) + 1.2) * lines), layout="constrained")
    for i, (title, (norm, rows)) in enumerate(panels.items()):
        axis = figure.add_subplot(lines, columns, i + 1)
        right = max(q.high for q in rows.values())
        digits = 3 if norm == "linf" else 2
        for model, q in rows.items():
            y = models.index(model)
            axis.barh(y, q.median, 0.56, color=styles[model]["color"])
            axis.plot([q.low, q.high], [y, y], color=TEXT, linewidth=0.9)
            text = f"{q.median:.{digits}f} of {q.broken}"
            axis.text(q.high + 0.02 * right, y, text, va="center", fontsize=8.5, color=FAINT)
        axis.set(title=title.replace(", ", "\n", 1), xlim=(0, 1.45 * right), ylim=(len(models) - 0.5, -0.5))
        axis.set_xlabel(f"median {norm_text(norm)} norm ([0,1] pixels)")
        axis.set_yticks(range(len(models)), models if i % columns == 0 else [])
        frame(axis)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    return figure


def _whisker(axis: Axes, y: float, bar: Bar, colour: str) -> None:
    ends: Sequence[float] = (100 * bar.low, 100 * bar.high)
    axis.plot(ends, [y, y], color=colour, linewidth=1.1, marker="|", markersize=5, zorder=3)
