"""Random noise: no attack, but the floor that every attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch
from components.attacks.projections import Norm, project, unit_l2

_ROUNDS = 4
"""Rounds of giving the norm lost by clipping to pixels that are not clipped. On a nearly black
image two rounds lose 3 % of it, four 1e-4."""


def noise(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Add random noise of norm eps inside [0,1].

    The noise is random signs (linf) or a Gaussian direction (l2). In l2, pixels stop at their bound
    and the others move further: shorter perturbations would be too low a floor.

    The model is never run, and ``targeted`` changes nothing; both belong to the common signature.

    Args:
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N].
        eps: norm of the noise, in [0,1] pixel units.
        generator: CPU generator, so that every device gets the same draw.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    if not len(inputs):
        return inputs.clone()
    if norm == "linf":
        signs = torch.randint(0, 2, inputs.shape, generator=generator).mul_(2).sub_(1).to(inputs)
        noisy = inputs + eps * signs
    else:
        noisy = moved(inputs, torch.randn(inputs.shape, generator=generator).to(inputs), eps)
    return project(noisy, inputs, eps, norm)


def moved(clean: Tensor, direction: Tensor, eps: float) -> Tensor:
    """Move images along a direction by an L2 norm of eps, without leaving [0,1].

    The perturbation is shorter than eps only where too many pixels reach their bound. Clipping
    alone would take a third of a direction's length around an image that is mostly black.

    Args:
        clean: float32 [N,C,H,W] in [0,1]; N or 1.
        direction: float32 [N,C,H,W], of any length.
        eps: L2 norm in [0,1] pixel units.
    """
    delta = direction
    for _ in range(_ROUNDS):
        delta = (clean + eps * unit_l2(delta)).clamp_(0, 1) - clean
    return (clean + delta).clamp_(0, 1)
