"""BIM, the basic iterative method.

Kurakin, Goodfellow, Bengio, "Adversarial Examples in the Physical World",
https://arxiv.org/abs/1607.02533

PGD is the same iteration from another start, and FGSM is its first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import Auxiliary, check_batch, cross_entropy_gradient, is_adversarial
from components.attacks.projections import Norm, project, steepest


def bim(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    step_size: float = 0.0,
    targeted: bool = False,
    stop_on_success: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ascend the cross entropy from the clean image by steps of steepest ascent.

    Every step is projected onto the eps-ball and [0,1].

    Args:
        model: maps [0,1] images to logits [N,K]; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        eps: largest norm of the perturbation, in [0,1] pixel units.
        norm: linf (steps along the sign) or l2 (along the normalised gradient).
        steps: forward and backward passes.
        step_size: length of a step in the same norm; 0 takes 2.5 * eps / steps.
        stop_on_success: drop a sample from the batch at its first adversarial iterate, and return
            that iterate. Use it only for examples judged on this same model: they lie just behind
            its decision boundary and transfer worse. False: every sample takes all steps and its
            last iterate is returned.
        auxiliary: term that an adaptive attacker adds to the cross entropy.
        generator: unused; BIM is deterministic.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range, or an auxiliary that does
            not return [n].
    """
    check_batch(inputs, labels)
    return ascend(
        model,
        inputs,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        targeted=targeted,
        stop_on_success=stop_on_success,
        auxiliary=auxiliary,
    )


def ascend(
    model: nn.Module,
    start: Tensor,
    clean: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    steps: int,
    step_size: float,
    targeted: bool,
    stop_on_success: bool = False,
    auxiliary: Auxiliary | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Run the iteration of :func:`bim` from any start inside the ball around ``clean``.

    Args:
        rows: int64 [N], the row numbers that ``auxiliary`` gets for the samples; None: 0 to N - 1.

    Returns:
        A new tensor, float32 [N,C,H,W].
    """
    step_size = step_size or 2.5 * eps / steps
    result = start.clone()
    if not len(start):
        return result
    x = start
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        auxiliary_rows = active if rows is None else rows[active]
        gradient, logits = cross_entropy_gradient(model, x, labels, targeted, auxiliary, auxiliary_rows)
        if stop_on_success:
            broken = is_adversarial(logits, labels, targeted)
            if broken.any():
                result[active[broken]] = x[broken]
                active, x, clean, labels, gradient = (t[~broken] for t in (active, x, clean, labels, gradient))
                if not len(active):
                    return result
        x = project(steepest(gradient, norm).mul_(step_size).add_(x), clean, eps, norm)
    result[active] = x
    return result
