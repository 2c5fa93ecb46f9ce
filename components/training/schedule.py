"""Phase and learning rate of a step, as pure functions of step and config (sec. 3.4, 4.1)."""

from __future__ import annotations

import math
from typing import Literal, get_args

from components.config import TrainConfig

Phase = Literal[
    "joint",
    "autoencoder",
    "classifier",
    "adversarial",
    "adversarial_joint",
    "adversarial_autoencoder",
    "reformer",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


def phase_at_epoch(epoch: int, config: TrainConfig) -> Phase:
    """Return the phase of an epoch (0-based).

    - Defend++: "joint". With the alternating schedule, ``cycles`` times ``autoencoder_epochs`` on
      L_rec and ``classifier_epochs`` on L_cls come first (sec. 3.4).
    - ComDefend: "reformer".
    - No defense: "classifier".
    - Adversarial training, also of Defend++: the same on examples in the last
      ``adversarial_epochs`` (0: in all); "adversarial" instead of "classifier",
      "adversarial_joint" and "adversarial_autoencoder".
    """
    if config.defense == "comdefend":
        return "reformer"
    first_adversarial = config.epochs - config.adversarial_epochs if config.adversarial_epochs else 0
    on_examples = config.on_examples and epoch >= first_adversarial
    if config.defense in ("none", "adversarial"):
        return "adversarial" if on_examples else "classifier"
    cycle = config.autoencoder_epochs + config.classifier_epochs
    if config.schedule == "joint" or epoch >= config.cycles * cycle:
        return "adversarial_joint" if on_examples else "joint"
    if epoch % cycle < config.autoencoder_epochs:
        return "adversarial_autoencoder" if on_examples else "autoencoder"
    return "adversarial" if on_examples else "classifier"


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return the learning rate of an optimisation step (0-based), whatever its phase.

    - step: ``lr * lr_gamma ** (epoch // lr_step_epochs)`` (sec. 4.1). With ``lr_step_epochs`` 0, a
      third of the epochs takes its place.
    - one_cycle: linear from lr/25 to lr over the first 30 % of all steps, then half a cosine to
      zero (Smith & Topin 2018, as a cosine).
    """
    if config.lr_schedule == "step":
        between = config.lr_step_epochs or math.ceil(config.epochs / 3)
        return float(config.lr * config.lr_gamma ** (step // steps_per_epoch // between))
    total = config.epochs * steps_per_epoch
    peak = 0.3 * total
    if step < peak:
        return config.lr * (0.04 + 0.96 * step / peak)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - peak) / (total - peak)))
