"""FAB: the way to a plane, closed forms, restarts and targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attacked_models import Counting, broken, distances, linear, near_grey, norm_of, predict, seeded
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from components.attacks.fab import fab_t, to_plane


def planes(n: int, pixels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points with pixels at 0 or 1, slopes of all sizes with some zeros, and values of either sign."""
    draw = seeded(seed)
    points = torch.rand(n, 1, 1, pixels, generator=draw).mul_(1.4).sub_(0.2).clamp_(0, 1)
    slopes = torch.randn(n, 1, 1, pixels, generator=draw) * 10.0 ** torch.randint(-3, 3, (n, 1, 1, 1), generator=draw)
    slopes[torch.rand(slopes.shape, generator=draw) < 0.1] = 0
    values = torch.randn(n, generator=draw) * slopes.flatten(1).abs().sum(dim=1) / 4
    return points, slopes, values


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_to_plane_takes_the_shortest_way_inside_the_box(norm: str) -> None:
    points, slopes, values = planes(60, 6, seed=0)
    steps = to_plane(points, slopes, values, norm)
    reached = 0
    for i in range(len(points)):
        x, w, v, d = (t[i].double().flatten().numpy() for t in (points, slopes, values, steps))
        v = float(v[0])
        scale = np.abs(w).max()
        assert ((x + d >= -1e-6) & (x + d <= 1 + 1e-6)).all()
        capacity = np.where(w * v > 0, x, 1 - x) @ np.abs(w)
        if capacity < abs(v):
            assert abs(np.abs(w @ d) - capacity) < 1e-5 * scale, "as far as the box allows"
            continue
        reached += 1
        assert abs(v + w @ d) < 1e-5 * scale
        bounds = [(-a, 1 - a) for a in x]
        if norm == "linf":
            rows = np.vstack([np.hstack([np.eye(6), -np.ones((6, 1))]), np.hstack([-np.eye(6), -np.ones((6, 1))])])
            best = linprog(
                np.r_[np.zeros(6), 1],
                rows,
                np.zeros(12),
                np.r_[w, 0][None] / scale,
                [-v / scale],
                bounds=[*bounds, (0, None)],
            ).fun
            assert np.abs(d).max() == pytest.approx(best, abs=1e-5)
        else:
            plane = {"type": "eq", "fun": lambda z, w=w, v=v, s=scale: (w @ z + v) / s}
            best = minimize(lambda z: z @ z, np.zeros(6), bounds=bounds, constraints=[plane], tol=1e-10)
            assert abs(plane["fun"](best.x)) < 1e-6
            assert np.sqrt(d @ d) == pytest.approx(np.sqrt(best.fun), abs=1e-4)
    assert 20 < reached < 60, "of no use unless some planes lie outside the box and some inside"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_to_plane_goes_nowhere_where_there_is_no_way(norm: str) -> None:
    points = torch.rand(3, 1, 4, 4, generator=seeded(0))
    slopes = torch.randn(3, 1, 4, 4, generator=seeded(1))
    slopes[1] = 0
    out = to_plane(points, slopes, torch.tensor([0.0, 1.0, 1e30]), norm)
    assert out.isfinite().all()
    assert (out[:2] == 0).all()
    corner = (points + out)[2]
    torch.testing.assert_close(corner, corner.round(), rtol=0, atol=1e-6)  # The plane is out of reach.


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("classes", [2, 5])
def test_fab_on_a_linear_model_finds_the_distance_to_the_boundary(norm: str, dual: float, classes: int) -> None:
    model, x = linear(classes), near_grey(60)
    y = predict(model, x)
    truth = distances(model, x, order=dual)
    keep = truth > (0.001 if norm == "linf" else 0.01)
    assert keep.sum() > 30
    out = fab_t(model, x, y, norm=norm, steps=20)
    assert broken(model, out, y)[torch.from_numpy(keep)].all()
    ratio = norm_of(out - x, norm)[keep] / truth[keep]
    assert ratio.min() > 1 - 1e-3
    assert ratio.max() < 1.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_on_a_linear_model_finds_the_nearest_point_inside_the_box(norm: str) -> None:
    model = linear(2)
    x = torch.rand(40, 1, 4, 4, generator=seeded(3)).mul_(3).sub_(1).clamp_(0, 1)  # Two of three pixels are 0 or 1.
    y = predict(model, x)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 1, 4, 4).expand_as(x)
    logits = model(x).detach()
    way = to_plane(x, weight, logits[:, 1] - logits[:, 0], norm)
    truth, free = norm_of(way, norm), distances(model, x, order=1 if norm == "linf" else 2)
    reachable = ((logits + (way * weight).flatten(1).sum(1)[:, None] * torch.tensor([-0.5, 0.5])).diff(dim=1)).abs()
    keep = (reachable.squeeze(1) < 1e-4).numpy() & (truth > 0.01)
    assert keep.sum() > 15
    assert np.median(truth[keep] / free[keep]) > 1.05, "of no use unless the box binds"
    out = fab_t(model, x, y, norm=norm, steps=60)
    assert broken(model, out, y)[torch.from_numpy(keep)].all()
    ratio = norm_of(out - x, norm)[keep] / truth[keep]
    assert ratio.min() > 1 - 1e-3
    assert np.median(ratio) < 1.01
    assert ratio.max() < 1.06


def test_fab_restarts_and_targets_never_lengthen(mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    x, y = x[:30], y[:30]

    def smallest_norms(**options: int) -> np.ndarray:
        out = fab_t(model, x, y, norm="l2", steps=10, generator=seeded(0), **options)
        return np.where(broken(model, out, y).numpy(), norm_of(out - x, "l2"), np.inf)

    one_target = smallest_norms(targets=1)
    assert (smallest_norms(targets=4) <= one_target + 1e-6).all()
    assert (smallest_norms(targets=1, restarts=3) <= one_target + 1e-6).all()
    assert (smallest_norms(targets=4) < one_target - 1e-3).any()


def test_fab_goes_to_no_further_target_when_it_has_enough(mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, inner = mnist
    passes = {}
    for enough in (0.0, 0.05):
        model = Counting(inner)
        out = fab_t(model, x, y, steps=5, targets=3, enough=enough)
        passes[enough] = model.with_gradient
        norms = norm_of(out - x, "linf")[broken(inner, out, y).numpy()]
        assert np.median(norms) < 0.1
    assert set(passes[0.0]) == {len(x)}
    assert passes[0.05][:5] == [len(x)] * 5
    assert passes[0.05][-1] < len(x)
