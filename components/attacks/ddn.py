"""DDN, decoupled direction and norm.

Rony et al., "Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and
Defenses", CVPR 2019, https://arxiv.org/abs/1811.09600
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, cross_entropy_gradient, is_adversarial
from components.attacks.projections import l2_norms, per_sample, unit_l2

_FINAL_STEP = 0.01


def ddn(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    initial_norm: float = 1.0,
    quantization_levels: int = 0,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Find the adversarial example of the smallest L2 norm among all iterates.

    Each step moves the perturbation along the normalised gradient; its length falls from 1 to 0.01
    along a cosine. Then the perturbation is rescaled to a norm that shrinks by ``gamma`` where the
    last iterate was adversarial, and grows by it elsewhere.

    Differences from the authors' code:

    - The last iterate is judged too (one forward pass more).
    - Quantization is off by default.
    - A zero gradient is replaced by a random direction of norm 1, drawn once per sample.

    Args:
        model: maps [0,1] images to logits [N,K]; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        steps: forward and backward passes.
        gamma: relative change of the norm per step.
        initial_norm: L2 norm of the first perturbation.
        quantization_levels: number of grey levels that iterates are rounded to (256: 8-bit images).
            0: no rounding.
        generator: CPU generator of the directions that replace zero gradients.

    Returns:
        float32 [N,C,H,W]; the clean input where it is already misclassified or no example was
        found.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    best = inputs.clone()
    if not len(inputs):
        return best
    random_directions = unit_l2(torch.randn(inputs.shape, generator=generator)).to(inputs.device)
    # No perturbation inside [0,1] is longer.
    largest = l2_norms(torch.maximum(inputs, 1 - inputs))
    radius = torch.full_like(largest, initial_norm)
    best_norm = torch.full_like(largest, math.inf)
    x, delta = inputs, torch.zeros_like(inputs)

    for step in range(steps):
        gradient, logits = cross_entropy_gradient(model, x, labels, targeted)
        adversarial = is_adversarial(logits, labels, targeted)
        best, best_norm = _smaller(adversarial, x, delta, best, best_norm)

        direction = torch.where(per_sample(l2_norms(gradient) > 0), unit_l2(gradient), random_directions)
        step_size = _FINAL_STEP + (1 - _FINAL_STEP) * (1 + math.cos(math.pi * step / steps)) / 2
        radius = torch.minimum(radius * torch.where(adversarial, 1 - gamma, 1 + gamma), largest)
        x = unit_l2(delta.add_(direction, alpha=step_size)).mul_(per_sample(radius)).add_(inputs)
        if quantization_levels:
            x = x.mul_(quantization_levels - 1).round_().div_(quantization_levels - 1)
        x = x.clamp_(0, 1)
        delta = x - inputs

    with torch.no_grad():
        adversarial = is_adversarial(model(x), labels, targeted)
    best, _ = _smaller(adversarial, x, delta, best, best_norm)
    return best


def _smaller(adversarial: Tensor, x: Tensor, delta: Tensor, best: Tensor, best_norm: Tensor) -> tuple[Tensor, Tensor]:
    norm = l2_norms(delta)
    better = adversarial & (norm < best_norm)
    return torch.where(per_sample(better), x, best), torch.where(better, norm, best_norm)
