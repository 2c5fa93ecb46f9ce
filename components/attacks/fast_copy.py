"""Searching for examples on a faster network that stands in for the one under attack; that one has the last word."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks.common import Auxiliary, is_adversarial, loss_gradient
from components.attacks.projections import l2_norms
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.precision import true_float32

_PASSES = 5
"""So often must the network itself agree: one that draws at random agrees by luck, and tracing keeps one draw."""
_AGREEMENT = 1e-4
"""Most by which two float32 logits of an image may differ, as a share of the largest: folding differs by 1e-6."""
_SLOPE_AGREEMENT = 1e-3
"""Most by which an image's gradients may, as a share of their norm: folding differs by 1e-6 ..."""
_SLOPES = 0.75
"""... on so many of the images at least. On the others a ReLU may lie within rounding of 0, and folding opens or closes it."""
_BFLOAT16_AGREEMENT, _BFLOAT16_SLOPE_AGREEMENT = 5e-2, 0.5
"""The same in bfloat16, whose eight bits make a hundredth of a trained network's logits and an eighth of its gradients' norm."""


@true_float32()
def make_fast_copy(model: nn.Module, images: Tensor, *, bfloat16: bool = False) -> nn.Module | None:
    """A frozen network with the logits of ``model`` in less time: batch norm folded into the convolutions, channels_last.

    Args:
        model: in eval mode; not changed.
        images: float32 [N,C,H,W] in [0,1] on the model's device, to see that logits and gradients are the same.
        bfloat16: everything but linear layers in bfloat16, if logits and gradients stay near enough; else as without. For
            attacks that may search so (:attr:`~components.attacks.spec.AttackSpec.may_search_in_bfloat16`).

    Returns:
        None where that cannot be had: its control flow cannot be traced, or logits or gradients come out otherwise, or are zero.

    Raises:
        torch.OutOfMemoryError: no room for the copy, or for so many images.
    """
    fast = _folded(model)
    if fast is None or not _agree(model, fast, images, _AGREEMENT, _SLOPE_AGREEMENT):
        return None
    if bfloat16:
        faster = _BFloat16(copy.deepcopy(fast.net))
        if _agree(fast, faster, images, _BFLOAT16_AGREEMENT, _BFLOAT16_SLOPE_AGREEMENT):
            return faster
    return fast


def computes_in_bfloat16(fast: nn.Module | None) -> bool:
    """Whether :func:`make_fast_copy` could give what it was asked for with ``bfloat16``."""
    return isinstance(fast, _BFloat16)


@true_float32()
def run_attack_on_copy(
    spec: AttackSpec,
    model: nn.Module,
    fast: nn.Module | None,
    inputs: Tensor,
    labels: Tensor,
    *,
    stop_on_success: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`run_attack` on ``fast``; where ``model`` does not fall for what it should, again on ``model``.

    An example may lie so close to the boundary (C&W, DDN and FAB end there) that rounding decides. Without the second
    run such a sample would count as one that withstood. FGSM, a single pass, gains nothing and runs on ``model``.

    Whatever is not in bfloat16 by ``fast`` itself is computed in true float32.

    Args:
        fast: what :func:`make_fast_copy` made of ``model``; None: the attack runs on ``model`` alone.
        others: as for :func:`run_attack`.
    """
    options: dict[str, Any] = {"stop_on_success": stop_on_success, "generator": generator}
    if fast is None or spec.name == "fgsm":
        return run_attack(spec, model, inputs, labels, auxiliary=auxiliary, **options)
    found = run_attack(spec, fast, inputs, labels, auxiliary=auxiliary, **options)
    if not len(inputs):
        return found

    def falls(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return is_adversarial(net(x), labels, targeted=False)

    slipped = (falls(fast, found) | falls(model, inputs)) & ~falls(model, found)
    rows = slipped.nonzero().squeeze(1)
    if len(rows):
        knows = None if auxiliary is None else lambda x, within: auxiliary(x, rows[within])
        found[rows] = run_attack(spec, model, inputs[rows], labels[rows], auxiliary=knows, **options)
    return found


class _Frozen(nn.Module):
    """A network without gradients for its parameters, which gets images in channels_last."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits


class _BFloat16(_Frozen):
    """The same in bfloat16. Not its linear layers: rounding the logits themselves would hide most of what a step gains."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.to(torch.bfloat16))
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                module.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16)).float()


class _Root(nn.Module):
    """Tracing passes over the hooks of the outermost module, and one of a network's may normalise its images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def _folded(model: nn.Module) -> _Frozen | None:
    from torch.fx.experimental.optimization import fuse  # half a second

    try:
        return _Frozen(fuse(_Root(model)).eval())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a network does that cannot be traced
        return None


def _agree(model: nn.Module, fast: nn.Module, images: Tensor, logits_within: float, slopes_within: float) -> bool:
    """In logits and in gradients: a backward pass of its own (ComDefend's binarisation has one) is lost in tracing, and an attack
    without gradients finds nothing."""

    def weighted(logits: Tensor, _: Tensor) -> Tensor:
        """No loss that a confident network saturates."""
        return logits @ torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits.device)

    def passes(net: nn.Module) -> tuple[Tensor, Tensor]:
        gradient, logits, _ = loss_gradient(net, images, weighted)
        return logits, gradient

    try:
        found, found_slope = passes(fast)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what was traced may not run
        return False
    for _ in range(_PASSES):
        wanted, slope = passes(model)
        near = (wanted - found).abs().amax(dim=1) <= logits_within * wanted.abs().amax(dim=1)
        length = l2_norms(slope)
        along = l2_norms(slope - found_slope) <= slopes_within * length
        if not near.all() or not (length > 0).all() or along.float().mean() < _SLOPES:
            return False
    return True
