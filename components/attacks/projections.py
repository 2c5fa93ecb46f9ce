"""Norms, steps and projections of perturbations, per sample; images are float32 [N,C,H,W]."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]

_TINY = 1e-30  # keeps a division by a norm of zero finite
_SMALLEST, _LARGEST = 2.0**-126, 2.0**125  # The inverse of each is a normal float32 number, too.
_ROUNDING = 2.0**-25  # largest rounding error of a float32 sum in [0,1]


def l2_norms(x: Tensor) -> Tensor:
    """Return the L2 norm of each sample, [N], correct for every size that float32 can hold."""
    scaled, scale = _rescaled(x)
    return _plain_l2_norms(scaled) / scale


def per_sample(values: Tensor) -> Tensor:
    """Reshape [N] to [N,1,1,1], to multiply it with a batch of images."""
    return values.view(-1, 1, 1, 1)


def unit_l2(x: Tensor) -> Tensor:
    """Scale each sample to L2 norm 1, however small or large it is; a zero sample stays zero."""
    scaled, _ = _rescaled(x)
    return scaled / per_sample(_plain_l2_norms(scaled).clamp_min(_TINY))


def _plain_l2_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


def _rescaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each sample by a power of two that brings its largest pixel near 1.

    Confident networks have gradients below 1e-22, whose squares are zero or imprecise in float32.
    Scaling by a power of two is exact, so norms of ordinary size equal those of the plain sum, bit
    for bit.

    Returns:
        The scaled samples and the factors [N].
    """
    largest = x.flatten(1).abs().amax(dim=1).clamp(_SMALLEST, _LARGEST)
    scale = torch.frexp(largest).mantissa / largest  # This power of two is exact on every device.
    return x * per_sample(scale), scale


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the direction of norm 1 along which the loss rises fastest.

    It is the sign of the gradient (linf) or the normalised gradient (l2).
    """
    return gradient.sign() if norm == "linf" else unit_l2(gradient)


def project(x: Tensor, clean: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project each sample onto the eps-ball around ``clean``, then clip it to [0,1].

    Clipping cannot leave the ball again, since ``clean`` is in [0,1] itself.
    """
    if norm == "linf":
        return torch.maximum(torch.minimum(x, clean + eps), clean - eps).clamp_(0, 1)
    delta = x - clean
    # Rounding the pixels of clean + delta could lengthen delta beyond a small eps. The slack is
    # 8e-7 on MNIST.
    radius = max(eps - _ROUNDING * math.sqrt(delta[:1].numel()), 0.0)
    scale = (radius / l2_norms(delta).clamp_min(_TINY)).clamp_max(1)
    return delta.mul_(per_sample(scale)).add_(clean).clamp_(0, 1)
