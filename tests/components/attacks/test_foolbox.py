"""Our attacks beside those of Foolbox."""

from __future__ import annotations

import numpy as np
import pytest
from attacked_models import norm_of, predict
from torch import Tensor, nn

from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec


@pytest.mark.parametrize(
    ("text", "peer", "options", "targeted"),
    [
        ("fgsm:eps=0.1", "LinfFastGradientAttack", {}, False),
        ("fgsm:eps=0.6,norm=l2", "L2FastGradientAttack", {}, False),
        ("bim:eps=0.1,steps=12", "LinfBasicIterativeAttack", {"steps": 12, "abs_stepsize": 2.5 * 0.1 / 12}, False),
        ("bim:eps=0.1,steps=12", "LinfBasicIterativeAttack", {"steps": 12, "abs_stepsize": 2.5 * 0.1 / 12}, True),
        (
            "bim:eps=0.6,norm=l2,steps=12",
            "L2BasicIterativeAttack",
            {"steps": 12, "abs_stepsize": 2.5 * 0.6 / 12},
            False,
        ),
        ("bim:eps=0.6,norm=l2,steps=12", "L2BasicIterativeAttack", {"steps": 12, "abs_stepsize": 2.5 * 0.6 / 12}, True),
    ],
)
def test_budget_attacks_agree_with_foolbox(
    text: str,
    peer: str,
    options: dict[str, float],
    targeted: bool,
    blobs: tuple[Tensor, Tensor, list[nn.Module]],
) -> None:
    fb = pytest.importorskip("foolbox")
    x, y, (model, _) = blobs
    x, y, spec = x[:60], y[:60], AttackSpec.parse(text)
    labels = (y + 1) % 4 if targeted else y
    criterion = (fb.criteria.TargetedMisclassification if targeted else fb.criteria.Misclassification)(labels)
    attack = getattr(fb.attacks, peer)(**options)
    peer_examples = attack.run(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, criterion, epsilon=spec.eps)
    ours = run_attack(spec, model, x, labels, targeted=targeted)
    assert (ours != x).any()
    # Rounding rarely flips the sign of a gradient close to zero.
    assert ((ours - peer_examples).abs() < 1e-5).double().mean() > 0.995
    assert ((predict(model, ours) == labels) == (predict(model, peer_examples) == labels)).double().mean() > 0.98


def test_ddn_agrees_with_foolbox(blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    fb = pytest.importorskip("foolbox")
    x, y, (model, _) = blobs
    x, y = x[:60], y[:60]
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    peer_examples = fb.attacks.DDNAttack(steps=60).run(wrapped, x, fb.criteria.Misclassification(y))
    ours = ddn(model, x, y, steps=60)
    assert (predict(model, ours) != y).sum() >= (predict(model, peer_examples) != y).sum()
    norms = [norm_of(out - x, "l2") for out in (ours, peer_examples)]
    assert np.isclose(*norms, rtol=2e-3).mean() > 0.7, "the same schedule, so the same norms but for our last iterate"


@pytest.mark.slow
def test_cw_agrees_with_foolbox(blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    fb = pytest.importorskip("foolbox")
    x, y, (model, _) = blobs
    x, y = x[:60], y[:60]
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=8, steps=40, stepsize=0.05, initial_const=1.0, abort_early=False
    )
    peer_examples = attack.run(wrapped, x, fb.criteria.Misclassification(y))
    ours = cw(model, x, y, binary_search_steps=8, steps=40, lr=0.05, initial_const=1.0)
    succeeded = peer_examples.flatten(1).any(dim=1)  # If Foolbox fails, it returns a black image.
    assert succeeded.sum() > 50
    assert (predict(model, ours) != y)[succeeded].all()
    norms = [norm_of((out - x)[succeeded], "l2") for out in (ours, peer_examples)]
    ratio = norms[0] / norms[1]
    assert np.isclose(ratio, 1, rtol=2e-3).mean() > 0.8, "the same search, so the same norms but for our last iterates"
    assert np.quantile(ratio, 0.95) < 1.002, "which only make it better"
