"""Figure 7: accuracy over the budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.figures.common import Picture, parsed_attack
from pipeline.reporting.labels import threat_title
from pipeline.reporting.over_seeds import by_seed
from pipeline.reporting.plots import style as plots_style
from pipeline.reporting.records import experiment_of


@dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy at one eps as fractions: mean, least and greatest over the seeds, and their outermost Wilson bounds."""

    eps: float
    mean: float
    least: float
    greatest: float
    low: float
    high: float
    seeds: int


def accuracy_over_eps(record: Mapping[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Threat model -> model as named in the recipe -> a point per eps of FGSM, rising; eps 0 are the clean images."""
    cells = by_seed(record)
    out: dict[str, dict[str, list[Point]]] = {}
    for (model, threat, attack), replicates in cells.items():
        spec = parsed_attack(attack)
        if spec is not None and spec.short_name == "fgsm" and spec.eps is not None:
            out.setdefault(threat, {}).setdefault(model, []).append(_point(spec.eps, list(replicates.values())))
    for models in out.values():
        for model, points in models.items():
            if (clean := cells.get((model, "clean", "none"))) is not None:
                points.append(_point(0.0, list(clean.values())))
            points.sort(key=lambda p: p.eps)
    return out


def _point(eps: float, evaluations: Sequence[Mapping[str, Any]]) -> Point:
    metrics = [e["metrics"] for e in evaluations]
    accuracies = [m["accuracy"] for m in metrics]
    return Point(
        eps=eps,
        mean=statistics.fmean(accuracies),
        least=min(accuracies),
        greatest=max(accuracies),
        low=min(m["accuracy_low"] for m in metrics),
        high=max(m["accuracy_high"] for m in metrics),
        seeds=len(metrics),
    )


def eps_at(points: Sequence[Point], accuracy: float) -> float | None:
    """The smallest eps at which the mean accuracy, between points a straight line, is down to ``accuracy``; None: nowhere."""
    for i, point in enumerate(points):
        if point.mean <= accuracy:
            if i == 0:
                return point.eps
            before = points[i - 1]
            return before.eps + (point.eps - before.eps) * (before.mean - accuracy) / (before.mean - point.mean)
    return None


def fig7(record: Mapping[str, Any], roles: Mapping[str, str]) -> Picture | None:
    """Accuracy against FGSM's eps, a panel per threat model; None where the run has no FGSM yet."""
    panels = accuracy_over_eps(record)
    if not panels:
        return None
    replicates = experiment_of(record).replicates()
    base_roles = {replicates[name][0]: role for name, role in roles.items()}
    styles = plots_style.styles(base_roles)
    drawn = [m for m in base_roles if any(m in models for models in panels.values())]
    figure, axes = plots_style.grid(len(panels), columns=min(2, len(panels)), width=5.2, height=3.7)
    seeds = max(p.seeds for models in panels.values() for points in models.values() for p in points)
    for axis, (threat, models) in zip(axes, panels.items(), strict=True):
        end = max(p.eps for points in models.values() for p in points)
        for j, model in enumerate(m for m in drawn if m in models):
            points, style = models[model], styles[model]
            # whiskers beside one another
            x = np.array([p.eps for p in points])
            shift = (j - (len(models) - 1) / 2) * 0.006 * end
            y = 100 * np.array([p.mean for p in points])
            bounds = [
                np.maximum(0, y - 100 * np.array([p.low for p in points])),
                np.maximum(0, 100 * np.array([p.high for p in points]) - y),
            ]
            if seeds > 1:
                least, greatest = (100 * np.array([getattr(p, k) for p in points]) for k in ("least", "greatest"))
                axis.fill_between(x, least, greatest, color=style["color"], alpha=0.22, linewidth=0)
            axis.errorbar(x + shift, y, bounds, fmt="none", ecolor=style["color"], elinewidth=0.9, capsize=2)
            axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, **style)
        axis.set(title=threat_title(threat), xlabel="eps of FGSM (Linf, [0,1] pixels)", ylabel="accuracy (%)")
        axis.set(ylim=(0, 103), xlim=(-0.03 * end, 1.03 * end))
        axis.xaxis.set_major_locator(MaxNLocator(11))
    handles = [
        Line2D([], [], marker="o", markersize=3.5, label=plots_style.legend(m, base_roles), **styles[m]) for m in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return (
        "Figure 7: accuracy against the eps of FGSM",
        _fig7_caption(record, panels, seeds),
        plots_style.png(figure),
    )


def _fig7_caption(record: Mapping[str, Any], panels: Mapping[str, Mapping[str, Sequence[Point]]], seeds: int) -> str:
    sizes = sorted({e["n"] for e in record["evaluations"] if e["attack"].partition(":")[0] == "fgsm"})
    counted = f"n = {sizes[0]:,}" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,}"
    what = (
        f"lines: mean of up to {seeds} seeds; bands: least to greatest; whiskers: the outermost 95 % Wilson bounds of any seed"
        if seeds > 1
        else "whiskers: 95 % Wilson interval, of the choice of images only"
    )
    halves = []
    for threat, models in panels.items():
        found = {model: eps_at(points, 0.5) for model, points in models.items()}
        said = ", ".join(
            f"{model} {eps:.2f}" if eps is not None else f"{model} not within these eps" for model, eps in found.items()
        )
        halves.append(f"{threat_title(threat)}: {said}")
    return (
        f'{counted} test images; {what}; eps 0: clean images. Paper, sec. 4.5, MNIST: with Defend++ "the baseline curve is '
        'substantially shifted to the right", and the attacker "has to almost double the distortion budget". Here accuracy is '
        f"down to 50 % at an eps of (straight lines between the points): {'; '.join(halves)}. An eps of 0.5 is enough to "
        "make any image one uniform grey: from there on, accuracy says little about a defense."
    )
