"""Figure 7: accuracy against the eps of FGSM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.records import RunRecord
from pipeline.reporting.labels import count_text, parsed_attack, threat_title
from pipeline.reporting.over_seeds import accuracy_spread, by_seed
from pipeline.reporting.plots import style
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.records import Row

Panels = Mapping[str, Mapping[str, Sequence[Row]]]
"""Threat model -> model as named in the recipe -> points, by rising eps.

A point is ``eps`` and :func:`accuracy_spread` at this eps."""


def accuracy_over_eps(record: RunRecord) -> dict[str, dict[str, list[Row]]]:
    """Return threat model -> model as named in the recipe -> points by rising eps of FGSM.

    The point at eps 0 is of the clean images.
    """
    groups = by_seed(record)
    panels: dict[str, dict[str, list[Row]]] = {}
    for (model, threat, attack), replicates in groups.items():
        spec = parsed_attack(attack)
        if spec is not None and spec.short_name == "fgsm" and spec.eps is not None:
            point = {"eps": spec.eps, **accuracy_spread(list(replicates.values()))}
            panels.setdefault(threat, {}).setdefault(model, []).append(point)
    for models in panels.values():
        for model, points in models.items():
            if (clean := groups.get((model, "clean", "none"))) is not None:
                points.append({"eps": 0.0, **accuracy_spread(list(clean.values()))})
            points.sort(key=lambda p: p["eps"])
    return panels


def eps_at(points: Sequence[Row], accuracy: float) -> float | None:
    """Return the smallest eps at which the mean accuracy is down to ``accuracy``; None if none is.

    The accuracy is interpolated by straight lines between the points.
    """
    before: Row = {}
    for point in points:
        if point["mean"] <= accuracy:
            if not before:
                return float(point["eps"])
            share = (before["mean"] - accuracy) / (before["mean"] - point["mean"])
            return float(before["eps"] + share * (point["eps"] - before["eps"]))
        before = point
    return None


def fig7(record: RunRecord) -> Plot | None:
    """Draw accuracy against FGSM's eps, a panel per threat model; None if the run has no FGSM."""
    panels = accuracy_over_eps(record)
    if not panels:
        return None
    roles = {record.bases[name]: role for name, role in record.roles.items()}
    caption = _caption(record, panels)
    return Plot("Figure 7: accuracy against the eps of FGSM", caption, _draw(panels, roles))


def _draw(panels: Panels, roles: Mapping[str, str]) -> Figure:
    styles = style.styles(roles)
    figure, axes = style.grid(len(panels), columns=min(2, len(panels)), width=5.2, height=3.7)
    drawn = [model for model in roles if any(model in models for models in panels.values())]
    for axis, (threat, models) in zip(axes, panels.items(), strict=True):
        end = max(point["eps"] for points in models.values() for point in points)
        for j, model in enumerate(m for m in drawn if m in models):
            # Shift the whiskers of different models, so that they do not cover one another.
            shift = (j - (len(models) - 1) / 2) * 0.006 * end
            _draw_line(axis, models[model], styles[model], shift)
        axis.set(title=threat_title(threat), xlabel="eps of FGSM (Linf, [0,1] pixels)", ylabel="accuracy (%)")
        axis.set(ylim=(0, 103), xlim=(-0.03 * end, 1.03 * end))
        axis.xaxis.set_major_locator(MaxNLocator(11))
    handles = [
        Line2D([], [], marker="o", markersize=3.5, label=style.legend(model, roles), **styles[model]) for model in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _draw_line(axis: Axes, points: Sequence[Row], line: Mapping[str, str], shift: float) -> None:
    x = np.array([p["eps"] for p in points])
    y, low, high, least, greatest = (
        100 * np.array([p[key] for p in points]) for key in ("mean", "low", "high", "min", "max")
    )
    if any(p["seeds"] > 1 for p in points):
        axis.fill_between(x, least, greatest, color=line["color"], alpha=0.22, linewidth=0)
    bounds = [np.maximum(0, y - low), np.maximum(0, high - y)]
    axis.errorbar(x + shift, y, bounds, fmt="none", ecolor=line["color"], elinewidth=0.9, capsize=2)
    axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, color=line["color"], linestyle=line["linestyle"])


def _caption(record: RunRecord, panels: Panels) -> str:
    sizes = sorted({e.n for e in record.evaluations if e.attack.partition(":")[0] == "fgsm"})
    seeds = max(p["seeds"] for models in panels.values() for points in models.values() for p in points)
    lines = (
        f"Lines: mean of up to {seeds} seeds. Bands: lowest to highest accuracy. Whiskers: the outermost 95 % Wilson "
        "bounds of any seed."
        if seeds > 1
        else "Whiskers: 95 % Wilson interval, which covers the choice of images only."
    )
    halves = []
    for threat, models in panels.items():
        crossings = {model: eps_at(points, 0.5) for model, points in models.items()}
        texts = (f"{m} {'not within these eps' if eps is None else f'{eps:.2f}'}" for m, eps in crossings.items())
        halves.append(f"{threat_title(threat)}: {', '.join(texts)}")
    return (
        f"{count_text(sizes)} test images. {lines} The points at eps 0 are of clean images. Paper, sec. 4.5, MNIST: "
        'with Defend++ "the baseline curve is substantially shifted to the right", and the attacker "has to almost '
        'double the distortion budget". Here accuracy is down to 50 % at an eps of (straight lines between the '
        f"points): {'; '.join(halves)}. An eps of 0.5 is enough to make any image one uniform grey. From there on, "
        "accuracy says little about a defense."
    )
