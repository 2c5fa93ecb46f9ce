"""What every attack needs: the check of its inputs, success, and the gradient with respect to the images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.projections import Norm, l2_norms, per_sample

_TINY = 1e-12

Auxiliary = Callable[[Tensor, Tensor], Tensor]
"""``auxiliary(x, rows)``: what an adaptive attacker maximises beside the loss on the logits. x [n,C,H,W] are the present
iterates, rows int64 [n] their row numbers in the batch that the attack was given; returns one value for each, [n].
Gradients flow through x."""


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


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the class of each sample, int64 [N]: -1 (no class) where the largest logit is not finite.

    The largest of logits with a NaN among them is NaN, and argmax would call its place a class.
    """
    return torch.where(logits.amax(dim=1).isfinite(), logits.argmax(dim=1), -1)


def is_adversarial(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Bool [N]: predicted as the target class (targeted) or as another than the true class.

    "No class" is another than the true one, as it is for the judge.
    """
    predicted = predicted_classes(logits)
    return predicted == labels if targeted else predicted != labels


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]: the largest other logit minus that of ``labels``; above 0 where another class is predicted."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    is_own = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_own, -math.inf).amax(dim=1) - own


def lead(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
    """[N]: the logit of the class aimed at minus that of ``labels``."""
    return (logits.gather(1, aims[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


def stronger(adversarial: Tensor, loss: Tensor, than_adversarial: Tensor, than_loss: Tensor) -> Tensor:
    """Bool [N]: whether an example beats another: an adversarial one any that is not, else the higher loss."""
    return (adversarial & ~than_adversarial) | ((adversarial == than_adversarial) & (loss > than_loss))


def norms(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of each perturbation [N,C,H,W]: [N]."""
    return delta.flatten(1).abs().amax(dim=1) if norm == "linf" else l2_norms(delta)


def random_direction(inputs: Tensor, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """As ``inputs``: noise of norm 1 per sample, drawn on the CPU, so that every device gets the same."""
    if norm == "linf":
        direction = torch.rand(inputs.shape, generator=generator).mul_(2).sub_(1)
    else:
        direction = torch.randn(inputs.shape, generator=generator)
    return direction.div_(per_sample(norms(direction, norm).clamp_min(_TINY))).to(inputs.device)


def auxiliary_values(auxiliary: Auxiliary, x: Tensor, rows: Tensor) -> Tensor:
    """``auxiliary(x, rows)``: [n].

    Raises:
        ValueError: it returned another shape, which would be broadcast or summed without a word.
    """
    values = auxiliary(x, rows)
    if values.shape != rows.shape:
        raise ValueError(f"auxiliary must return {list(rows.shape)}, one value per sample; got {list(values.shape)}")
    return values


def loss_gradient(
    model: nn.Module, inputs: Tensor, losses: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``losses(logits, inputs)``, summed over the batch, the logits, and the losses: one forward, one
    backward pass.

    A sum, not a mean, so that a sample's gradient does not depend on the size of its batch. Only the inputs are
    differentiated: no parameter gets a ``.grad`` and none costs time. A network that cuts its graph has a gradient of
    zero, as one with a flat output has: the attack finds nothing, and the reliability flags say why.
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
    """Gradient of ``objective(logits)``, summed over the batch, and the logits; see :func:`loss_gradient`."""
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
    """The direction that increases adversarial loss: up the cross entropy of ``labels``, or down it if targeted.

    With ``auxiliary`` its values at (inputs, rows) are added to what is to be increased.
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
