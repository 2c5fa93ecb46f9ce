"""FAB-T, the targeted version of FAB that AutoAttack uses (https://arxiv.org/abs/2003.01690).

Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML
2020, https://arxiv.org/abs/1907.02044
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, is_adversarial, lead, loss_gradient, norms, random_direction
from components.attacks.projections import Norm, per_sample
from components.attacks.targets import likeliest_others

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # pull towards the clean image, overshoot, step back
_RESTART_RADIUS: dict[Norm, float] = {"linf": 0.3, "l2": 1.0}  # used before the first success (the authors' values)
_SMALL = 1e-8
_TINY = 1e-30


def fab_t(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    enough: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Find the adversarial example of the smallest norm on the way to each likely wrong class.

    A step linearises the boundary between the true class and the target class. It moves to this
    boundary (by the shortest way inside [0,1], and a little beyond) from the present point and from
    the clean image, and mixes the two results. Where the mixture is adversarial, it steps back
    towards the clean image. The result is the smallest of all iterates that are adversarial; any
    wrong class counts.

    Differences from the authors' code:

    - Every target is tried on every sample and the smallest norm wins. Theirs drops a sample at the
      first example within eps; see ``enough``.
    - Restarts begin within half the smallest norm found so far, as in the paper.
    - The two projections are written anew.

    Passes per target and restart: steps forward and backward, steps forward.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes.
        norm: the norm to minimise, linf or l2.
        steps: steps for each target and restart.
        restarts: runs for each target. The first starts from the clean image, the others from a
            random point near it.
        targets: number of target classes: the wrong classes of the highest logits of the clean
            image, or all wrong classes if the model has fewer.
        enough: a sample with an example of this norm or less is dropped from the remaining targets.
        generator: CPU generator of the restarts; with one restart FAB is deterministic.

    Returns:
        float32 [N,C,H,W]; the clean input where it is already misclassified or no example was
        found.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    best = inputs.clone()
    if not len(inputs):
        return best
    with torch.no_grad():
        logits = model(inputs)
    # No norm is below 0, so a misclassified sample keeps its clean input.
    best_norm = torch.where(is_adversarial(logits, labels, targeted=False), 0.0, torch.inf)
    for aims in likeliest_others(logits, labels, targets).unbind(dim=1):
        for restart in range(restarts):
            start = inputs
            if restart:
                radius = best_norm.clamp_max(_RESTART_RADIUS[norm]) / 2
                start = _nearby(inputs, radius, norm, generator)
            rows = (best_norm > enough).nonzero().squeeze(1)
            if not len(rows):
                return best
            examples, example_norms = _run(model, start[rows], inputs[rows], labels[rows], aims[rows], norm, steps)
            better = example_norms < best_norm[rows]
            best[rows[better]], best_norm[rows[better]] = examples[better], example_norms[better]
    return best


def _nearby(inputs: Tensor, radius: Tensor, norm: Norm, generator: torch.Generator | None) -> Tensor:
    return (inputs + per_sample(radius) * random_direction(inputs, norm, generator)).clamp_(0, 1)


def _run(
    model: nn.Module, start: Tensor, clean: Tensor, labels: Tensor, aims: Tensor, norm: Norm, steps: int
) -> tuple[Tensor, Tensor]:
    """Run FAB towards one target class per sample.

    Returns:
        For each sample its adversarial iterate of the smallest norm, and that norm; the clean image
        and inf where no iterate is adversarial.
    """
    x, best = start, clean
    best_norm = torch.full_like(clean[:, 0, 0, 0], torch.inf)
    for _ in range(steps):
        slope, _logits, value = loss_gradient(model, x, lambda logits, _: lead(logits, labels, aims))
        clean_value = value + (slope * (clean - x)).flatten(1).sum(dim=1)
        from_x = to_plane(x, slope, value, norm)
        from_clean = to_plane(clean, slope, clean_value, norm)
        x_length, clean_length = (norms(d, norm).clamp_min(_SMALL) for d in (from_x, from_clean))
        alpha = per_sample((x_length / (x_length + clean_length)).clamp_max(_ALPHA_MAX))
        x = ((x + _ETA * from_x) * (1 - alpha) + (clean + _ETA * from_clean) * alpha).clamp_(0, 1)
        with torch.no_grad():
            adversarial = is_adversarial(model(x), labels, targeted=False)
        norm_x = norms(x - clean, norm)
        better = adversarial & (norm_x < best_norm)
        best = torch.where(per_sample(better), x, best)
        best_norm = torch.where(better, norm_x, best_norm)
        x = torch.where(per_sample(adversarial), clean + _BETA * (x - clean), x)
    return best, best_norm


def to_plane(points: Tensor, slope: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """Return the shortest way inside [0,1] from each point to the zeros of a linear function.

    Args:
        points: float32 [N,C,H,W] in [0,1].
        slope: float32 [N,C,H,W], gradient of the function.
        value: float32 [N], the function at ``points``.
        norm: the norm that the way is shortest in.

    Returns:
        float32 [N,C,H,W], displacements. Where the function has no zero inside [0,1], they go as
        near to zero as possible.
    """
    # Along the optimal way every pixel moves against the function until it meets its bound. Its
    # speed is the same for all pixels (linf) or proportional to its slope (l2). The function's
    # change is then concave and piecewise linear in time. Newton's method from time 0 never passes
    # the root, and ends on it after as many steps as it enters pieces: a few.
    flat = points.flatten(1)
    size = slope.flatten(1).abs()
    scale = size.amax(dim=1, keepdim=True).clamp_min(_TINY)
    size = size / scale
    needed = value.abs()[:, None] / scale
    direction = -slope.flatten(1).sign() * value.sign()[:, None]
    room = torch.where(direction > 0, 1 - flat, flat).where(direction != 0, 0.0)
    speed = torch.ones_like(size) if norm == "linf" else size
    arrival, change_at_bound, rate = room / speed.clamp_min(_TINY), size * room, size * speed
    last, time = arrival.amax(dim=1, keepdim=True), torch.zeros_like(scale)
    free = arrival > time
    while True:
        remaining = needed - change_at_bound.masked_fill(free, 0).sum(dim=1, keepdim=True)
        total_rate = rate.where(free, 0).sum(dim=1, keepdim=True)
        # The quotient may be inf or NaN where no pixel moves, hence fmin. Time never runs back,
        # whatever the rounding, so that the loop ends.
        time = torch.fmin(remaining / total_rate.clamp_min(_TINY), last).maximum(time)
        still_free = arrival > time
        if torch.equal(still_free, free):
            return (direction * torch.minimum(time * speed, room)).view_as(points)
        free = still_free
