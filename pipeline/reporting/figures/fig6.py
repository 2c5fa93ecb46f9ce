"""Figure 6: clean and adversarial images, and their reconstructions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.reporting.labels import attack_text
from pipeline.reporting.plots import images
from pipeline.reporting.plots.style import Plot


def fig6(arrays: Mapping[str, np.ndarray], roles: Mapping[str, str]) -> Plot | None:
    """Draw clean and adversarial images above their reconstructions; None without an auto-encoder."""
    models = [m for m in roles if f"fig6__adversarial__{m}" in arrays]
    if not models:
        return None
    attack = attack_text(str(arrays["fig6__attack"]))
    clean, labels = arrays["fig6__clean"], arrays["fig6__label"]
    rows = [images.ImageRow("clean", clean)]
    distances = []
    for model in models:
        adversarial = arrays[f"fig6__adversarial__{model}"]
        of_clean = arrays[f"fig6__reconstruction_clean__{model}"]
        of_adversarial = arrays[f"fig6__reconstruction_adversarial__{model}"]
        predictions = arrays[f"fig6__prediction__{model}"]
        name = f"{model}: " if len(models) > 1 else ""
        rows += [
            images.ImageRow(f"{name}clean,\nreconstructed", of_clean),
            images.ImageRow(f"{name}{attack.replace(', ', ',' + chr(10), 1)}", adversarial, predictions),
            images.ImageRow(f"{name}{attack.partition(',')[0]},\nreconstructed", of_adversarial),
        ]
        before, after = (float(images.perturbation_norms(x - clean)[0].mean()) for x in (adversarial, of_adversarial))
        distances.append(f"{model}: {before:.2f} before, {after:.2f} after the auto-encoder")
    caption = (
        f"The first {len(labels)} test images and their white-box examples ({attack}), each above the reconstruction "
        "of the auto-encoder (level 0). ✓: the classifier is still right. ✗: it is wrong. The classifier does not see "
        'the reconstructions. Paper, sec. 4.5: they "are much cleaner than the adversarial images". Mean L2 distance '
        f"of the adversarial images shown from the clean images: {'; '.join(distances)}."
    )
    heading = "Figure 6: clean and adversarial images and their reconstructions"
    return Plot(heading, caption, images.image_rows(rows, labels))
