"""Attacks of minimal norm: C&W and DDN."""

from __future__ import annotations

import pytest
import torch
from attacked_models import linear, near_grey, predict, seeded
from torch import Tensor, nn

from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec


@pytest.mark.parametrize("text", ["cw:steps=8,binary_search_steps=3", "cw:steps=8,confidence=2", "ddn:steps=20"])
def test_misclassified_samples_come_back_untouched(text: str, blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    x, y, (model, _) = blobs
    wrong = y[:10].clone()
    wrong[::2] = (predict(model, x[:10])[::2] + 1) % 4
    out = run_attack(AttackSpec.parse(text), model, x[:10], wrong)
    assert torch.equal(out[::2], x[:10:2])
    assert (out[1::2] != x[1:10:2]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("text", ["cw:steps=5", "ddn:steps=5"])
def test_where_nothing_is_found_the_clean_input_comes_back(text: str) -> None:
    model = linear(2)
    with torch.no_grad():
        model[1].bias[0] += 1e4
    x = near_grey(5)
    assert torch.equal(run_attack(AttackSpec.parse(text), model, x, torch.zeros(5, dtype=torch.int64)), x)


@pytest.mark.parametrize("text", ["cw:steps=15", "ddn:steps=30", "ddn:steps=30,quantization_levels=256"])
def test_what_is_found_is_adversarial_in_a_fresh_pass(text: str, blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    x, y, (model, _) = blobs
    x = (x[:60] * 255).round() / 255
    out = run_attack(AttackSpec.parse(text), model, x, y[:60])
    moved = (out != x).flatten(1).any(dim=1)
    assert moved.sum() > 50
    assert (predict(model, out) != y[:60])[moved].all()
    if "quantization" in text:
        torch.testing.assert_close(out * 255, (out * 255).round(), rtol=0, atol=1e-4)


def test_cw_examples_have_the_confidence_asked_for(blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    x, y, (model, _) = blobs
    x, y = x[:30], y[:30]
    margins = {}
    for confidence in (0.0, 3.0):
        out = cw(model, x, y, steps=40, lr=0.1, confidence=confidence)
        succeeded = (out != x).flatten(1).any(dim=1)
        assert succeeded.sum() > 25
        logits = model(out).detach()[succeeded]
        own = logits.gather(1, y[succeeded, None]).squeeze(1)
        others = logits.scatter(1, y[succeeded, None], -torch.inf).amax(dim=1)
        margins[confidence] = others - own
    assert margins[3.0].min() >= 3 - 1e-4
    assert margins[0.0].median() < 1


def test_ddn_leaves_a_flat_start_by_chance_and_only_by_the_generator() -> None:
    class Plateau(nn.Module):
        """A network whose gradient is exactly zero within L1 distance 1 of the grey image."""

        def forward(self, x: Tensor) -> Tensor:
            outside = ((x - 0.5).abs().flatten(1).sum(dim=1) - 1).relu()
            return torch.stack([torch.full_like(outside, 0.1), 5 * outside], dim=1)

    x, y = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    out = ddn(Plateau(), x, y, steps=40, generator=seeded(0))
    assert (predict(Plateau(), out) == 1).all()
    assert torch.equal(out, ddn(Plateau(), x, y, steps=40, generator=seeded(0)))
    assert not torch.equal(out, ddn(Plateau(), x, y, steps=40, generator=seeded(1)))
