"""Charts of losses and accuracies: data in, figures out."""

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

from pipeline.reporting.labels import norm_text
from pipeline.reporting.plots.style import (
    DEFENDED,
    FAINT,
    MANY_BARS,
    PHASE_STYLES,
    TEXT,
    UNDEFENDED,
    Styles,
    frame,
    grid,
    legend,
)
from pipeline.reporting.plots.svg import LIGHT

LOSSES = {
    "loss": ("total", TEXT),
    "loss_cls": ("classification", LIGHT["blue"]),
    "loss_adv": ("classification, adversarial", LIGHT["pink"]),
    "loss_kl": ("divergence, adversarial from clean", LIGHT["green"]),
    "loss_rec": ("reconstruction", LIGHT["vermilion"]),
}
"""Key of a step -> (label, colour).

``bit_power`` of a reformer is not plotted. It is the difference of total and reconstruction.
"""
SMOOTHING = 0.05
"""Share of a model's steps over which the thick loss curve is averaged."""
MAX_POINTS = 600
"""Most points of a curve: the eye cannot tell more apart. Each is the mean of several steps."""


Histories = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> epoch records."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An accuracy with its 95 % interval, as fractions."""

    accuracy: float
    low: float
    high: float


Panels = Mapping[str, Mapping[str, Mapping[str, Bar]]]
"""Title (a threat model) -> group label (an attack) -> model -> bar."""


def over_replicates(panels: Panels, bases: Mapping[str, str]) -> dict[str, dict[str, dict[str, Bar]]]:
    """Return bars of the mean over the replicates of each model, with their minimum and maximum."""
    return {
        title: {label: _mean_bars(models, bases) for label, models in groups.items()}
        for title, groups in panels.items()
    }


def _mean_bars(models: Mapping[str, Bar], bases: Mapping[str, str]) -> dict[str, Bar]:
    replicates: dict[str, list[Bar]] = {}
    for model, bar in models.items():
        replicates.setdefault(bases[model], []).append(bar)
    return {base: mean_bar(several) for base, several in replicates.items()}


def mean_bar(replicates: Sequence[Bar]) -> Bar:
    """Return the mean of several bars with the lowest and the highest; a single bar stays as it is."""
    if len(replicates) == 1:
        return replicates[0]
    values = [bar.accuracy for bar in replicates]
    return Bar(accuracy=sum(values) / len(values), low=min(values), high=max(values))


def losses(histories: Histories) -> Figure:
    """Draw training losses over steps, a panel per model, with the phases behind them."""
    figure, axes = grid(len(histories), columns=min(3, len(histories)), width=4.3, height=3.2)
    for axis, (model, epochs) in zip(axes, histories.items(), strict=True):
        _draw_losses(axis, epochs)
        axis.set(title=model, xlabel="step", ylabel="loss", yscale="log")
        axis.yaxis.set_major_formatter(_tick)
        # On a long axis, the powers of ten are enough.
        axis.yaxis.set_minor_formatter(_tick if np.diff(np.log10(axis.get_ylim()))[0] < 1.5 else "")
        axis.margins(x=0)
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for phase in dict.fromkeys(epoch["phase"] for epochs in histories.values() for epoch in epochs):
        label, colour = PHASE_STYLES[phase]
        handles[label] = Patch(color=colour, label=label)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6)
    return figure


def _draw_losses(axis: Axes, epochs: Sequence[Mapping[str, Any]]) -> None:
    for epoch in epochs:
        first, last = epoch["steps"][0]["step"], epoch["steps"][-1]["step"]
        axis.axvspan(first - 0.5, last + 0.5, color=PHASE_STYLES[epoch["phase"]][1], linewidth=0)
    steps = [step for epoch in epochs for step in epoch["steps"]]
    numbers = np.array([step["step"] for step in steps])
    total = _term(steps, "loss")
    for key, (label, colour) in LOSSES.items():
        values = _term(steps, key)
        present = np.isfinite(values)
        if key != "loss" and np.array_equal(values[present], total[present]):
            continue  # This is the only term of the loss, so its curve is that of the total.
        if present.any() and np.nanmax(values) > 0:
            axis.plot(*_thinned(numbers, values), color=colour, linewidth=0.5, alpha=0.35)
            axis.plot(*_thinned(numbers, _smoothed(values)), color=colour, linewidth=1.5, label=label)


def _term(steps: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Return a term of the loss at each step; nan where a step lacks it."""
    return np.array([math.nan if step.get(key) is None else float(step[key]) for step in steps])


def validation(histories: Histories, roles: Mapping[str, str], styles: Styles) -> Figure:
    """Draw the validation accuracy after each epoch, a line per model."""
    many = len(histories) > 6
    figure = Figure(figsize=(9, 4) if many else (6.5, 3.4), layout="constrained")
    axis = figure.add_subplot()
    for model, epochs in histories.items():
        measured = [(e["epoch"] + 1, e["validation"].get("accuracy")) for e in epochs if e.get("validation")]
        points = [(x, 100 * y) for x, y in measured if y is not None]
        if points:
            line = {**styles[model], "marker": "o", "markersize": 3.5, "label": legend(model, roles)}
            axis.plot(*zip(*points, strict=True), **line)
    axis.set(xlabel="epochs done", ylabel="validation accuracy (%), clean images")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    frame(axis)
    if many:
        figure.legend(loc="outside right upper", frameon=False)
    else:
        axis.legend(frameon=False)
    return figure


def bars(panels: Panels, roles: Mapping[str, str], styles: Styles) -> Figure:
    """Draw accuracies with their intervals.

    More models than MANY_BARS get lying bars: a panel per attack, and a number beside each bar.

    Args:
        roles: model -> role of the models to draw, in their order.
    """
    palette = {model: styles[model]["color"] for model in roles}
    if len(roles) > MANY_BARS:
        return _lying_bars(panels, roles, palette)
    per_row = 6
    rows: list[list[str]] = []
    used = per_row
    for title, groups in panels.items():
        width = max(1, len(groups))
        if used + width > per_row:
            rows.append([])
            used = 0
        rows[-1].append(title)
        used += width
    figure = Figure(figsize=(11, 3.1 * len(rows) + 0.5), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for row, part in zip(rows, parts, strict=True):
        ratios = [max(1, len(panels[t])) for t in row]
        axes = part.subplots(1, len(row), squeeze=False, width_ratios=ratios)[0]
        for title, axis in zip(row, axes, strict=True):
            _bar_panel(axis, title, panels[title], palette)
    handles = [Patch(color=palette[m], label=legend(m, roles)) for m in roles]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


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
            axis.errorbar(x, y, error, color=TEXT, linewidth=0.9, capsize=2)
            if bar.high == 0:  # Neither the bar nor the whisker can be seen.
                axis.text(x, 1.5, "0", ha="center", fontsize=8, color=FAINT)
    axis.set(title=title, ylabel="accuracy (%)", ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_yticks(range(0, 101, 25))
    frame(axis)
    axis.grid(axis="x", visible=False)


def _lying_bars(panels: Panels, roles: Mapping[str, str], palette: Mapping[str, str]) -> Figure:
    per_row = 5
    rows: list[list[tuple[str, Mapping[str, Bar]]]] = []
    for title, groups in panels.items():
        cells = [(_column_title(title, label), models) for label, models in groups.items()]
        for i, cell in enumerate(cells):
            # A threat model that does not fit into the rest of a row begins a new one.
            if not rows or len(rows[-1]) == per_row or (i == 0 and len(rows[-1]) + min(len(cells), per_row) > per_row):
                rows.append([])
            rows[-1].append(cell)
    lines = [max(title.count("\n") + 1 for title, _ in row) for row in rows]
    heights = [0.21 * len(roles) + 0.19 * n + 0.55 for n in lines]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, part in zip(rows, parts, strict=True):
        axes = part.subplots(1, per_row, squeeze=False, sharey=True)[0]
        for axis in axes[len(row) :]:
            axis.set_axis_off()
        for (title, models), axis in zip(row, axes, strict=False):
            _lying_panel(axis, title, models, palette)
    figure.legend(handles=_kinds(roles), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _lying_panel(axis: Axes, title: str, models: Mapping[str, Bar], palette: Mapping[str, str]) -> None:
    for y, (model, colour) in enumerate(palette.items()):
        if (bar := models.get(model)) is None:
            axis.text(3, y, "–", va="center", fontsize=7.5, color=FAINT)
            continue
        x = 100 * bar.accuracy
        error = [[max(0.0, x - 100 * bar.low)], [max(0.0, 100 * bar.high - x)]]
        axis.barh(y, x, 0.72, color=colour)
        axis.errorbar(x, y, xerr=error, color=TEXT, linewidth=0.9, capsize=2)
        axis.text(100 * bar.high + 3, y, f"{x:.1f}", va="center", fontsize=7.5, color=FAINT)
    axis.set(xlim=(0, 123), ylim=(len(palette) - 0.4, -0.6), xlabel="accuracy (%)")
    axis.set_title(title, fontsize=9.5)
    axis.set_xticks(range(0, 101, 25))
    axis.set_yticks(range(len(palette)), list(palette))
    axis.tick_params(labelsize=8.5)
    frame(axis, title_size=9.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def _kinds(roles: Mapping[str, str]) -> list[Patch]:
    """Return legend entries that say which kind of model is grey and which is coloured."""
    kinds = {
        "grey: undefended": (UNDEFENDED[0], ("source", "control")),
        "coloured: defended": (DEFENDED[0], ("defended",)),
        "coloured: external, not trained here": (DEFENDED[0], ("given",)),
    }
    present = set(roles.values())
    return [Patch(color=colour, label=label) for label, (colour, members) in kinds.items() if present & set(members)]


def _column_title(threat: str, label: str) -> str:
    """Return threat model, attack and settings in lines that fit over a narrow panel."""
    attack, _, settings = label.partition("\n")
    parts = [threat, attack, settings.replace("\n", ", ")]
    return "\n".join(textwrap.fill(p, 24, break_long_words=False, break_on_hyphens=False) for p in parts if p)


def curves(panels: Mapping[str, Mapping[str, Mapping[str, Any]]], roles: Mapping[str, str], styles: Styles) -> Figure:
    """Draw accuracy over the norm allowed, from title -> model -> {norm, eps, accuracy}."""
    figure, axes = grid(len(panels), columns=min(3, len(panels)), width=4.2, height=3.3)
    for axis, (title, models) in zip(axes, panels.items(), strict=True):
        norm = next(iter(models.values()))["norm"]
        xlabel = f"largest {norm_text(norm)} norm allowed ([0,1] pixels)"
        axis.set(title=title, xlabel=xlabel, ylabel="accuracy (%)", ylim=(0, 102))
        # End the axis where nothing is left to break: the tail would press the rest to the left.
        ends = [
            next((e for e, a in zip(c["eps"], c["accuracy"], strict=True) if a <= 0.005), c["eps"][-1])
            for c in models.values()
        ]
        right = 1.05 * max(ends) or 1.0
        for model, curve in models.items():
            # Beyond the largest norm of the model's own examples, accuracy stays constant.
            eps = [*curve["eps"], max(right, curve["eps"][-1])]
            axis.plot(eps, 100 * np.array([*curve["accuracy"], curve["accuracy"][-1]]), **styles[model])
        axis.set_xlim(0, right)
        frame(axis)
    # Collect the models of all panels: the source of transfer is not in every panel.
    drawn = {model for models in panels.values() for model in models}
    handles = [Line2D([], [], label=legend(m, roles), **styles[m]) for m in roles if m in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def heat_maps(matrices: Mapping[str, tuple[Sequence[str], Sequence[str], np.ndarray]]) -> Figure:
    """Draw accuracy by the model that examples were made on and the model that judged them.

    Args:
        matrices: title -> (sources, judges, fractions [sources, judges]; nan if not measured).
    """
    sources, judges, _ = next(iter(matrices.values()))
    cell, margin = 0.62, 0.075 * max(len(name) for name in (*sources, *judges))
    figure, axes = grid(
        len(matrices),
        columns=min(2, len(matrices)),
        width=max(3.0, margin + cell * len(judges)),
        height=max(2.0, 0.6 + margin + cell * 0.8 * len(sources)),
    )
    for axis, (title, (rows, columns, values)) in zip(axes, matrices.items(), strict=True):
        axis.grid(False)
        axis.imshow(100 * values, vmin=0, vmax=100, cmap="cividis", aspect="auto", interpolation="none")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set(ylabel="made on", xlabel="judged by")
        for i, j in np.argwhere(~np.isnan(values)):
            colour = "#fcfcfc" if values[i, j] < 0.55 else "#101010"
            weight = "bold" if rows[i] == columns[j] else "normal"
            text = f"{100 * values[i, j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour, fontweight=weight)
    return figure


def _tick(value: float, _: float) -> str:
    """Return the label of a logarithmic tick. Only 1, 2 and 5 times a power of ten never touch."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean of each step and its neighbours, over SMOOTHING of all steps.

    A step without a value stays without one.
    """
    half = round(SMOOTHING * len(values) / 2)
    present = np.isfinite(values)
    sums, counts = (np.cumsum(np.concatenate([[0.0], v])) for v in (np.where(present, values, 0.0), present))
    steps = np.arange(len(values))
    first, last = np.maximum(0, steps - half), np.minimum(len(values), steps + half + 1)
    means = (sums[last] - sums[first]) / np.maximum(1, counts[last] - counts[first])
    return np.where(present, means, math.nan)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most MAX_POINTS points, each the mean of its neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts
