"""FAB: Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020,
https://arxiv.org/abs/1907.02044; the targeted version is that of AutoAttack, https://arxiv.org/abs/2003.01690"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, is_adversarial, lead, loss_gradient, norms, random_direction
from components.attacks.projections import Norm, per_sample
from components.attacks.targets import likeliest_others

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9  # pull towards the clean image, overshoot, step back
_RESTART_RADIUS: dict[Norm, float] = {"linf": 0.3, "l2": 1.0}  # where nothing was found yet (the authors' values)
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
    """The adversarial example of the smallest norm among all iterates, on the way to each of the likeliest wrong classes.

    A step takes the boundary between the true class and the one aimed at for flat, moves to it (by the shortest way
    inside [0,1], and a little beyond) from the present point and from the clean image, and mixes the two. Where that is
    adversarial it steps back towards the clean image. Any wrong class counts.
    Differences from the authors' code: every target is tried on every sample and the smallest norm wins (theirs leaves a
    sample at the first example within eps; see ``enough``); restarts begin within half the smallest norm found so far,
    as in the paper; the two projections are written anew.
    Passes per target and restart: steps forward and backward, steps forward.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes.
        norm: which norm is to be small, linf or l2.
        steps: steps for each target and restart.
        restarts: runs for each target: the first from the clean image, the others from a random point near it.
        targets: how many classes are aimed at, those of the highest logits of the clean image without the true one; all
            of them where the model has fewer.
        enough: a sample with an example of this norm or less is not taken to further targets.
        generator: CPU generator of the restarts; with one restart FAB is deterministic.

    Returns:
        float32 [N,C,H,W]; the clean input where it is misclassified already or nothing was found.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    best = inputs.clone()
    if not len(inputs):
        return best
    with torch.no_grad():
        logits = model(inputs)
    # norm 0 cannot be beaten, so these keep their clean input
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
            found, found_norm = _run(model, start[rows], inputs[rows], labels[rows], aims[rows], norm, steps)
            better = found_norm < best_norm[rows]
            best[rows[better]], best_norm[rows[better]] = found[better], found_norm[better]
    return best


def _nearby(inputs: Tensor, radius: Tensor, norm: Norm, generator: torch.Generator | None) -> Tensor:
    return (inputs + per_sample(radius) * random_direction(inputs, norm, generator)).clamp_(0, 1)


def _run(
    model: nn.Module, start: Tensor, clean: Tensor, labels: Tensor, aims: Tensor, norm: Norm, steps: int
) -> tuple[Tensor, Tensor]:
    """Of each sample the adversarial iterate of the smallest norm, and that norm; the clean image and inf if none."""
    x, best = start, clean
    best_norm = torch.full_like(clean[:, 0, 0, 0], torch.inf)
    for _ in range(steps):
        slope, _logits, here = loss_gradient(model, x, lambda logits, _: lead(logits, labels, aims))
        at_clean = here + (slope * (clean - x)).flatten(1).sum(dim=1)
        from_x = to_plane(x, slope, here, norm)
        from_clean = to_plane(clean, slope, at_clean, norm)
        far, near = (norms(d, norm).clamp_min(_SMALL) for d in (from_x, from_clean))
        alpha = per_sample((far / (far + near)).clamp_max(_ALPHA_MAX))
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
    """The shortest way from each point to where a linear function is zero, without leaving [0,1].

    Args:
        points: float32 [N,C,H,W] in [0,1].
        slope: float32 [N,C,H,W], gradient of the function.
        value: float32 [N], the function at ``points``.
        norm: the norm in which the way is short.

    Returns:
        float32 [N,C,H,W], displacements. Where the function has no zero inside [0,1], as far as it goes.
    """
    # Along the optimal way every pixel moves against the function at a speed of its own (linf: all alike, l2: as its
    # slope) until it meets its wall; what is gained is then a concave, piecewise linear function of the time taken.
    # Newton's method from time 0 never passes its root and ends on it, after as many pieces as it enters: a handful.
    flat = points.flatten(1)
    size = slope.flatten(1).abs()
    scale = size.amax(dim=1, keepdim=True).clamp_min(_TINY)
    size = size / scale
    needed = value.abs()[:, None] / scale
    direction = -slope.flatten(1).sign() * value.sign()[:, None]
    room = torch.where(direction > 0, 1 - flat, flat).where(direction != 0, 0.0)
    speed = torch.ones_like(size) if norm == "linf" else size
    until, at_wall, rate = room / speed.clamp_min(_TINY), size * room, size * speed
    last, time = until.amax(dim=1, keepdim=True), torch.zeros_like(scale)
    free = until > time
    while True:
        needs = needed - at_wall.masked_fill(free, 0).sum(dim=1, keepdim=True)
        moving = rate.where(free, 0).sum(dim=1, keepdim=True)
        # fmin: where nothing moves the quotient may be inf or NaN; never back, whatever rounding says, so that it ends
        time = torch.fmin(needs / moving.clamp_min(_TINY), last).maximum(time)
        still = until > time
        if torch.equal(still, free):
            return (direction * torch.minimum(time * speed, room)).view_as(points)
        free = still
