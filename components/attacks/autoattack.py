"""AutoAttack, its standard version: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.common import check_batch, is_adversarial, norms
from components.attacks.fab import fab_t
from components.attacks.projections import Norm, per_sample
from components.attacks.spec import AttackSpec
from components.attacks.square import square


def autoattack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 100,
    queries: int = 5000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """APGD on the cross entropy, targeted APGD, targeted FAB, Square, each on what the ones before it did not break.

    A sample leaves as soon as it is broken, so the examples make sense only on this very model. FAB's count only within
    eps. Differences from the authors' code: those of the four attacks; FAB and APGD take ``steps``.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes.
        eps: largest norm of the perturbation, in [0,1] pixel units.
        norm: linf or l2.
        steps: steps of APGD, and for each target of targeted APGD and FAB.
        queries: queries of Square.
        generator: CPU generator of all four; every device gets the same draw.

    Returns:
        float32 [N,C,H,W]; the clean input where it is misclassified already or withstood all four.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    result = inputs.clone()
    if not len(inputs):
        return result

    def fab_within_eps(x: Tensor, y: Tensor) -> Tensor:
        found = fab_t(model, x, y, norm=norm, steps=steps, enough=eps, generator=generator)
        return torch.where(per_sample(norms(found - x, norm) <= eps), found, x)

    # the authors' order: each costs a sample that withstands more than the one before (benchmarks/README.md compares others)
    attacks: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda x, y: apgd(model, x, y, eps=eps, norm=norm, steps=steps, early_leaving=True, generator=generator),
        lambda x, y: apgd_t(model, x, y, eps=eps, norm=norm, steps=steps, early_leaving=True, generator=generator),
        fab_within_eps,
        lambda x, y: square(model, x, y, eps=eps, norm=norm, queries=queries, rescale=False, generator=generator),
    )
    with torch.no_grad():
        left = (~is_adversarial(model(inputs), labels, targeted=False)).nonzero().squeeze(1)
        for attack in attacks:
            if not len(left):
                break
            # all of them, so that nobody's random draws depend on who is left; whoever is broken leaves at once by his example
            x = attack(result, labels)[left]
            broken = is_adversarial(model(x), labels[left], targeted=False)
            result[left[broken]] = x[broken]
            left = left[~broken]
    return result


def gradient_parts(spec: AttackSpec) -> tuple[AttackSpec, ...]:
    """All but the Square of an ``autoattack`` spec, each as an attack of its own with the same settings."""
    return (
        AttackSpec(name="apgd", eps=spec.eps, norm=spec.norm, steps=spec.steps),
        AttackSpec(name="apgd-t", eps=spec.eps, norm=spec.norm, steps=spec.steps),
        AttackSpec(name="fab-t", norm=spec.norm, steps=spec.steps),
    )
