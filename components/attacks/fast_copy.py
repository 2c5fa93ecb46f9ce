"""Fast copy of a network, on which attacks search; the network itself has the last word."""

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
"""Forward passes that must agree.

A randomised network may agree once by chance, and tracing freezes one draw."""
_AGREEMENT = 1e-4
"""Largest difference of two float32 logits of an image, as a share of the largest logit.

Folding causes 1e-6."""
_SLOPE_AGREEMENT = 1e-3
"""Largest difference of an image's gradients, as a share of their norm. Folding causes 1e-6."""
_SLOPES = 0.75
"""Share of the images on which the gradients must agree.

On the others a ReLU may lie within rounding of 0, and folding may open or close it."""
_BFLOAT16_AGREEMENT, _BFLOAT16_SLOPE_AGREEMENT = 5e-2, 0.5
"""The same limits for bfloat16.

Rounding to eight bits changes a trained network's logits by 1/100 and its gradients by 1/8."""


def folded(model: nn.Module) -> _Frozen | None:
    """Copy a network in eval mode, frozen, with batch norm folded into the convolutions.

    The copy computes in channels_last. It is not compared with the network. Tracing may lose a
    backward pass that a network defines itself, so use :func:`make_fast_copy` for unknown networks.

    Returns:
        The copy, or None if the network cannot be traced.

    Raises:
        torch.OutOfMemoryError: the copy does not fit the memory.
    """
    from torch.fx.experimental.optimization import fuse  # The import takes half a second.

    try:
        return _Frozen(fuse(_Root(model)).eval())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Networks that cannot be traced raise errors of many types.
        return None


@true_float32()
def make_fast_copy(model: nn.Module, images: Tensor, *, bfloat16: bool = False) -> nn.Module | None:
    """Make a frozen network with the logits of ``model`` in less time.

    Batch norm is folded into the convolutions, and the memory format is channels_last.

    Args:
        model: in eval mode; it is not changed.
        images: float32 [N,C,H,W] in [0,1] on the model's device, on which logits and gradients of
            model and copy are compared.
        bfloat16: compute all but linear layers in bfloat16, if logits and gradients stay near
            enough; otherwise the copy is float32. For attacks with
            :attr:`~components.attacks.spec.AttackSpec.may_search_in_bfloat16`.

    Returns:
        The copy, or None if the network's control flow cannot be traced, or if logits or gradients
        of the copy differ or are zero.

    Raises:
        torch.OutOfMemoryError: the copy or its passes do not fit the memory.
    """
    fast = folded(model)
    if fast is None or not _agree(model, fast, images, _AGREEMENT, _SLOPE_AGREEMENT):
        return None
    if bfloat16:
        faster = _BFloat16(copy.deepcopy(fast.net))
        if _agree(fast, faster, images, _BFLOAT16_AGREEMENT, _BFLOAT16_SLOPE_AGREEMENT):
            return faster
    return fast


def computes_in_bfloat16(fast: nn.Module | None) -> bool:
    """Tell whether a copy that was made with ``bfloat16`` does compute in bfloat16."""
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
    """Run an attack on ``fast``, and repeat it on ``model`` for examples that ``model`` withstands.

    An example may lie so close to the decision boundary that rounding decides; C&W, DDN and FAB end
    there. Without the second run such a sample would count as robust. FGSM runs on ``model``, since
    a single pass gains nothing from the copy.

    Except for the bfloat16 layers of ``fast``, everything is computed in true float32.

    Args:
        fast: the copy of ``model`` by :func:`make_fast_copy`; None runs the attack on ``model``.
        others: as for :func:`run_attack`.

    Returns:
        float32 [N,C,H,W]: the examples.
    """
    options: dict[str, Any] = {"stop_on_success": stop_on_success, "generator": generator}
    if fast is None or spec.name == "fgsm":
        return run_attack(spec, model, inputs, labels, auxiliary=auxiliary, **options)
    examples = run_attack(spec, fast, inputs, labels, auxiliary=auxiliary, **options)
    if not len(inputs):
        return examples

    def is_broken(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return is_adversarial(net(x), labels, targeted=False)

    lost = (is_broken(fast, examples) | is_broken(model, inputs)) & ~is_broken(model, examples)
    rows = lost.nonzero().squeeze(1)
    if len(rows):
        auxiliary_of_rows = None if auxiliary is None else lambda x, within: auxiliary(x, rows[within])
        examples[rows] = run_attack(spec, model, inputs[rows], labels[rows], auxiliary=auxiliary_of_rows, **options)
    return examples


class _Frozen(nn.Module):
    """A network without gradients for its parameters, with images in channels_last."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return logits


class _BFloat16(_Frozen):
    """A frozen network in bfloat16, but for its linear layers.

    Rounding the logits themselves would hide most of a step's gain.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.to(torch.bfloat16))
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                module.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16)).float()


class _Root(nn.Module):
    """Module around a network.

    Tracing skips the hooks of the outermost module, and a network's hook may normalise its images.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def _agree(model: nn.Module, fast: nn.Module, images: Tensor, logits_within: float, slopes_within: float) -> bool:
    """Tell whether logits and gradients of two networks agree.

    Tracing loses a backward pass of the network's own, such as that of ComDefend's binarisation,
    and an attack without gradients finds nothing.
    """

    def weighted(logits: Tensor, _: Tensor) -> Tensor:
        # A confident network saturates a loss, but not this sum.
        return logits @ torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits.device)

    def passes(net: nn.Module) -> tuple[Tensor, Tensor]:
        gradient, logits, _ = loss_gradient(net, images, weighted)
        return logits, gradient

    try:
        fast_logits, fast_slope = passes(fast)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # A traced network may not run.
        return False
    for _ in range(_PASSES):
        logits, slope = passes(model)
        near = (logits - fast_logits).abs().amax(dim=1) <= logits_within * logits.abs().amax(dim=1)
        length = l2_norms(slope)
        parallel = l2_norms(slope - fast_slope) <= slopes_within * length
        if not near.all() or not (length > 0).all() or parallel.float().mean() < _SLOPES:
            return False
    return True
