"""AutoAttack, its standard version.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, https://arxiv.org/abs/2003.01690
"""

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
    """Run APGD on the cross entropy, targeted APGD, targeted FAB and Square, one after the other.

    Each attack runs on the samples that the previous ones did not break. A sample is dropped as
    soon as it is broken, so the examples are meaningful only on this same model. Those of FAB count
    only within eps.

    Differences from the authors' code: those of the four attacks; FAB and APGD take ``steps``.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes.
        eps: largest norm of the perturbation, in [0,1] pixel units.
        norm: linf or l2.
        steps: steps of APGD, and for each target of targeted APGD and FAB.
        queries: queries of Square.
        generator: CPU generator of all four, so that every device gets the same draw.

    Returns:
        float32 [N,C,H,W]; the clean input where it is already misclassified or withstood all four.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    check_batch(inputs, labels)
    result = inputs.clone()
    if not len(inputs):
        return result

    def fab_within_eps(x: Tensor, y: Tensor) -> Tensor:
        examples = fab_t(model, x, y, norm=norm, steps=steps, enough=eps, generator=generator)
        return torch.where(per_sample(norms(examples - x, norm) <= eps), examples, x)

    # This is the authors' order: a robust sample costs more in each attack than in the one before.
    # benchmarks/README.md compares other orders.
    attacks: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda x, y: apgd(model, x, y, eps=eps, norm=norm, steps=steps, stop_on_success=True, generator=generator),
        lambda x, y: apgd_t(model, x, y, eps=eps, norm=norm, steps=steps, stop_on_success=True, generator=generator),
        fab_within_eps,
        lambda x, y: square(model, x, y, eps=eps, norm=norm, queries=queries, rescale=False, generator=generator),
    )
    with torch.no_grad():
        remaining = (~is_adversarial(model(inputs), labels, targeted=False)).nonzero().squeeze(1)
        for attack in attacks:
            if not len(remaining):
                break
            # Pass the whole batch so that a sample's random draws do not depend on which others
            # remain. Samples that are already broken start at their adversarial example and are
            # dropped at once.
            x = attack(result, labels)[remaining]
            broken = is_adversarial(model(x), labels[remaining], targeted=False)
            result[remaining[broken]] = x[broken]
            remaining = remaining[~broken]
    return result


def gradient_parts(spec: AttackSpec) -> tuple[AttackSpec, ...]:
    """Split an ``autoattack`` spec into its attacks without Square, each with the same settings."""
    return (
        AttackSpec(name="apgd", eps=spec.eps, norm=spec.norm, steps=spec.steps),
        AttackSpec(name="apgd-t", eps=spec.eps, norm=spec.norm, steps=spec.steps),
        AttackSpec(name="fab-t", norm=spec.norm, steps=spec.steps),
    )
