"""Attacks against one another: restarts, early leaving."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attacked_models import Counting, broken, seeded
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.pgd import pgd
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.8)])
@pytest.mark.slow
def test_apgd_is_at_least_as_strong_as_pgd(norm: str, eps: float, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    options = {"eps": eps, "norm": norm, "steps": 20}
    counts = {
        "pgd": int(broken(model, pgd(model, x, y, **options, generator=seeded(0)), y).sum()),
        **{
            loss: int(broken(model, apgd(model, x, y, loss=loss, **options, generator=seeded(0)), y).sum())
            for loss in ("ce", "dlr")
        },
        "targeted": int(broken(model, apgd_t(model, x, y, **options, generator=seeded(0)), y).sum()),
    }
    assert 10 < counts["pgd"] < 90, "of no use unless some fall and some stand"
    assert counts["ce"] >= counts["pgd"] - 1
    assert counts["targeted"] >= counts["pgd"] - 1
    assert counts["dlr"] >= counts["pgd"] - 5


class Ledge(nn.Module):
    """Two logits whose gradients are zero unless the pixels sum to more than ``ledge``.

    Above the ledge, gradients lead from class 0 to class 1. Whether an attack succeeds depends only on
    its random start.
    """

    def __init__(self, ledge: float) -> None:
        super().__init__()
        self.ledge = ledge

    def forward(self, x: Tensor) -> Tensor:
        above = (x.flatten(1).sum(1) - self.ledge).clamp(min=0)
        return torch.stack([torch.ones_like(above), above], 1)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_restarts_are_never_weaker(attack: Callable[..., Tensor], early: bool) -> None:
    x, y = torch.full((100, 1, 10, 10), 0.5), torch.zeros(100, dtype=torch.int64)
    # The sum of a start's 100 offsets has a standard deviation of 0.1 * sqrt(100 / 3) = 0.58, so a third of
    # the starts is above the ledge.
    model = Ledge(50 + 0.4 * 0.58)
    options = {"eps": 0.1, "steps": 2, "stop_on_success": early}
    broken_by_one, broken_by_four = (
        broken(model, attack(model, x, y, restarts=restarts, **options, generator=seeded(0)), y) for restarts in (1, 4)
    )
    assert (broken_by_four | ~broken_by_one).all()
    # One start is expected to break a third of 100, four starts 1 - (2/3)**4, which is four fifths. 15 either
    # way is three deviations.
    assert int(broken_by_one.sum()) == pytest.approx(34, abs=15)
    assert int(broken_by_four.sum()) == pytest.approx(81, abs=15)


def test_of_several_restarts_the_highest_loss_is_returned(mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    x, y = x[:40], y[:40]
    options = {"eps": 0.05, "steps": 4}
    generator = seeded(0)
    runs = torch.stack([pgd(model, x, y, **options, generator=generator) for _ in range(3)])
    out = pgd(model, x, y, restarts=3, **options, generator=seeded(0))
    rank = []
    for run in runs:
        logits = model(run).detach()
        loss = nn.functional.cross_entropy(logits, y, reduction="none")
        rank.append(loss + 1000 * (logits.argmax(1) != y))
    best_run = torch.stack(rank).argmax(0)
    torch.testing.assert_close(out, runs[best_run, torch.arange(40)], rtol=0, atol=1e-6)
    assert len(best_run.unique()) == 3


@pytest.mark.parametrize("text", ["pgd:restarts=3", "apgd:restarts=2", "apgd-t:targets=3"])
def test_stop_on_success_breaks_no_fewer_and_costs_less(text: str, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, inner = mnist
    spec = AttackSpec.parse(f"{text},eps=0.06,steps=10")
    passes, fallen = {}, {}
    for early in (True, False):
        model = Counting(inner)
        out = run_attack(spec, model, x, y, stop_on_success=early, generator=seeded(0))
        passes[early], fallen[early] = sum(model.with_gradient), broken(inner, out, y)
    assert (fallen[True] | ~fallen[False]).all()
    assert passes[True] < 0.8 * passes[False]
