"""APGD: closed forms and checkpoints."""

from __future__ import annotations

import pytest
import torch
from attacked_models import broken, linear, near_grey, predict, seeded
from torch import Tensor, nn

from components.attacks.apgd import _checkpoints, apgd


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("early", [False, True])
def test_apgd_reaches_the_best_corner_of_a_linear_model(loss: str, early: bool) -> None:
    model = linear(2, scale=0.2)
    x = torch.rand(30, 1, 4, 4, generator=seeded(0))
    x[::3] = x[::3].round()
    y = predict(model, x)
    eps = 0.05
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 4, 4)
    corner = (x + eps * (1 - 2 * y).view(-1, 1, 1, 1) * weight.sign()).clamp(0, 1)
    out = apgd(model, x, y, eps=eps, steps=5, loss=loss, stop_on_success=early, generator=seeded(0))
    if early:
        assert torch.equal(broken(model, out, y), broken(model, corner, y))
    else:
        torch.testing.assert_close(out, corner, rtol=0, atol=1e-6)


def test_l2_apgd_reaches_the_best_point_of_a_linear_model() -> None:
    model, x = linear(2, scale=0.2), near_grey(30)
    y = predict(model, x)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 4, 4)
    best = x + 0.3 * (1 - 2 * y).view(-1, 1, 1, 1) * weight / weight.norm()
    out = apgd(model, x, y, eps=0.3, norm="l2", steps=40, generator=seeded(0))
    reached, possible = ((model(z) - model(x)).diff(dim=1).abs().detach() for z in (out, best))
    assert (reached / possible).min() > 0.999


def test_checkpoints_are_those_of_the_paper() -> None:
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(_checkpoints(3)) == [1, 2, 3]


def test_apgd_halves_its_step_where_it_oscillates() -> None:
    class Valley(nn.Module):
        """The score of class 1 peaks where every pixel is 0.6. Fixed steps would jump over it for ever."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.ones(len(x)), -(x - 0.6).abs().flatten(1).amax(dim=1)], dim=1)

    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.int64)
    out = apgd(Valley(), x, y, eps=0.3, steps=60, generator=seeded(0))
    assert (out - 0.6).abs().max() < 0.01
