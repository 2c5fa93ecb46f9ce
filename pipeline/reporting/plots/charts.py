"""The pictures of a report: records in, PNG bytes out. The same records give the same bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.plots.style import (
    DEFENDED,
    MANY_BARS,
    PHASE_COLOURS,
    PHASE_NAMES,
    UNDEFENDED,
    Styles,
    frame,
    grid,
    legend,
    png,
)

LOSSES = {
    "loss": ("total", "#111827"),
    "loss_cls": ("classification", "#0072b2"),
    "loss_adv": ("classification, adversarial", "#cc79a7"),
    "loss_rec": ("reconstruction", "#d55e00"),
}
"""``bit_power`` is not plotted: its share of a reformer's loss is what the total exceeds the reconstruction by."""
MAX_POINTS = 600
"""A curve has no more points than the eye can tell apart; each is the mean of the steps it stands for."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An accuracy with its 95 % interval, as fractions."""

    accuracy: float
    low: float
    high: float


Panels = Mapping[str, Mapping[str, Mapping[str, Bar]]]
"""Title (a threat model) -> group label (an attack) -> model -> bar."""


def over_replicates(panels: Panels, bases: Mapping[str, str]) -> dict[str, dict[str, dict[str, Bar]]]:
    """Bars of the mean over the replicates of each model, from the least to the greatest of them."""
    out: dict[str, dict[str, dict[str, Bar]]] = {}
    for title, groups in panels.items():
        for label, models in groups.items():
            found: dict[str, list[float]] = {}
            for model, bar in models.items():
                found.setdefault(bases[model], []).append(bar.accuracy)
            out.setdefault(title, {})[label] = {
                base: Bar(accuracy=sum(values) / len(values), low=min(values), high=max(values))
                for base, values in found.items()
            }
    return out


def losses(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training losses over steps, a panel per model, the phase behind them. ``histories``: model -> epoch records."""
    figure, axes = grid(len(histories), columns=min(3, len(histories)), width=4.3, height=3.2)
    phases: dict[str, None] = {}
    for axis, (model, epochs) in zip(axes, histories.items(), strict=False):
        steps = np.array([s["step"] for e in epochs for s in e["steps"]])
        for epoch in epochs:
            phases[epoch["phase"]] = None
            first, last = epoch["steps"][0]["step"], epoch["steps"][-1]["step"]
            axis.axvspan(first - 0.5, last + 0.5, color=PHASE_COLOURS[epoch["phase"]], linewidth=0)
        for key, (label, colour) in LOSSES.items():
            values = np.array([_number(s.get(key)) for e in epochs for s in e["steps"]])
            there = np.isfinite(values)
            if key != "loss" and np.array_equal(values[there], _total(epochs)[there]):
                continue  # wherever there is this term it is the only one: the total says it already
            if there.any() and np.nanmax(values) > 0:
                x, y = _thin(steps, values)
                axis.plot(x, y, color=colour, linewidth=1.2, label=label)
        axis.set(title=model, xlabel="step", ylabel="loss", yscale="log")
        axis.yaxis.set_major_formatter(_plain)
        if np.diff(np.log10(axis.get_ylim()))[0] < 1.5:  # else the powers of ten are enough
            axis.yaxis.set_minor_formatter(_plain)
        else:
            axis.yaxis.set_minor_formatter("")
        axis.margins(x=0)
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    shades = [Patch(color=PHASE_COLOURS[p], label=PHASE_NAMES[p]) for p in phases]
    figure.legend(
        [*handles.values(), *shades], [*handles, *(PHASE_NAMES[p] for p in phases)], loc="outside lower center", ncols=6
    )
    return png(figure)


def validation(histories: Mapping[str, Sequence[Mapping[str, Any]]], roles: Mapping[str, str], looks: Styles) -> bytes:
    """Draw the validation accuracy after each epoch, a line per model. ``looks``: of all models of the run."""
    many = len(histories) > 6
    figure = Figure(figsize=(9, 4) if many else (6.5, 3.4), layout="constrained")
    axis = figure.add_subplot()
    for model, epochs in histories.items():
        found = [(e["epoch"] + 1, e["validation"].get("accuracy")) for e in epochs if e.get("validation")]
        points = [(x, 100 * y) for x, y in found if y is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                **looks[model],
                marker="o",
                markersize=3.5,
                label=legend(model, roles),
            )
    axis.set(xlabel="epochs done", ylabel="validation accuracy (%), clean images")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    frame(axis)
    if many:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        axis.legend(frameon=False)
    return png(figure)


def bars(panels: Panels, roles: Mapping[str, str], looks: Styles) -> bytes:
    """Draw accuracies with their intervals.

    More models than MANY_BARS get horizontal bars, a panel per attack, with the number beside each bar and a dash where
    nothing was measured.

    Args:
        roles: model -> role of the models to draw, in their order.
        looks: of all models of the run.
    """
    palette = {model: looks[model]["color"] for model in roles}
    if len(roles) > MANY_BARS:
        return _lying_bars(panels, roles, palette)
    widths = [max(1, len(groups)) for groups in panels.values()]
    per_row = 6
    rows: list[list[str]] = []
    used = per_row
    for title, width in zip(panels, widths, strict=True):
        if used + width > per_row:
            rows.append([])
            used = 0
        rows[-1].append(title)
        used += width
    figure = Figure(figsize=(11, 3.1 * len(rows) + 0.5), layout="constrained")
    sub = np.atleast_1d(np.asarray(figure.subfigures(len(rows), 1), dtype=object))
    for row, part in zip(rows, sub, strict=True):
        ratios = [max(1, len(panels[t])) for t in row]
        axes = np.atleast_1d(np.asarray(part.subplots(1, len(row), width_ratios=ratios), dtype=object))
        for title, axis in zip(row, axes, strict=True):
            _bar_panel(axis, title, panels[title], palette)
    handles = [Patch(color=palette[m], label=legend(m, roles)) for m in roles]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def _bar_panel(axis: Axes, title: str, groups: Mapping[str, Mapping[str, Bar]], palette: Mapping[str, str]) -> None:
    width = 0.82 / max(1, len(palette))
    for i, models in enumerate(groups.values()):
        for j, model in enumerate(palette):
            if (bar := models.get(model)) is None:
                continue
            x = i + (j - (len(palette) - 1) / 2) * width
            y = 100 * bar.accuracy
            error = [[max(0.0, y - 100 * bar.low)], [max(0.0, 100 * bar.high - y)]]
            axis.bar(x, y, width * 0.92, color=palette[model])
            axis.errorbar(x, y, error, color="#111827", linewidth=0.9, capsize=2)
            if bar.high == 0:  # neither bar nor whisker would be seen
                axis.text(x, 1.5, "0", ha="center", fontsize=8, color="#374151")
    axis.set(title=title, ylabel="accuracy (%)", ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_yticks(range(0, 101, 25))
    frame(axis)
    axis.grid(axis="x", visible=False)


def _lying_bars(panels: Panels, roles: Mapping[str, str], palette: Mapping[str, str]) -> bytes:
    per_row = 5
    rows: list[list[tuple[str, Mapping[str, Bar]]]] = []
    for title, groups in panels.items():
        cells = [(_column_title(title, label), models) for label, models in groups.items()]
        for i, cell in enumerate(cells):
            # a threat model begins a new row rather than be torn apart
            if not rows or len(rows[-1]) == per_row or (i == 0 and len(rows[-1]) + min(len(cells), per_row) > per_row):
                rows.append([])
            rows[-1].append(cell)
    names = list(roles)
    lines = [max(title.count("\n") + 1 for title, _ in row) for row in rows]
    heights = [0.21 * len(names) + 0.19 * n + 0.55 for n in lines]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    sub = np.atleast_1d(np.asarray(figure.subfigures(len(rows), 1, height_ratios=heights), dtype=object))
    for row, part in zip(rows, sub, strict=True):
        axes = np.atleast_1d(np.asarray(part.subplots(1, per_row, sharey=True), dtype=object))
        for axis in axes[len(row) :]:
            axis.set_axis_off()
        for (title, models), axis in zip(row, axes, strict=False):
            for y, model in enumerate(names):
                if (bar := models.get(model)) is None:
                    axis.text(3, y, "–", va="center", fontsize=7.5, color="#374151")
                    continue
                x = 100 * bar.accuracy
                error = [[max(0.0, x - 100 * bar.low)], [max(0.0, 100 * bar.high - x)]]
                axis.barh(y, x, 0.72, color=palette[model])
                axis.errorbar(x, y, xerr=error, color="#111827", linewidth=0.9, capsize=2)
                axis.text(100 * bar.high + 3, y, f"{x:.1f}", va="center", fontsize=7.5, color="#374151")
            axis.set(xlim=(0, 123), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy (%)")
            axis.set_title(title, fontsize=9.5)
            axis.set_xticks(range(0, 101, 25))
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(labelsize=8.5)
            frame(axis, title_size=9.5)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
    figure.legend(handles=_kinds(roles), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def _kinds(roles: Mapping[str, str]) -> list[Patch]:
    """Return legend entries that say which kind of model is grey and which is coloured."""
    kinds = {
        "grey: undefended": (UNDEFENDED[0], ("source", "control")),
        "coloured: defended": (DEFENDED[0], ("defended",)),
        "coloured: given, not trained here": (DEFENDED[0], ("given",)),
    }
    present = set(roles.values())
    return [Patch(color=colour, label=label) for label, (colour, of) in kinds.items() if present & set(of)]


def _column_title(threat: str, label: str) -> str:
    """Threat model, attack and its settings in lines that fit over a narrow panel."""
    attack, _, settings = label.partition("\n")
    parts = [threat, attack, settings.replace("\n", ", ")]
    return "\n".join(textwrap.fill(p, 24, break_long_words=False, break_on_hyphens=False) for p in parts if p)


def curves(panels: Mapping[str, Mapping[str, Mapping[str, Any]]], roles: Mapping[str, str], looks: Styles) -> bytes:
    """Draw accuracy over the norm allowed.

    Args:
        panels: title -> model -> {norm, eps, accuracy}.
        roles, looks: of all models of the run.
    """
    drawn: dict[str, None] = {}
    figure, axes = grid(len(panels), columns=min(3, len(panels)), width=4.2, height=3.3)
    for axis, (title, models) in zip(axes, panels.items(), strict=False):
        norm = next(iter(models.values()))["norm"]
        name = {"l2": "L2", "linf": "Linf"}.get(norm, norm)
        axis.set(
            title=title, xlabel=f"largest {name} norm allowed ([0,1] pixels)", ylabel="accuracy (%)", ylim=(0, 102)
        )
        # the tail, where nothing is left to break, would press the rest to the left
        ends = [
            next((e for e, a in zip(c["eps"], c["accuracy"], strict=True) if a <= 0.005), c["eps"][-1])
            for c in models.values()
        ]
        right = 1.05 * max(ends) or 1.0
        for model, curve in models.items():
            # the grid ends at the largest norm of the model's own examples; beyond it accuracy stays as it is
            eps = [*curve["eps"], max(right, curve["eps"][-1])]
            axis.plot(eps, 100 * np.array([*curve["accuracy"], curve["accuracy"][-1]]), **looks[model])
            drawn[model] = None
        axis.set_xlim(0, right)
        frame(axis)
    # not of the first panel alone: the source of transfer is not in every one
    handles = [Line2D([], [], label=legend(m, roles), **looks[m]) for m in roles if m in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return png(figure)


def heat_maps(matrices: Mapping[str, tuple[Sequence[str], Sequence[str], np.ndarray]]) -> bytes:
    """Accuracy by the model that examples were made on (rows) and the one that judged them (columns).

    Args:
        matrices: title -> (sources, models, fractions [sources, models]; nan where there is none).
    """
    sources, models, _ = next(iter(matrices.values()))
    cell, margin = 0.62, 0.075 * max(len(name) for name in (*sources, *models))
    figure, axes = grid(
        len(matrices),
        columns=min(2, len(matrices)),
        width=max(3.0, margin + cell * len(models)),
        height=max(2.0, 0.6 + margin + cell * 0.8 * len(sources)),
    )
    for axis, (title, (rows, columns, values)) in zip(axes, matrices.items(), strict=False):
        axis.grid(False)
        axis.imshow(100 * values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set(ylabel="made on", xlabel="judged by")
        for i, j in np.ndindex(values.shape):
            if not math.isnan(values[i, j]):
                dark = values[i, j] < 0.55
                bold = "bold" if rows[i] == columns[j] else "normal"
                text = f"{100 * values[i, j]:.0f}"
                axis.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if dark else "black",
                    fontweight=bold,
                )
    return png(figure)


def _plain(value: float, _: float) -> str:
    """A tick of a logarithmic axis as people write it; only 1, 2 and 5 times a power of ten, which never touch."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _total(epochs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([_number(s.get("loss")) for e in epochs for s in e["steps"]])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts
