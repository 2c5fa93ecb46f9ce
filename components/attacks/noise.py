"""Random noise: no attack at all, the floor that every attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch
from components.attacks.projections import Norm, project, unit_l2


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
    """Add noise of norm exactly eps, then clip to [0,1]: random signs (linf) or a Gaussian direction (l2).

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
        direction = torch.randint(0, 2, inputs.shape, generator=generator).mul_(2).sub_(1).to(inputs.dtype)
    else:
        direction = unit_l2(torch.randn(inputs.shape, generator=generator))
    return project(inputs + eps * direction.to(inputs.device), inputs, eps, norm)
