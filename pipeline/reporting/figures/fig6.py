"""Figure 6: distances of features over the blocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.reporting.figures.common import Picture, perturbation_norms
from pipeline.reporting.labels import attack_text
from pipeline.reporting.plots import images


def fig6(stored: Mapping[str, np.ndarray], roles: Mapping[str, str]) -> Picture | None:
    """Clean images and adversarial ones, each above its reconstruction, for every model with an auto-encoder."""
    models = [m for m in roles if f"fig6__adversarial__{m}" in stored]
    if not models:
        return None
    attack = attack_text(str(stored["fig6__attack"]))
    clean, labels = stored["fig6__clean"], stored["fig6__label"]
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = [("clean", clean, None)]
    distances = []
    for model in models:
        adversarial = stored[f"fig6__adversarial__{model}"]
        of_clean = stored[f"fig6__reconstruction_clean__{model}"]
        of_adversarial = stored[f"fig6__reconstruction_adversarial__{model}"]
        name = f"{model}: " if len(models) > 1 else ""
        rows += [
            (f"{name}clean,\nreconstructed", of_clean, None),
            (f"{name}{attack.replace(', ', ',' + chr(10), 1)}", adversarial, stored[f"fig6__prediction__{model}"]),
            (f"{name}{attack.partition(',')[0]},\nreconstructed", of_adversarial, None),
        ]
        before, after = (float(perturbation_norms(x - clean)[0].mean()) for x in (adversarial, of_adversarial))
        distances.append(f"{model}: {before:.2f} before, {after:.2f} after the auto-encoder")
    caption = (
        f"The first {len(labels)} test images, and what the auto-encoder (level 0) makes of them and of their white-box examples, "
        f"{attack}; ✓ the classifier is still right, ✗ wrong. The classifier does not see reconstructions. Paper, sec. 4.5: they "
        f'"are much cleaner than the adversarial images". Mean L2 distance from the clean image over the adversarial images '
        f"shown: {'; '.join(distances)}."
    )
    heading = "Figure 6: clean and adversarial images and their reconstructions"
    return heading, caption, images.image_rows(rows, labels)
