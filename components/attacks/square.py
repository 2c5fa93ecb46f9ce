"""Square Attack.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search", ECCV 2020, https://arxiv.org/abs/1912.00049
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, is_adversarial, margin
from components.attacks.projections import Norm, l2_norms, per_sample, project, unit_l2

_FIRST_SHARE = 0.8  # share of the image that the first square covers
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULED_QUERIES = 10_000
_TINY = 1e-12


def square(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    queries: int = 5000,
    rescale: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Search at random by scores alone: change a square, and keep the change if the margin shrinks.

    No gradient is computed. Linf starts from vertical stripes and sets squares to +-eps; l2 starts
    from a tiling of bumps and moves the norm of one window to another. Squares shrink on the
    authors' schedule. Place and shape of a square are one draw for the whole batch, as in the
    authors' code, so that those of a sample do not depend on which others remain. A sample is
    always dropped once it is broken: the examples are meaningful only on this same model.

    Differences from the authors' code:

    - Squares can touch the lower and right edges (theirs never do, the paper's do).
    - Images of fewer than 5 pixels a side, or not square, are tiled too.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes.
        eps: largest norm of the perturbation, in [0,1] pixel units.
        norm: linf or l2.
        queries: largest number of forward passes for a sample, without that of its clean image.
        rescale: compress the schedule, made for 10,000 queries, to ``queries``. False: follow the
            beginning of the schedule, as AutoAttack does.
        generator: CPU generator, so that every device gets the same draw.

    Returns:
        float32 [N,C,H,W]; the clean input where it is already misclassified, the last accepted
        change where no adversarial example was found.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    result = inputs.clone()
    if not len(inputs):
        return result
    height, width = inputs.shape[2:]
    with torch.no_grad():
        active = (~is_adversarial(model(inputs), labels, targeted=False)).nonzero().squeeze(1)
        start = _stripes(inputs, eps, generator) if norm == "linf" else _bumps(inputs, eps, generator)
        clean, x, classes = inputs[active], start[active], labels[active]
        score = torch.full_like(clean[:, 0, 0, 0], -math.inf)
        for query in range(queries):
            if not len(active):
                return result
            proposal = x
            if query:
                share = _share(query - 1, queries if rescale else _SCHEDULED_QUERIES)
                side = min(max(round(math.sqrt(share * height * width)), 1 if norm == "linf" else 3), height, width)
                if norm == "linf":
                    proposal = _with_square(x, clean, side, eps, generator)
                else:
                    side = min(side + 1 - side % 2, height, width)
                    signs = _signs((len(inputs), inputs.shape[1], 1, 1), generator).to(inputs.device)
                    proposal = _with_bump(x, clean, signs[active], side, eps, generator)
            logits = model(proposal)
            margins, broken = margin(logits, classes), is_adversarial(logits, classes, targeted=False)
            better = (margins > score) | broken
            x = torch.where(per_sample(better), proposal, x)
            score = torch.where(better, margins, score)
            if broken.any():
                result[active[broken]] = x[broken]
                active, clean, x, classes, score = (t[~broken] for t in (active, clean, x, classes, score))
        result[active] = x
    return result


def _share(step: int, queries: int) -> float:
    """Return the share of the image that the next square covers."""
    scheduled = int(step / queries * _SCHEDULED_QUERIES)
    halvings: int = sum(scheduled > after for after in _HALVED_AFTER)
    return _FIRST_SHARE * 0.5**halvings


def _signs(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).float()


def _window(x: Tensor, side: int, generator: torch.Generator | None) -> tuple[slice, slice, slice, slice]:
    """Draw the index of a random square window of images [N,C,H,W]."""
    top, left = (int(torch.randint(0, room - side + 1, (), generator=generator)) for room in x.shape[2:])
    return slice(None), slice(None), slice(top, top + side), slice(left, left + side)


def _stripes(inputs: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    n, channels, _, width = inputs.shape
    return project(inputs + eps * _signs((n, channels, 1, width), generator).to(inputs.device), inputs, eps, "linf")


def _with_square(x: Tensor, clean: Tensor, side: int, eps: float, generator: torch.Generator | None) -> Tensor:
    window = _window(x, side, generator)
    signs = _signs((1, x.shape[1], 1, 1), generator).to(x.device)
    proposal = x.clone()
    proposal[window] += 2 * eps * signs  # This goes beyond the ball's end from any point in it; project brings it back.
    return project(proposal, clean, eps, "linf")


def _bumps(inputs: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
    n, channels, height, width = inputs.shape
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros(inputs.shape)
    for top in range(height % side // 2, height - side + 1, side):
        for left in range(width % side // 2, width - side + 1, side):
            signs = _signs((n, channels, 1, 1), generator)
            delta[:, :, top : top + side, left : left + side] = _bump(side, _coin(generator)) * signs
    return project(inputs + eps * unit_l2(delta).to(inputs.device), inputs, eps, "l2")


def _with_bump(
    x: Tensor, clean: Tensor, signs: Tensor, side: int, eps: float, generator: torch.Generator | None
) -> Tensor:
    """Move the perturbation's norm from one window into a bump in another.

    The bump also takes up the part of eps that is unused.
    """
    goal, source = (_window(x, side, generator) for _ in range(2))
    delta = x - clean
    either = torch.zeros_like(delta[:1, :1])
    either[goal] = either[source] = 1
    unused = (eps**2 - l2_norms(delta) ** 2).clamp_min(0)
    budget = per_sample(unused) / x.shape[1] + _channel_norms(delta * either) ** 2
    old = delta[goal]
    new = _bump(side, _coin(generator)).to(x.device) * signs + old / (_channel_norms(old) + _TINY)
    new = new / (_channel_norms(new) + _TINY) * budget.sqrt()
    delta[source] = 0
    delta[goal] = new
    return project(clean + eps * unit_l2(delta), clean, eps, "l2")


def _channel_norms(delta: Tensor) -> Tensor:
    channel_norms: Tensor = torch.linalg.vector_norm(delta, dim=(2, 3), keepdim=True)
    return channel_norms


def _coin(generator: torch.Generator | None) -> bool:
    return bool(torch.randint(0, 2, (), generator=generator))


@functools.cache
def _bump(side: int, transposed: bool) -> Tensor:
    """Return a bump [side,side] of L2 norm 1: a peak above a trough.

    If ``transposed``, the peak is beside the trough.
    """
    upper = side // 2
    bump = torch.cat([_peak(upper, side), -_peak(side - upper, side)])
    bump /= torch.linalg.vector_norm(bump)
    return bump.T.contiguous() if transposed else bump


def _peak(height: int, width: int) -> Tensor:
    """Return a peak [height,width] of L2 norm 1.

    Concentric squares add 1, 1/4, 1/9, ... from the innermost to the outermost.
    """
    if not height:
        return torch.zeros(0, width)
    rows, columns = (torch.arange(size) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    terms = 1 / (torch.arange(max(height, width) // 2 + 1) + 1.0) ** 2
    peak = terms.flip(0).cumsum(0).flip(0)[ring]
    unit_peak: Tensor = peak / torch.linalg.vector_norm(peak)
    return unit_peak
