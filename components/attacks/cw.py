"""C&W L2.

Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks",
https://arxiv.org/abs/1608.04644
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, input_gradient, is_adversarial, margin
from components.attacks.projections import l2_norms, per_sample

_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8
_INSIDE = 0.999999  # The authors' value; it keeps atanh finite at black and white pixels.
_LARGEST_CONST = 1e10


def cw(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int = 20,
    binary_search_steps: int = 5,
    lr: float = 0.5,
    initial_const: float = 1.0,
    confidence: float = 0.0,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Find the adversarial example of the smallest L2 norm among all iterates.

    Adam minimises |x - clean|^2 + const * max(margin + confidence, 0) over w, where x = (tanh(w) +
    1) / 2. The margin is the true class's logit minus the largest other logit, or, if targeted, the
    largest other logit minus the target class's. ``const`` is searched for per sample: times 10
    until the first success, then by bisection.

    Differences from the authors' code:

    - Every search step begins at the clean image, so its gradient is computed once (the same
      iterates for fewer passes).
    - The last iterate of a search step is judged too, for the result and for the search.
    - There is no early abort. It stops on the loss of the whole batch, so a sample's result would
      depend on its neighbours and some successes would be lost.

    Passes: 1 + binary_search_steps * (steps - 1) forward and backward, binary_search_steps forward.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        steps: Adam steps per search step.
        binary_search_steps: number of values of const that are tried for each sample.
        lr: Adam's learning rate in tanh space. The authors' 0.01 is meant for 10,000 steps. In 20
            steps it hardly moves the black and white pixels of MNIST (measured on a CNN: 20 %
            success at 0.03, 98-100 % at the default). Use 0.01 for natural images, where 0.5 finds
            norms ten times as large.
        initial_const: first const.
        confidence: margin (in logits) by which an example must be adversarial.
        generator: unused; C&W is deterministic.

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

    def shortfall(logits: Tensor) -> Tensor:
        """Return how much the margin lacks to the required confidence, [N]; negative beyond it."""
        margins = margin(logits, labels)
        return (margins if targeted else -margins) + confidence

    def hinge(logits: Tensor) -> Tensor:
        return shortfall(logits).clamp_min(0)

    clean_gradient, logits = input_gradient(model, inputs, hinge)
    # No norm is below 0, so a misclassified sample keeps its clean input.
    best_norm = torch.where(is_adversarial(logits, labels, targeted), 0.0, math.inf)

    clean_w = torch.atanh((2 * inputs - 1) * _INSIDE)
    clean_x = (torch.tanh(clean_w) + 1) / 2
    const = torch.full_like(best_norm, initial_const)
    lower, upper = torch.zeros_like(const), torch.full_like(const, math.inf)
    for _ in range(binary_search_steps):
        w, x, gradient = clean_w.clone(), clean_x, clean_gradient
        first_moment, second_moment = torch.zeros_like(w), torch.zeros_like(w)
        succeeded = torch.zeros_like(const, dtype=torch.bool)
        for step in range(1, steps + 1):
            # This is the chain rule by hand: dx/dw = (1 - tanh(w)^2) / 2 = 2 x (1 - x)
            total = torch.addcmul(2 * (x - clean_x), gradient, per_sample(const)).mul_(x * (1 - x)).mul_(2)
            first_moment.lerp_(total, 1 - _BETA1)
            second_moment.mul_(_BETA2).addcmul_(total, total, value=1 - _BETA2)
            scale = (second_moment / (1 - _BETA2**step)).sqrt_().add_(_ADAM_EPS)
            w.addcdiv_(first_moment, scale, value=-lr / (1 - _BETA1**step))
            x = torch.tanh(w).add_(1).div_(2)
            if step < steps:
                gradient, logits = input_gradient(model, x, hinge)
            else:
                with torch.no_grad():
                    logits = model(x)
            success = is_adversarial(logits, labels, targeted) & (shortfall(logits) <= 0)
            succeeded |= success
            norm = l2_norms(x - inputs)
            better = success & (norm < best_norm)
            best = torch.where(per_sample(better), x, best)
            best_norm = torch.where(better, norm, best_norm)
        upper = torch.where(succeeded, const, upper)
        lower = torch.where(succeeded, lower, const)
        const = torch.where(upper.isinf(), const * 10, (lower + upper) / 2).clamp_max(_LARGEST_CONST)
    return best
