"""PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", https://arxiv.org/abs/1706.06083"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.bim import ascend
from components.attacks.common import check_batch
from components.attacks.projections import Norm, per_sample, project, unit_l2


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    step_size: float = 0.0,
    targeted: bool = False,
    early_leaving: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`~components.attacks.bim.bim` from a random point, uniform in the eps-ball (clipped to [0,1]).

    Args:
        model, inputs, labels, eps, norm, steps, step_size, targeted, early_leaving: as for BIM.
        generator: CPU generator of the start; every device gets the same draw.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    return ascend(
        model,
        random_start(inputs, eps, norm, generator),
        inputs,
        labels,
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        targeted=targeted,
        early_leaving=early_leaving,
    )


def random_start(inputs: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A point of the eps-ball around each input, uniformly distributed before clipping to [0,1]."""
    if norm == "linf":
        offset = torch.rand(inputs.shape, generator=generator).mul_(2).sub_(1)
    else:
        direction = unit_l2(torch.randn(inputs.shape, generator=generator))
        # the volume within radius r grows as r^dimensions
        radius = torch.rand(len(inputs), generator=generator).pow_(1 / max(inputs[:1].numel(), 1))
        offset = direction * per_sample(radius)
    return project(inputs + eps * offset.to(inputs.device), inputs, eps, norm)
