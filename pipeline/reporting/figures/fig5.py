"""Figure 5: adversarial examples and their perturbations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from components.threat_models import WHITE_BOX
from pipeline.records import RunRecord
from pipeline.reporting.labels import attack_text, attack_title, parsed_attack
from pipeline.reporting.plots import images, style
from pipeline.reporting.plots.style import Plot


def fig5(record: RunRecord, gallery: Mapping[str, np.ndarray]) -> Plot | None:
    """Draw white-box examples on one model, each above its perturbation, if the gallery has any."""
    keys: dict[str, dict[str, str]] = {}
    for e in record.evaluations:
        if e.threat_model == WHITE_BOX and f"adversarial__{e.model}__{e.attack}" in gallery:
            keys.setdefault(e.model, {})[e.attack] = f"{e.model}__{e.attack}"
    model = next((m for m in record.roles if m in keys), None)
    if model is None:
        return None
    attacks = keys[model]
    n = min(3, len(gallery["clean"]))
    clean = gallery["clean"][:n].astype(np.float64)
    deltas = {attack: gallery[f"adversarial__{key}"][:n] - clean for attack, key in attacks.items()}
    norms = {attack: images.perturbation_norms(delta) for attack, delta in deltas.items()}
    factor = images.amplification(list(deltas.values()))
    figure = _draw(gallery, attacks, deltas, norms, factor)
    mean_l2 = {attack_text(attack): float(l2.mean()) for attack, (l2, _) in norms.items()}
    ranked = "; ".join(f"{attack}: {mean_l2[attack]:.3g}" for attack in sorted(mean_l2, key=lambda a: -mean_l2[a]))
    caption = (
        f"The first {n} test images and their white-box examples, made on {model} (✓ still right, ✗ wrong). Below "
        f"each example: its perturbation × {factor:g} (mid-grey is 0, clipped to the range of images) and the norms of "
        "the perturbation, for images in [0,1]. These are illustrations. They are too few to conclude from. Paper, "
        'sec. 4.4, on ImageNet: "One can clearly see that BIM attack is more visible." Mean L2 norm over the images '
        f"shown, largest first: {ranked}."
    )
    stopping = [a for a in attacks if (spec := parsed_attack(a)) and spec.can_stop_on_success]
    if early := dict.fromkeys(attack_title(attack)[0] for attack in stopping):
        caption += f" {', '.join(early)}: the attack stops at the first step that fools the model."
    return Plot("Figure 5: adversarial examples and their perturbations", caption, figure)


def _draw(
    gallery: Mapping[str, np.ndarray],
    attacks: Mapping[str, str],
    deltas: Mapping[str, np.ndarray],
    norms: Mapping[str, tuple[np.ndarray, np.ndarray]],
    factor: float,
) -> Figure:
    """Draw the examples of each attack above their amplified perturbations.

    Args:
        attacks: attack -> key after ``adversarial__`` and ``prediction__``.
        deltas: attack -> perturbations [n,C,H,W].
        norms: attack -> (L2, Linf) norms of the perturbations.
        factor: amplification of the perturbations.
    """
    n, columns = len(next(iter(deltas.values()))), 1 + len(attacks)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.0)
    figure = Figure(figsize=(1.5 * columns + 0.75, 2 * n * 1.62 + 0.55), layout=layout)
    axes = figure.subplots(2 * n, columns, squeeze=False)
    for i in range(n):
        upper, lower = axes[2 * i], axes[2 * i + 1]
        label = int(gallery["label"][i])
        images.show_image(upper[0], gallery["clean"][i])
        upper[0].set_title(f"is {label}", fontsize=9, pad=3)
        lower[0].set_axis_off()
        lower[0].text(
            0.98, 0.5, f"perturbation\n× {factor:g}", transform=lower[0].transAxes, ha="right", va="center", fontsize=9
        )
        for j, (attack, key) in enumerate(attacks.items(), start=1):
            images.show_image(upper[j], gallery[f"adversarial__{key}"][i])
            text, colour = style.prediction_label(int(gallery[f"prediction__{key}"][i]), label)
            upper[j].set_title(text, fontsize=9, pad=3, color=colour)
            style.line_spines(upper[j], 1.4, colour)
            images.show_image(lower[j], 0.5 + factor * deltas[attack][i])
            l2, linf = norms[attack]
            lower[j].set_xlabel(f"L2 {l2[i]:.3g} · Linf {linf[i]:.3g}", fontsize=8, labelpad=2)
    for axis, head in zip(axes[0], ("clean", *map(attack_text, attacks)), strict=True):
        text = head.replace(", ", "\n", 1)
        axis.text(0.5, 1.12, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=9)
    return figure
