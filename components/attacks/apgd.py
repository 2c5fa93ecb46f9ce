"""APGD, untargeted and targeted (APGD-T).

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.common import (
    Auxiliary,
    auxiliary_values,
    check_batch,
    is_adversarial,
    lead,
    loss_gradient,
    margin,
    random_direction,
    stronger,
)
from components.attacks.projections import Norm, per_sample, project, steepest
from components.attacks.targets import likeliest_others

Loss = Literal["ce", "dlr"]

_MOMENTUM = 0.75
_RHO = 0.75
# Shares of all steps: the first interval between checkpoints, its reduction, and its minimum.
_FIRST, _REDUCTION, _SHORTEST = 0.22, 0.03, 0.06
_TINY = 1e-12

_Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Objective to maximise: (logits, images, their rows in the batch) -> [n]."""


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = "ce",
    targeted: bool = False,
    stop_on_success: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise a loss by projected gradient ascent with momentum and an adaptive step size.

    The step size is 2 eps at first. At a checkpoint it is halved, and the ascent returns to the
    best iterate so far, where the loss rose in fewer than 3 steps of 4 or did not improve.

    Every run begins at a random point of norm eps (clipped to [0,1]). The strongest of all iterates
    of all restarts is returned: an adversarial one before any that is not, then the one of the
    highest loss.

    Differences from the authors' code:

    - With ``stop_on_success`` a sample stops at its first adversarial iterate. Theirs goes on and
      keeps the last one; ours breaks as many samples in fewer passes.
    - Without ``stop_on_success`` theirs returns the iterate of the highest loss even where another
      one is adversarial.
    - The first checkpoint counts the first step as the paper does: from the loss at the start, not
      from 0.
    - The gradient at the last iterate is not computed.

    Passes per restart: steps forward and backward, 1 forward; with ``stop_on_success`` 1 forward more
    for the clean images.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        eps: largest norm of the perturbation, in [0,1] pixel units.
        norm: linf or l2.
        steps: steps of each restart.
        restarts: number of runs, each from its own random start.
        loss: "ce", the cross entropy, or "dlr", the largest other logit minus the true class's,
            divided by the largest minus the third largest. DLR does not change with the scale of
            the logits, but needs three classes; with two it is the numerator alone. If
            ``targeted``, the cross entropy of the target class is minimised, or its lead over the
            largest other logit is maximised, divided as in :func:`apgd_t`. (On a CNN for MNIST this
            divisor hit 48 % of the least likely classes, the untargeted one 17 %.)
        stop_on_success: drop a sample at its first adversarial iterate, also from the next restarts.
            A sample that is already misclassified is returned clean. Use it only for examples
            judged on this same model. False: every sample takes all steps of all restarts.
        auxiliary: term that an adaptive attacker adds to the loss.
        generator: CPU generator of the starts, so that every device gets the same draw.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range, or an auxiliary that does
            not return [n].
    """
    check_batch(inputs, labels)
    if not len(inputs):
        return inputs.clone()

    def objective(logits: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        classes = labels[rows]
        if loss == "ce":
            value = F.cross_entropy(logits, classes, reduction="none") * (-1.0 if targeted else 1.0)
        else:
            value = _targeted_dlr(logits, -margin(logits, classes)) if targeted else _dlr(logits, classes)
        return value if auxiliary is None else value + auxiliary_values(auxiliary, x, rows)

    def broken(logits: Tensor, rows: Tensor) -> Tensor:
        return is_adversarial(logits, labels[rows], targeted)

    done = torch.zeros_like(labels, dtype=torch.bool)
    if stop_on_success:
        with torch.no_grad():
            done = is_adversarial(model(inputs), labels, targeted)
    runs = [objective] * restarts
    return _strongest(model, inputs, runs, broken, done, eps, norm, steps, stop_on_success, generator)


def apgd_t(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    stop_on_success: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run :func:`apgd` towards each of the likeliest wrong classes in turn.

    It maximises the targeted DLR loss:  the target class's logit minus the true class's, divided by
    the largest logit minus the mean of the third and fourth largest. It needs four classes; with
    fewer it is the numerator alone. A sample counts as broken when *any* wrong class is predicted.
    Without ``stop_on_success`` the runs of all targets compete by this loss.

    Differences from the authors' code: those of :func:`apgd`.

    Args:
        model, inputs, eps, norm, steps, stop_on_success, generator: as for :func:`apgd`.
        labels: int64 [N], true classes.
        restarts: runs for each target.
        targets: number of target classes: the wrong classes of the highest logits of the clean
            image, or all wrong classes if the model has fewer.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    if not len(inputs):
        return inputs.clone()

    with torch.no_grad():
        logits = model(inputs)
    aims = likeliest_others(logits, labels, targets)

    def towards(aim: Tensor) -> _Objective:
        return lambda logits, x, rows: _targeted_dlr(logits, lead(logits, labels[rows], aim[rows]))

    def broken(logits: Tensor, rows: Tensor) -> Tensor:
        return is_adversarial(logits, labels[rows], targeted=False)

    done = is_adversarial(logits, labels, targeted=False) & stop_on_success
    runs = [towards(aim) for aim in aims.unbind(dim=1) for _ in range(restarts)]
    return _strongest(model, inputs, runs, broken, done, eps, norm, steps, stop_on_success, generator)


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + _TINY)


def _targeted_dlr(logits: Tensor, numerator: Tensor) -> Tensor:
    if logits.shape[1] < 4:
        return numerator
    top = logits.topk(4, dim=1).values
    return numerator / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def _strongest(
    model: nn.Module,
    inputs: Tensor,
    runs: Sequence[_Objective],
    broken: Callable[[Tensor, Tensor], Tensor],
    done: Tensor,
    eps: float,
    norm: Norm,
    steps: int,
    stop_on_success: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the strongest iterate of all runs.

    Args:
        done: bool [N], True for the samples that take part in no run.
    """
    best, adversarial = inputs.clone(), done.clone()
    best_loss = torch.full_like(inputs[:, 0, 0, 0], -torch.inf)
    all_rows = torch.arange(len(inputs), device=inputs.device)
    for objective in runs:
        # Draw for the whole batch, so that a sample's start does not depend on which others remain.
        start = _start(inputs, eps, norm, generator)
        rows = all_rows[~adversarial] if stop_on_success else all_rows
        if not len(rows):
            break
        x, success, loss = _run(
            model, start[rows], inputs[rows], rows, objective, broken, eps, norm, steps, stop_on_success
        )
        better = stronger(success, loss, adversarial[rows], best_loss[rows])
        chosen = rows[better]
        best[chosen], adversarial[chosen], best_loss[chosen] = x[better], success[better], loss[better]
    return best


def _start(inputs: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    return project(inputs + eps * random_direction(inputs, norm, generator), inputs, eps, norm)


@dataclass
class _Ascent:
    """State of the samples that are still ascending; every field has one row per sample."""

    place: Tensor
    """Rows in the results of the run."""
    rows: Tensor
    """Rows in the batch."""
    clean: Tensor
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor
    """Number of steps since the last checkpoint that raised the loss."""
    halved: Tensor
    """Whether the last checkpoint halved the step size."""
    best_at_checkpoint: Tensor

    def keep(self, mask: Tensor) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[mask])

    def move(self, eps: float, norm: Norm, momentum: bool) -> None:
        step = per_sample(self.step_size) * steepest(self.gradient, norm)
        new = project(self.x + step, self.clean, eps, norm)
        if momentum:
            new = self.x + _MOMENTUM * (new - self.x) + (1 - _MOMENTUM) * (self.x - self.previous)
            new = project(new, self.clean, eps, norm)
        self.previous, self.x = self.x, new

    def learn(self, gradient: Tensor, loss: Tensor) -> None:
        self.rises = self.rises + (loss > self.loss)
        self.gradient, self.loss = gradient, loss
        improved = loss > self.best_loss
        self.best_x = torch.where(per_sample(improved), self.x, self.best_x)
        self.best_gradient = torch.where(per_sample(improved), gradient, self.best_gradient)
        self.best_loss = torch.where(improved, loss, self.best_loss)

    def check(self, interval: int) -> None:
        """Halve the step size and return to the best iterate where the ascent makes no progress."""
        stuck = ~self.halved & (self.best_loss <= self.best_at_checkpoint)
        self.halved = (self.rises <= _RHO * interval) | stuck
        self.best_at_checkpoint = self.best_loss
        self.step_size = torch.where(self.halved, self.step_size / 2, self.step_size)
        self.x = torch.where(per_sample(self.halved), self.best_x, self.x)
        self.gradient = torch.where(per_sample(self.halved), self.best_gradient, self.gradient)
        self.rises = torch.zeros_like(self.rises)


def _run(
    model: nn.Module,
    start: Tensor,
    clean: Tensor,
    rows: Tensor,
    objective: _Objective,
    broken: Callable[[Tensor, Tensor], Tensor],
    eps: float,
    norm: Norm,
    steps: int,
    stop_on_success: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one ascent.

    Returns:
        For each sample its strongest iterate [n,C,H,W], whether that is adversarial [n], and its
        loss [n].
    """
    result = start.clone()
    adversarial = torch.zeros_like(rows, dtype=torch.bool)
    highest = torch.full_like(start[:, 0, 0, 0], -torch.inf)
    state = _Ascent(
        place=torch.arange(len(start), device=start.device),
        rows=rows,
        clean=clean,
        x=start,
        previous=start,
        gradient=torch.zeros_like(start),
        loss=torch.full_like(highest, torch.inf),
        best_x=start,
        best_gradient=torch.zeros_like(start),
        best_loss=highest,
        step_size=torch.full_like(highest, 2 * eps),
        rises=torch.zeros_like(rows),
        halved=torch.ones_like(adversarial),
        best_at_checkpoint=highest,
    )
    checkpoints = _checkpoints(steps)
    for step in range(steps + 1):
        if step:
            state.move(eps, norm, momentum=step > 1)
        gradient, logits, loss = _evaluate(model, state, objective, differentiate=step < steps)
        state.learn(gradient, loss)

        success = broken(logits, state.rows)
        better = stronger(success, loss, adversarial[state.place], highest[state.place])
        place = state.place[better]
        result[place], adversarial[place], highest[place] = state.x[better], success[better], loss[better]
        if stop_on_success and success.any():
            state.keep(~success)
            if not len(state.rows):
                break
        if step in checkpoints:
            state.check(checkpoints[step])
    return result, adversarial, highest


def _evaluate(
    model: nn.Module, state: _Ascent, objective: _Objective, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = state.rows
    if differentiate:
        return loss_gradient(model, state.x, lambda logits, x: objective(logits, x, rows))
    with torch.no_grad():
        logits = model(state.x)
        return state.gradient, logits, objective(logits, state.x, rows)


def _checkpoints(steps: int) -> dict[int, int]:
    """Map the step number of each checkpoint to the number of steps since the previous one."""
    interval, reduction, shortest = (max(int(share * steps), 1) for share in (_FIRST, _REDUCTION, _SHORTEST))
    intervals = {}
    step = interval
    while step <= steps:
        intervals[step] = interval
        interval = max(interval - reduction, shortest)
        step += interval
    return intervals
