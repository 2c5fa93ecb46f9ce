"""The cascade of AutoAttack."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from attacked_models import Counting, broken, linear, near_grey, predict, seeded
from torch import Tensor, nn

from components.attacks.apgd import apgd
from components.attacks.autoattack import autoattack
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.judge import verify_examples


class ByFirstPixel(nn.Module):
    """A network that predicts class 1 if the first pixel is above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        over = x[:, 0, 0, 0] - 0.5
        return torch.stack([-over, over], dim=1)


def test_each_attack_of_the_cascade_sees_only_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((8, 1, 2, 2), 0.45)
    x[:, 0, 0, 1] = torch.arange(8) / 10  # This pixel identifies the row.
    x[7, 0, 0, 0] = 0.55  # It is misclassified from the start.
    y = torch.zeros(8, dtype=torch.int64)
    module = importlib.import_module("components.attacks.autoattack")
    attacked_rows: dict[str, list[int]] = {}
    options: dict[str, dict[str, object]] = {}

    def stub(name: str, breaks: set[int], by: float = 0.1) -> Callable[..., Tensor]:
        def attack(model: nn.Module, inputs: Tensor, labels: Tensor, **arguments: object) -> Tensor:
            assert torch.equal(inputs[:, 0, 0, 1], x[:, 0, 0, 1]), "the whole chunk, in its order"
            assert torch.equal(labels, y)
            rows = (~broken(model, inputs, y)).nonzero().squeeze(1).tolist()
            attacked_rows[name], options[name] = rows, arguments
            out = inputs.clone()
            for row in rows:
                out[row, 0, 0, 0] += by if row in breaks else 0.01
            return out

        return attack

    monkeypatch.setattr(module, "apgd", stub("apgd", {1, 5}))
    monkeypatch.setattr(module, "apgd_t", stub("apgd_t", {2}))
    monkeypatch.setattr(module, "fab_t", stub("fab_t", {0}, by=0.3))  # The norm exceeds eps.
    monkeypatch.setattr(module, "square", stub("square", {4}))
    out = autoattack(ByFirstPixel(), x, y, eps=0.2, steps=7, queries=11)
    survivors = [0, 2, 3, 4, 6]
    assert attacked_rows == {
        "apgd": [0, 1, 2, 3, 4, 5, 6],
        "apgd_t": survivors,
        "fab_t": [0, 3, 4, 6],
        "square": [0, 3, 4, 6],
    }
    assert torch.equal(broken(ByFirstPixel(), out, y).nonzero().squeeze(1), torch.tensor([1, 2, 4, 5, 7]))
    for row in (0, 3, 6, 7):
        assert torch.equal(out[row], x[row]), "what withstood all comes back clean"
    assert [options[name].get("steps") for name in attacked_rows] == [7, 7, 7, None]
    assert options["square"]["queries"] == 11
    assert options["fab_t"]["enough"] == 0.2
    assert options["apgd"]["stop_on_success"] is options["apgd_t"]["stop_on_success"] is True


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.6)])
def test_autoattack_is_as_strong_as_its_first_attack_and_returns_examples_or_clean_images(
    norm: str, eps: float, mnist: tuple[Tensor, Tensor, nn.Module]
) -> None:
    x, y, model = mnist
    x, y = x[:30], y[:30]
    spec = AttackSpec(name="autoattack", eps=eps, norm=norm, steps=10, queries=30)
    out = run_attack(spec, model, x, y, generator=seeded(0))
    verify_examples(x, out, range(30), spec)
    fallen = broken(model, out, y)
    first = broken(model, apgd(model, x, y, eps=eps, norm=norm, steps=10, generator=seeded(0)), y)
    assert (fallen | ~first).all()
    assert 0 < fallen.sum() < 30
    assert torch.equal(out[~fallen], x[~fallen])


def test_autoattack_stops_when_all_are_broken() -> None:
    model, x = Counting(linear(3)), near_grey(5)
    out = autoattack(model, x, predict(model.inner, x), eps=0.3, steps=5, queries=10, generator=seeded(0))
    assert broken(model.inner, out, predict(model.inner, x)).all()
    assert len(model.with_gradient) <= 2
