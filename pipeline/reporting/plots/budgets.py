"""Accuracy over the budget of an attack: only budgets that were measured, each with a marker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from components.threat_models import CLEAN, WHITE_BOX
from pipeline.records import RunRecord
from pipeline.reporting.labels import attack_text, eps_text, norm_text, parsed_attack, threat_title
from pipeline.reporting.over_seeds import accuracy_spread, by_seed, worst_over_seeds
from pipeline.reporting.plots.style import Styles, grid, legend

Point = Mapping[str, Any]
"""{eps, mean, low, high}, accuracies as fractions."""
Panels = Mapping[tuple[str, str], Mapping[str, Sequence[Point]]]
"""(title, norm) -> model as named in the recipe -> points by rising eps."""


def over_budgets(record: RunRecord) -> dict[tuple[str, str], dict[str, list[Point]]]:
    """Return accuracies over eps where a record has an attack at two budgets or more.

    Such attacks differ in nothing but their eps. The worst case per sample has budgets too. The
    point at eps 0 is of clean images.
    """
    groups = by_seed(record)
    panels: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for (model, threat, attack), replicates in groups.items():
        spec = parsed_attack(attack)
        if spec is None or spec.eps is None or spec.norm is None:
            continue
        # The step size follows from eps unless it is set. Without eps, the text names the rest.
        rest = str(dataclasses.replace(spec, eps=1.0, step_size=None))
        title = f"{threat_title(threat)}, {_without_eps(rest)}"
        point = {"eps": spec.eps, **accuracy_spread(list(replicates.values()))}
        panels.setdefault((title, spec.norm), {}).setdefault(model, []).append(point)
    for (model, norm), points in _worst_points(record).items():
        panels.setdefault(("worst case per sample", norm), {})[model] = points
    chosen = {}
    for key, models in panels.items():
        if max(len({p["eps"] for p in points}) for points in models.values()) < 2:
            continue
        chosen[key] = {model: sorted(points, key=lambda p: p["eps"]) for model, points in models.items()}
        for model, points in chosen[key].items():
            if (clean := groups.get((model, CLEAN, "none"))) is not None:
                points.insert(0, {"eps": 0.0, **accuracy_spread(list(clean.values()))})
    return chosen


def _worst_points(record: RunRecord) -> dict[tuple[str, str], list[Point]]:
    """Return (model as named in the recipe, norm) -> points of the worst case on its own examples."""
    points: dict[tuple[str, str], list[Point]] = {}
    if record.experiment.seeds > 1:
        for row in worst_over_seeds(record):
            if row["threat_model"] == WHITE_BOX:
                spread = {**row, "low": row["min"], "high": row["max"]}
                points.setdefault((row["model"], row["norm"]), []).append(spread)
        return points
    for w in record.worst_case or ():
        if w.threat_model == WHITE_BOX:
            point = {"eps": w.eps, "mean": w.accuracy, "low": w.accuracy_low, "high": w.accuracy_high}
            points.setdefault((w.model, w.norm), []).append(point)
    return points


def _without_eps(attack: str) -> str:
    title, *settings = attack_text(attack).split(", ")
    return ", ".join([title, *(s for s in settings if not s.startswith("eps "))])


def draw(panels: Panels, roles: Mapping[str, str], styles: Styles) -> Figure:
    """Draw a panel per attack, a line per model.

    Args:
        roles: model as named in the recipe -> role.
    """
    figure, axes = grid(len(panels), columns=min(3, len(panels)), width=3.9, height=3.1)
    drawn = [model for model in roles if any(model in models for models in panels.values())]
    for axis, ((title, norm), models) in zip(axes, panels.items(), strict=True):
        ticks = sorted({p["eps"] for points in models.values() for p in points})
        for j, model in enumerate(m for m in drawn if m in models):
            # Shift the whiskers of different models, so that they do not cover one another.
            shift = (j - (len(models) - 1) / 2) * 0.008 * ticks[-1]
            x = [p["eps"] + shift for p in models[model]]
            y, low, high = ([100 * p[key] for p in models[model]] for key in ("mean", "low", "high"))
            bounds = [[max(0.0, a - b) for a, b in zip(y, low, strict=True)]]
            bounds += [[max(0.0, b - a) for a, b in zip(y, high, strict=True)]]
            axis.errorbar(x, y, bounds, marker="o", markersize=4, linewidth=1.4, capsize=2, **styles[model])
        axis.set(title=title.replace(", ", "\n", 1), ylabel="accuracy (%)", ylim=(0, 103))
        axis.set(xlabel=f"eps ({norm_text(norm)}, [0,1] pixels)", xlim=(-0.04 * ticks[-1], 1.04 * ticks[-1]))
        axis.set_xticks(ticks, [eps_text(eps) for eps in ticks])
    handles = [Line2D([], [], marker="o", markersize=4, label=legend(model, roles), **styles[model]) for model in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure
