"""Random noise: no attack at all, the floor that every attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch
from components.attacks.projections import Norm, project, unit_l2

_ROUNDS = 4  # of going on with what is at no wall yet; two leave 3 % of the way around a nearly black image, four 1e-4


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
    """Add noise of norm eps inside [0,1]: random signs (linf), or a Gaussian direction (l2) of which the pixels at their
    wall are left out and the others go further, since a floor of shorter examples would be no floor.

    The model is never run, and ``targeted`` changes nothing; both are there for the common signature.

    Args:
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N].
        eps: norm of the noise, in [0,1] pixel units.
        generator: CPU generator; every device gets the same draw.

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
    """``clean`` moved by an L2 norm of eps without leaving [0,1]; shorter only where the rest meets walls as well.

    Clipping alone would take a third of its length from a direction around an image that is mostly black.

    Args:
        clean: float32 [N,C,H,W] in [0,1]; N or 1.
        direction: float32 [N,C,H,W], of any length.
        eps: L2 norm in [0,1] pixel units.
    """
    delta = direction
    for _ in range(_ROUNDS):
        delta = (clean + eps * unit_l2(delta)).clamp_(0, 1) - clean
    return (clean + delta).clamp_(0, 1)
