"""Figure 5: images, perturbations and reconstructions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.reporting.figures.common import Picture, parsed_attack, perturbation_norms
from pipeline.reporting.labels import attack_text
from pipeline.reporting.plots import images, style

PERTURBED_IMAGES = 3
"""Images of fig5."""


def fig5(record: Mapping[str, Any], gallery: Mapping[str, np.ndarray], roles: Mapping[str, str]) -> Picture | None:
    """White-box examples of every attack on one model, each above its perturbation; None without examples."""
    keys: dict[str, dict[str, str]] = {}
    for e in record["evaluations"]:
        if e["threat_model"] == "white_box" and f"adversarial__{e['model']}__{e['attack']}" in gallery:
            keys.setdefault(e["model"], {})[e["attack"]] = f"{e['model']}__{e['attack']}"
    model = next((m for m in roles if m in keys), None)
    if model is None:
        return None
    attacks = keys[model]
    n = min(PERTURBED_IMAGES, len(gallery["clean"]))
    clean, labels = gallery["clean"][:n].astype(np.float64), gallery["label"][:n]
    deltas = {a: gallery[f"adversarial__{key}"][:n] - clean for a, key in attacks.items()}
    norms = {a: perturbation_norms(d) for a, d in deltas.items()}
    factor = _round_factor(0.5 / max(1e-6, statistics.median(float(x) for _, linf in norms.values() for x in linf)))

    columns = 1 + len(attacks)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.0)
    figure = Figure(figsize=(1.5 * columns + 0.75, 2 * n * 1.62 + 0.55), layout=layout)
    axes = figure.subplots(2 * n, columns, squeeze=False)
    for i in range(n):
        upper, lower = axes[2 * i], axes[2 * i + 1]
        images.show_image(upper[0], clean[i])
        upper[0].set_title(f"is {int(labels[i])}", fontsize=9, pad=3)
        lower[0].set_axis_off()
        lower[0].text(
            0.98, 0.5, f"perturbation\n× {factor:g}", transform=lower[0].transAxes, ha="right", va="center", fontsize=9
        )
        for j, (attack, key) in enumerate(attacks.items(), start=1):
            images.show_image(upper[j], gallery[f"adversarial__{key}"][i])
            text, colour = style.prediction_label(int(gallery[f"prediction__{key}"][i]), int(labels[i]))
            upper[j].set_title(text, fontsize=9, pad=3, color=colour)
            style.line_spines(upper[j], 1.4, colour)
            images.show_image(lower[j], 0.5 + factor * deltas[attack][i])
            l2, linf = norms[attack]
            lower[j].set_xlabel(f"L2 {l2[i]:.3g} · Linf {linf[i]:.3g}", fontsize=8, labelpad=2)
    for axis, head in zip(axes[0], ("clean", *map(attack_text, attacks)), strict=True):
        text = head.replace(", ", "\n", 1)
        axis.text(0.5, 1.12, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=9)
    mean_l2 = {attack: float(l2.mean()) for attack, (l2, _) in norms.items()}
    order = sorted(mean_l2, key=lambda a: -mean_l2[a])
    said = "; ".join(f"{attack_text(a)}: {mean_l2[a]:.3g}" for a in order)
    early = [a.partition(":")[0].upper() for a in attacks if _leaves_early(a)]
    caption = (
        f"White-box examples made on {model} (✓ still right, ✗ wrong), each above its perturbation × {factor:g} (mid-grey is 0, "
        f"the same factor throughout, clipped to the range of images) and that perturbation's norms, images in [0,1]. The first "
        f'{n} test images; these are illustrations, not a sample to conclude from. Paper, sec. 4.4, on ImageNet: "One can clearly '
        f'see that BIM attack is more visible." Mean L2 norm over the images shown here, largest first: {said}.'
    )
    if early:
        caption += f" {', '.join(dict.fromkeys(early))}: every image is left at the first step that fools the model."
    return "Figure 5: adversarial examples and their perturbations", caption, style.png(figure)


def _round_factor(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is not above ``value``, at least 1."""
    if value < 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * max(step for step in (1, 2, 5) if step * power <= value)


def _leaves_early(attack: str) -> bool:
    spec = parsed_attack(attack)
    return spec is not None and spec.can_stop_on_success
