"""Norms of perturbations and gradients of any size that float32 can hold, and the L2 attacks that follow them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from components.attacks.projections import l2_norms, steepest, unit_l2
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec

SIZES = (1e-42, 1e-38, 1e-34, 1e-24, 1e-20, 1.0, 1e18, 1e20, 1e36)


def images(n: int = 4, side: int = 28, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_is_right_at_every_size(size: float) -> None:
    x = (images().double() * size).float()  # Round to float32.
    expected = x.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(l2_norms(x).double(), expected, rtol=1e-5, atol=2e-45)
    unit = unit_l2(x)
    torch.testing.assert_close(
        unit.double().flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(unit.double(), x.double() / expected.view(-1, 1, 1, 1), rtol=1e-5, atol=1e-9)
    assert torch.equal(unit, steepest(x, "l2"))


def test_a_single_pixel_of_the_smallest_size_is_a_direction() -> None:
    x = torch.zeros(3, 1, 2, 2)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1e-45, -3e38
    assert torch.equal(l2_norms(x), x.flatten(1)[:, 0].abs())
    assert unit_l2(x).flatten(1)[:, 0].tolist() == [1, -1, 0]


@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.3, 1.0, 40.0])
def test_norms_of_ordinary_size_are_bit_for_bit_those_of_the_plain_sum(size: float) -> None:
    x = size * images()
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1)
    assert torch.equal(l2_norms(x), norms)
    assert torch.equal(unit_l2(x), x / norms.view(-1, 1, 1, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_alone(value: float) -> None:
    x = images(2)
    x[0, 0, 3, 3] = value
    assert not l2_norms(x)[0].isfinite()
    assert not unit_l2(x)[0].isfinite().all()
    assert torch.equal(unit_l2(x)[1], unit_l2(x[1:])[0])


class Confident(nn.Module):
    """Logits of four quadrants, scaled per image to a margin on the clean images. Decisions stay."""

    def __init__(self, clean: Tensor, margin: float) -> None:
        super().__init__()
        self.scale = torch.ones(len(clean), 1)
        if margin:
            top = self(clean).topk(2, dim=1).values
            self.scale = margin / (top[:, :1] - top[:, 1:])

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        quadrants = [x[:, 0, i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
        return self.scale * torch.stack([(4 * (q - 0.5)).tanh().mean(dim=(1, 2)) for q in quadrants], dim=1)


@pytest.mark.parametrize("margin", [55.0, 70.0, 80.0])
@pytest.mark.parametrize("attack", ["ddn:steps=60", "bim:eps=0.8,norm=l2,steps=20", "fgsm:eps=0.8,norm=l2"])
def test_an_l2_attack_is_as_strong_on_a_confident_network(attack: str, margin: float) -> None:
    clean = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = Confident(clean, 0)(clean).argmax(dim=1)
    broken, norms = {}, {}
    for case in (0.0, margin):
        model = Confident(clean, case)
        examples = run_attack(
            AttackSpec.parse(attack), model, clean, labels, generator=torch.Generator().manual_seed(0)
        )
        broken[case] = model(examples).argmax(dim=1) != labels
        norms[case] = (examples - clean).flatten(1).norm(dim=1).median().item()
    assert 0 < broken[0.0].sum() <= broken[margin].sum() + 1
    assert norms[margin] <= 1.05 * norms[0.0]
