"""Square, the attack without gradients."""

from __future__ import annotations

import pytest
import torch
from attacked_models import Counting, broken, predict, seeded
from torch import Tensor, nn

from components.attacks import square as square_module
from components.attacks.bim import bim
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.attacks.square import square
from components.evaluation.judge import verify_examples


class Quantiser(nn.Module):
    """A network without gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner((x * 8).round() / 8)


@pytest.mark.parametrize(
    "text",
    [
        "fgsm:eps=0.1",
        "pgd:eps=0.1,steps=2,restarts=2",
        "apgd:eps=0.1,steps=3",
        "apgd-t:eps=0.1,steps=3,targets=2",
        "fab-t:steps=3,targets=2",
        "cw:steps=2,binary_search_steps=2",
        "ddn:steps=3",
        "autoattack:eps=0.1,steps=2,queries=2",
    ],
)
def test_a_network_without_a_gradient_stops_no_attack(text: str, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, inner = mnist
    spec = AttackSpec.parse(text)
    out = run_attack(spec, Quantiser(inner), x[:10], y[:10], generator=seeded(0))
    verify_examples(x[:10], out, range(10), spec)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 2.5)])
def test_square_needs_no_gradient(norm: str, eps: float, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, inner = mnist
    model = Counting(Quantiser(inner))
    x, y = x[:40], y[:40]
    # An attack that needs gradients finds no example here.
    assert torch.equal(bim(model, x, y, eps=eps, norm=norm, steps=1), x)
    model.with_gradient.clear()
    model.without.clear()
    correct = predict(model.inner, x) == y
    spec = AttackSpec(name="square", eps=eps, norm=norm, queries=300)
    out = run_attack(spec, model, x, y, generator=seeded(0))
    verify_examples(x, out, range(40), spec)
    assert not model.with_gradient
    assert model.without[0] == 40
    assert model.without[1] == correct.sum()
    assert model.without[-1] < correct.sum(), "broken samples are dropped"
    assert broken(model.inner, out, y).sum() > 30


def test_square_accepts_only_what_raises_the_margin(mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    margins = []
    for queries in (1, 10, 40):
        # The schedule begins the same for any number of queries.
        logits = model(square(model, x, y, eps=0.03, queries=queries, rescale=False, generator=seeded(0))).detach()
        own = logits.gather(1, y[:, None])
        margins.append((logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).squeeze(1))
    assert (margins[1] >= margins[0] - 1e-4).all()
    stood = margins[1] < 0
    assert (margins[2] >= margins[1] - 1e-4)[stood].all()
    assert margins[2].mean() > margins[0].mean() + 0.1


def test_squares_shrink_on_the_schedule_of_the_authors() -> None:
    share = square_module._share
    at = [0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999]
    halvings = [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert [share(i, 10_000) for i in at] == [0.8 / 2**k for k in halvings]
    assert [share(i // 10, 1000) for i in at[2:]] == [0.8 / 2**k for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_bumps_have_norm_one_a_peak_and_a_trough(side: int) -> None:
    bump = square_module._bump(side, False)
    assert bump.shape == (side, side)
    assert bump.norm().item() == pytest.approx(1, abs=1e-6)
    assert (bump[: side // 2] > 0).all()
    assert (bump[side // 2 :] < 0).all()
    assert torch.equal(square_module._bump(side, True), bump.T)
    if side == 5:
        # Computed by hand: rings of 1, 1/4 and 1/9 around the middle of 3 rows and 5 columns.
        ring = torch.tensor([[2, 1, 1, 1, 2], [2, 1, 0, 1, 2], [2, 1, 1, 1, 2]])
        peak = torch.tensor([1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9])[ring]
        torch.testing.assert_close(bump[2:] / bump[3, 2], peak / peak[1, 2])


def test_every_pixel_can_be_in_a_square() -> None:
    covered = torch.zeros(1, 1, 6, 7)
    generator = seeded(0)
    for _ in range(200):
        covered[square_module._window(covered, 2, generator)] = 1
    assert covered.all()
