"""What every attack needs: the check of its inputs, success, and the gradient with respect to the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_batch(inputs: Tensor, labels: Tensor) -> None:
    """Refuse what an attack would silently misread.

    Args:
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes (or target classes of a targeted attack), on the same device.

    Raises:
        ValueError: wrong dtype, shape or device, a pixel outside [0,1] or not finite, or a negative label.
    """
    if inputs.dtype != torch.float32 or inputs.ndim != 4:
        raise ValueError(f"inputs must be float32 [N,C,H,W], got {inputs.dtype} {list(inputs.shape)}")
    if labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise ValueError(f"labels must be int64 [{len(inputs)}], got {labels.dtype} {list(labels.shape)}")
    if labels.device != inputs.device:
        raise ValueError(f"labels are on {labels.device}, inputs on {inputs.device}")
    if not inputs.numel():
        return
    low, high = inputs.min().item(), inputs.max().item()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"inputs must be finite and in [0,1], got {low} to {high}")
    if labels.min().item() < 0:  # cross_entropy would skip -100 without a word
        raise ValueError(f"labels must be class numbers from 0, got {int(labels.min())}")


def is_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Bool [N]: predicted as the target class (targeted) or as another than the true class."""
    predicted = logits.argmax(dim=1)
    return predicted == labels if targeted else predicted != labels


def input_gradient(model: nn.Module, inputs: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient of ``objective(logits)``, summed over the batch, and the logits: one forward, one backward pass.

    A sum, not a mean, so that a sample's gradient does not depend on the size of its batch. Only the inputs are
    differentiated: no parameter gets a ``.grad`` and none costs time.
    """
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(objective(logits).sum(), leaf)
    return gradient, logits.detach()


def cross_entropy_gradient(model: nn.Module, inputs: Tensor, labels: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """The direction that increases adversarial loss: up the cross entropy of ``labels``, or down it if targeted."""
    sign = -1.0 if targeted else 1.0
    return input_gradient(model, inputs, lambda logits: sign * F.cross_entropy(logits, labels, reduction="sum"))
