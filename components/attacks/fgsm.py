"""FGSM, the fast gradient sign method.

Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples",
https://arxiv.org/abs/1412.6572
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.bim import ascend
from components.attacks.common import check_batch
from components.attacks.projections import Norm


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take one step of size eps that increases the cross entropy.

    The step goes along the sign of the gradient (linf), or along the gradient itself (l2).

    Args:
        model: maps [0,1] images to logits [N,K]; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        eps: norm of the perturbation before clipping to [0,1].
        norm: linf, or l2 (the fast gradient method, the authors' "other norms").
        generator: unused; FGSM is deterministic.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    return ascend(model, inputs, inputs, labels, eps=eps, norm=norm, steps=1, step_size=eps, targeted=targeted)
