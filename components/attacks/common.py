"""Parts that all attacks share: input checks, the success criterion, gradients of the images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.projections import Norm, l2_norms, per_sample

_TINY = 1e-12

Auxiliary = Callable[[Tensor, Tensor], Tensor]
"""Term that an adaptive attacker maximises beside the loss on the logits: ``auxiliary(x, rows)`` ->
[n]. x [n,C,H,W] are the present iterates, and rows int64 [n] are their row numbers in the batch
that the attack was given. Gradients flow through x."""


def check_batch(inputs: Tensor, labels: Tensor) -> None:
    """Refuse a batch that an attack would silently misread.

    Args:
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes (or target classes of a targeted attack), on the same
            device.

    Raises:
        ValueError: wrong dtype, shape or device, a pixel outside [0,1] or not finite, or a negative
            label.
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
    if not (low >= 0 and high <= 1):  # This form also refuses NaN.
        raise ValueError(f"inputs must be finite and in [0,1], got {low} to {high}")
    if labels.min().item() < 0:  # cross_entropy silently skips -100
        raise ValueError(f"labels must be class numbers from 0, got {int(labels.min())}")


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the predicted classes, int64 [N]; -1 (no class) where the largest logit is not finite.

    If one logit is NaN, the largest is NaN too, and argmax would return its position as a class.
    """
    return torch.where(logits.amax(dim=1).isfinite(), logits.argmax(dim=1), -1)


def is_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Return bool [N]: whether each sample is predicted as its target class, or as a wrong class.

    "No class" counts as a wrong class, as it does for the judge.

    Args:
        labels: int64 [N], target classes if ``targeted``, else true classes.
    """
    predicted = predicted_classes(logits)
    return predicted == labels if targeted else predicted != labels


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the logit of ``labels``, [N].

    It is above 0 where another class is predicted.
    """
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_label, -math.inf).amax(dim=1) - label_logits


def lead(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
    """Return the logit of the target class minus the logit of ``labels``, [N]."""
    return (logits.gather(1, aims[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


def stronger(adversarial: Tensor, loss: Tensor, than_adversarial: Tensor, than_loss: Tensor) -> Tensor:
    """Return bool [N]: whether an example is stronger than another one.

    An adversarial example is stronger than one that is not. Otherwise the higher loss decides.
    """
    return (adversarial & ~than_adversarial) | ((adversarial == than_adversarial) & (loss > than_loss))


def norms(delta: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each perturbation [N,C,H,W], shape [N]."""
    return delta.flatten(1).abs().amax(dim=1) if norm == "linf" else l2_norms(delta)


def random_direction(inputs: Tensor, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """Draw noise of norm 1 per sample, of the shape of ``inputs``.

    It is drawn on the CPU, so that every device gets the same noise.
    """
    if norm == "linf":
        direction = torch.rand(inputs.shape, generator=generator).mul_(2).sub_(1)
    else:
        direction = torch.randn(inputs.shape, generator=generator)
    return direction.div_(per_sample(norms(direction, norm).clamp_min(_TINY))).to(inputs.device)


def auxiliary_values(auxiliary: Auxiliary, x: Tensor, rows: Tensor) -> Tensor:
    """Return ``auxiliary(x, rows)``, [n], after a check of its shape.

    Raises:
        ValueError: the values have another shape, which would silently be broadcast or summed.
    """
    values = auxiliary(x, rows)
    if values.shape != rows.shape:
        raise ValueError(f"auxiliary must return {list(rows.shape)}, one value per sample; got {list(values.shape)}")
    return values


def loss_gradient(
    model: nn.Module, inputs: Tensor, losses: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the summed losses by the images, the logits, and the losses.

    It costs one forward and one backward pass. The losses are summed, not averaged, so that a
    sample's gradient does not depend on the batch size. Only the inputs are differentiated: no
    parameter gets a ``.grad`` and none costs time. A network that cuts its graph has a gradient of
    zero, like one with a flat output: the attack finds nothing, and the reliability flags say why.

    Args:
        losses: (logits, inputs) -> one value per sample, or a scalar.
    """
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        logits = model(leaf)
        values = losses(logits, leaf)
        if values.requires_grad:
            (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True, materialize_grads=True)
        else:
            gradient = torch.zeros_like(leaf)
    return gradient, logits.detach(), values.detach()


def input_gradient(model: nn.Module, inputs: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gradient of the summed ``objective(logits)`` by the images, and the logits.

    See :func:`loss_gradient`.
    """
    gradient, logits, _ = loss_gradient(model, inputs, lambda logits, _: objective(logits))
    return gradient, logits


def cross_entropy_gradient(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    targeted: bool,
    auxiliary: Auxiliary | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient that increases the adversarial loss, and the logits.

    That loss is the cross entropy of ``labels``, or minus it if ``targeted``, plus the values of
    ``auxiliary`` at (inputs, rows).
    """
    sign = -1.0 if targeted else 1.0

    def objective(logits: Tensor, x: Tensor) -> Tensor:
        loss = sign * F.cross_entropy(logits, labels, reduction="sum")
        if auxiliary is not None:
            assert rows is not None
            loss = loss + auxiliary_values(auxiliary, x, rows).sum()
        return loss

    gradient, logits, _ = loss_gradient(model, inputs, objective)
    return gradient, logits
