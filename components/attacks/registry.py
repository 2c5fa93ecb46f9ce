"""Table of the attacks, and the function that runs the one that a spec names."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.autoattack import autoattack
from components.attacks.bim import bim
from components.attacks.common import Auxiliary
from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.fab import fab_t
from components.attacks.fgsm import fgsm
from components.attacks.noise import noise
from components.attacks.pgd import pgd
from components.attacks.spec import AttackSpec
from components.attacks.square import square
from components.attacks.targets import Choice, choose_targets
from components.errors import ConfigError

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "fgsm": fgsm,
    "bim": bim,
    "pgd": pgd,
    "cw": cw,
    "ddn": ddn,
    "apgd": apgd,
    "apgd-t": apgd_t,
    "fab-t": fab_t,
    "square": square,
    "autoattack": autoattack,
    "adaptive": pgd,
}
_TAKE_AUXILIARY = ("bim", "pgd", "apgd", "adaptive")


def run_attack(
    spec: AttackSpec,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    stop_on_success: bool = False,
    targeted: bool = False,
    auxiliary: Auxiliary | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run the attack that ``spec`` names, with its settings.

    If ``spec.target`` is set, a target class is chosen for each sample first.

    Args:
        model: maps [0,1] images to logits. Put it into eval mode first; neither its mode nor any
            ``.grad`` changes.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, or target classes if ``targeted``.
        stop_on_success: see :func:`components.attacks.bim.bim`. Use it only where examples are judged
            on ``model`` itself, and only for an attack whose ``spec.can_stop_on_success`` is true.
        auxiliary: term that an adaptive attacker adds to the loss on the logits. "adaptive" needs
            it; bim, pgd and apgd accept it. Its values are added unscaled: the caller applies
            ``spec.objective`` and ``spec.weight``.
        generator: CPU generator; None takes torch's global one.

    Returns:
        A new float32 tensor [N,C,H,W].

    Raises:
        ConfigError: the attack does not support ``stop_on_success``, ``targeted`` or ``auxiliary``;
            "adaptive" has no auxiliary; or ``targeted`` is set although ``spec`` chooses targets
            itself.
        ValueError: inputs or labels of the wrong type, shape or range.
    """
    if stop_on_success and not spec.can_stop_on_success:
        raise ConfigError.of("stop_on_success", True, f"False for {spec.name} (see AttackSpec.can_stop_on_success)")
    if auxiliary is None and spec.name == "adaptive":
        raise ConfigError.of("auxiliary", None, "a function for adaptive: what the attacker knows of the defense")
    if auxiliary is not None and spec.name not in _TAKE_AUXILIARY:
        raise ConfigError.of("auxiliary", auxiliary, f"None for {spec.name}; {', '.join(_TAKE_AUXILIARY)} take one")
    if targeted and spec.target:
        raise ConfigError.of("targeted", True, f"False for {spec}, which chooses its targets from true classes")

    options: dict[str, object] = {}
    if spec.can_stop_on_success:
        options["stop_on_success"] = stop_on_success
    if auxiliary is not None:
        options["auxiliary"] = auxiliary
    if spec.target:
        labels = choose_targets(model, inputs, labels, cast(Choice, spec.target), generator)
        targeted = True
    if targeted:
        if not (spec.can_target or spec.name == "noise"):  # Noise ignores targets.
            raise ConfigError.of("targeted", True, f"False for {spec.name}, which cannot be told what to aim at")
        options["targeted"] = True
    return ATTACKS[spec.name](model, inputs, labels, generator=generator, **spec.settings(), **options)
