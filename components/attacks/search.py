"""Searching for examples on a faster network that stands in for the one under attack; that one has the last word."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from components.attacks.common import Auxiliary, is_adversarial, loss_gradient
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec

Precision = Literal["float32", "bfloat16"]

_AGREEMENT = 1e-4
"""Most by which two float32 logits may differ, as a share of the largest: folding differs by 1e-6."""
_SLOPE_AGREEMENT = 1e-2
"""Most by which gradients may, as a share of their norm: where a ReLU is within rounding of 0, folding differs by up to 1e-3."""


def stand_in(model: nn.Module, images: Tensor, precision: Precision = "float32") -> nn.Module:
    """A frozen network with the logits of ``model`` in less time: batch norm folded into the convolutions, channels_last.

    Args:
        model: in eval mode; not changed.
        images: float32 [N,C,H,W] in [0,1] on the model's device, to see that logits and gradients are the same.
        precision: "bfloat16" runs it under autocast; logits and images stay float32.

    Returns:
        The model itself where that cannot be had: its control flow cannot be traced, or logits or gradients come out otherwise.
    """
    fast = _folded(model)
    if fast is None or not _agree(model, fast, images):
        fast = model if precision == "float32" else _Frozen(copy.deepcopy(model))
    return _Bfloat16(fast) if precision == "bfloat16" else fast


def search(
    spec: AttackSpec,
    model: nn.Module,
    fast: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    early_leaving: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`run_attack` on ``fast``; where ``model`` does not fall for what ``fast`` does, again on ``model``.

    An example may lie so close to the boundary (C&W, DDN and FAB end there) that rounding decides. Without the second
    run such a sample would count as one that withstood.

    Args:
        fast: what :func:`stand_in` made of ``model``, or ``model`` itself.
        others: as for :func:`run_attack`.
    """
    found = run_attack(
        spec, fast, inputs, labels, early_leaving=early_leaving, auxiliary=auxiliary, generator=generator
    )
    if fast is model or not len(inputs):
        return found
    with torch.no_grad():
        slipped = is_adversarial(fast(found), labels, targeted=False)
        slipped &= ~is_adversarial(model(found), labels, targeted=False)
    if not slipped.any():
        return found
    rows = slipped.nonzero().squeeze(1)
    knows = None if auxiliary is None else lambda x, within: auxiliary(x, rows[within])
    again = run_attack(
        spec, model, inputs[rows], labels[rows], early_leaving=early_leaving, auxiliary=knows, generator=generator
    )
    found[rows] = again
    return found


class _Frozen(nn.Module):
    """A network without gradients for its parameters, which gets images in channels_last."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits


class _Bfloat16(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.net(x)
        return logits.float()


class _Root(nn.Module):
    """Tracing passes over the hooks of the outermost module, and one of a network's may normalise its images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def _folded(model: nn.Module) -> nn.Module | None:
    from torch.fx.experimental.optimization import fuse  # half a second

    try:
        return _Frozen(fuse(_Root(model)).eval())
    except Exception:  # whatever a network does that cannot be traced
        return None


def _agree(model: nn.Module, fast: nn.Module, images: Tensor) -> bool:
    """In logits and in gradients: a backward pass of its own (ComDefend's binarisation has one) is lost in tracing, and an attack
    without gradients finds nothing."""

    def passes(net: nn.Module) -> tuple[Tensor, Tensor]:
        gradient, logits, _ = loss_gradient(net, images, lambda logits, x: logits.logsumexp(dim=1) - logits[:, 0])
        return logits, gradient

    wanted, slope = passes(model)
    try:
        found, found_slope = passes(fast)
    except Exception:  # what was traced may not run
        return False
    same_logits = (wanted - found).abs().max() <= _AGREEMENT * wanted.abs().max()
    return bool(same_logits and (slope - found_slope).norm() <= _SLOPE_AGREEMENT * slope.norm())
