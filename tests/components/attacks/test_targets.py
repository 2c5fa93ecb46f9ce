"""Targeted attacks."""

from __future__ import annotations

import pytest
import torch
from attacked_models import linear, near_grey, predict, seeded
from torch import Tensor, nn

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.attacks.targets import choose_targets
from components.evaluation.judge import verify_examples


def test_targets_are_wrong_classes_chosen_as_asked() -> None:
    model, x = linear(5), near_grey(400)
    y = torch.arange(400) % 5
    logits = model(x).detach()
    choose = {how: choose_targets(model, x, y, how, seeded(0)) for how in ("random", "least_likely", "runner_up")}
    for targets in choose.values():
        assert targets.dtype == torch.int64
        assert (targets != y).all()
    assert torch.equal(choose["runner_up"], logits.scatter(1, y[:, None], -torch.inf).argmax(1))
    assert torch.equal(choose["least_likely"], logits.scatter(1, y[:, None], torch.inf).argmin(1))
    counts = torch.zeros(5, 5).index_put((y, choose["random"]), torch.tensor(1.0), accumulate=True)
    assert (counts[~torch.eye(5, dtype=torch.bool)] > 8).all(), "each wrong class is as likely: 20 of 80"
    assert torch.equal(choose["random"], choose_targets(model, x, y, "random", seeded(0)))
    assert not torch.equal(choose["random"], choose_targets(model, x, y, "random", seeded(1)))


def test_no_target_without_a_second_class() -> None:
    with pytest.raises(ValueError, match="no wrong class"):
        choose_targets(linear(1), near_grey(2), torch.zeros(2, dtype=torch.int64), "random")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("fgsm:eps=0.15,target=runner_up", 0.6),
        ("bim:eps=0.4,steps=20,target=random", 0.8),
        ("pgd:eps=0.4,steps=20,restarts=2,target=least_likely", 0.4),
        ("cw:steps=30,target=random", 0.9),
        ("ddn:steps=40,target=least_likely", 0.7),
        ("apgd:eps=0.4,steps=20,target=random", 0.8),
        ("apgd:eps=0.4,steps=20,loss=dlr,target=least_likely", 0.35),
        ("apgd:eps=4,norm=l2,steps=20,target=runner_up", 0.9),
    ],
)
def test_targets_are_hit(text: str, share: float, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    x, y, spec = x[:30], y[:30], AttackSpec.parse(text)
    targets = choose_targets(model, x, y, spec.target, seeded(0))
    for early in {False, spec.can_stop_on_success}:
        out = run_attack(spec, model, x, y, stop_on_success=early, generator=seeded(0))
        verify_examples(x, out, range(30), spec)
        assert (predict(model, out) == targets).double().mean() >= share
