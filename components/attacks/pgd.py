"""PGD, projected gradient descent.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
https://arxiv.org/abs/1706.06083
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.bim import ascend
from components.attacks.common import Auxiliary, auxiliary_values, check_batch, is_adversarial, stronger
from components.attacks.projections import Norm, per_sample, project, unit_l2


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    step_size: float = 0.0,
    restarts: int = 1,
    targeted: bool = False,
    stop_on_success: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run :func:`~components.attacks.bim.bim` from a random point of the eps-ball.

    The point is drawn uniformly and clipped to [0,1]. With several restarts the strongest of their
    results is returned, sample by sample: an adversarial one before any that is not, then the one
    of the highest loss (cross entropy, plus ``auxiliary``). Judging each result costs one more
    forward pass.

    Args:
        model, inputs, labels, eps, norm, steps, step_size, targeted, auxiliary: as for BIM.
        restarts: number of runs, each from its own random start.
        stop_on_success: as for BIM; a sample that one run broke is also dropped from the next runs.
        generator: CPU generator of the starts, so that every device gets the same draw.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range, or an auxiliary that does
            not return [n].
    """
    check_batch(inputs, labels)

    def run(start: Tensor, clean: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
        return ascend(
            model,
            start,
            clean,
            classes,
            eps=eps,
            norm=norm,
            steps=steps,
            step_size=step_size,
            targeted=targeted,
            stop_on_success=stop_on_success,
            auxiliary=auxiliary,
            rows=rows,
        )

    def strength(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(x)
            loss = F.cross_entropy(logits, labels[rows], reduction="none")
            loss = -loss if targeted else loss
            if auxiliary is not None:
                loss = loss + auxiliary_values(auxiliary, x, rows)
        return is_adversarial(logits, labels[rows], targeted), loss

    all_rows = torch.arange(len(inputs), device=inputs.device)
    best = run(random_start(inputs, eps, norm, generator), inputs, labels, all_rows)
    if restarts == 1 or not len(inputs):
        return best
    broken, best_loss = strength(best, all_rows)
    for _ in range(restarts - 1):
        # Draw for the whole batch, so that a sample's start does not depend on which others remain.
        start = random_start(inputs, eps, norm, generator)
        rows = all_rows[~broken] if stop_on_success else all_rows
        if not len(rows):
            break
        x = run(start[rows], inputs[rows], labels[rows], rows)
        adversarial, loss = strength(x, rows)
        better = stronger(adversarial, loss, broken[rows], best_loss[rows])
        chosen = rows[better]
        best[chosen], broken[chosen], best_loss[chosen] = x[better], adversarial[better], loss[better]
    return best


def random_start(inputs: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """Draw a point of the eps-ball around each input, uniform before clipping to [0,1]."""
    if norm == "linf":
        offset = torch.rand(inputs.shape, generator=generator).mul_(2).sub_(1)
    else:
        direction = unit_l2(torch.randn(inputs.shape, generator=generator))
        # The volume within radius r grows as r^dimensions.
        radius = torch.rand(len(inputs), generator=generator).pow_(1 / max(inputs[:1].numel(), 1))
        offset = direction * per_sample(radius)
    return project(inputs + eps * offset.to(inputs.device), inputs, eps, norm)
