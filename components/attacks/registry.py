"""From a spec to the attack that it names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.attacks.bim import bim
from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.fgsm import fgsm
from components.attacks.noise import noise
from components.attacks.pgd import pgd
from components.attacks.spec import AttackSpec
from components.errors import ConfigError

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "fgsm": fgsm,
    "bim": bim,
    "pgd": pgd,
    "cw": cw,
    "ddn": ddn,
}


def run_attack(
    spec: AttackSpec,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    early_leaving: bool = False,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run the attack that ``spec`` names, with its settings.

    Args:
        model: maps [0,1] images to logits; put it into eval mode first. Neither its mode nor its ``.grad`` changes.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or the classes wanted if ``targeted``.
        early_leaving: see :func:`components.attacks.bim.bim`; only where examples are judged on ``model`` itself, and
            only for an attack whose ``spec.can_leave_early`` is true.
        generator: CPU generator; None takes torch's global one.

    Returns:
        A new float32 tensor [N,C,H,W].

    Raises:
        ConfigError: ``early_leaving`` with an attack that has no such thing.
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    if early_leaving and not spec.can_leave_early:
        raise ConfigError.of("early_leaving", True, f"{spec.name} has none (see AttackSpec.can_leave_early)")
    options = {"early_leaving": early_leaving} if spec.can_leave_early else {}
    return ATTACKS[spec.name](
        model, inputs, labels, targeted=targeted, generator=generator, **spec.settings(), **options
    )
