"""Gradient attacks: closed forms, rules, random draws, passes, early leaving."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attacked_models import (
    GRADIENT_AND_NOISE,
    Counting,
    convnet,
    distances,
    linear,
    near_grey,
    norm_of,
    predict,
    seeded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from components.attacks.bim import bim
from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.fgsm import fgsm
from components.attacks.noise import noise
from components.attacks.pgd import pgd
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.errors import ConfigError
from components.evaluation.judge import verify_examples

GRADIENT_ATTACKS = tuple(text for text in GRADIENT_AND_NOISE if not text.startswith("noise"))
DETERMINISTIC = tuple(text for text in GRADIENT_ATTACKS if not text.startswith("pgd"))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(
    ("attack", "scale"),
    [
        # Cross entropy points at the nearest class only if the logits are far apart.
        pytest.param(lambda m, x, y: ddn(m, x, y, steps=200, initial_norm=0.1), 30, id="ddn"),
        pytest.param(lambda m, x, y: cw(m, x, y, steps=150, binary_search_steps=8, lr=0.01), 1, id="cw"),
    ],
)
def test_minimal_norm_on_a_linear_model_is_the_distance_to_the_boundary(
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor], scale: float, classes: int
) -> None:
    model, x = linear(classes, scale=scale), near_grey(60)
    y = predict(model, x)
    truth = distances(model, x, order=2)
    # A sample on the boundary has no meaningful relative error.
    off_boundary = truth > 0.01
    assert off_boundary.sum() > 30
    adversarial = attack(model, x, y)
    assert (predict(model, adversarial) != y)[torch.from_numpy(off_boundary)].all()
    ratio = norm_of(adversarial - x, "l2")[off_boundary] / truth[off_boundary]
    assert ratio.min() > 1 - 1e-3, "nothing adversarial is closer than the boundary"
    assert np.median(ratio) < 1.02
    assert np.quantile(ratio, 0.9) < 1.05


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(fgsm, id="fgsm"),
        pytest.param(lambda m, x, y, eps: bim(m, x, y, eps=eps, steps=10), id="bim"),
        pytest.param(lambda m, x, y, eps: pgd(m, x, y, eps=eps, steps=10, generator=seeded(0)), id="pgd"),
    ],
)
def test_linf_attacks_on_two_classes_succeed_exactly_beyond_the_distance(attack: Callable[..., Tensor]) -> None:
    model, x = linear(2), near_grey(12)
    y = predict(model, x)
    for i, distance in enumerate(distances(model, x, order=1)):
        image, label = x[i : i + 1], y[i : i + 1]
        assert predict(model, attack(model, image, label, eps=1.01 * distance)) != label
        assert predict(model, attack(model, image, label, eps=0.99 * distance)) == label


@pytest.mark.parametrize("attack", [fgsm, functools.partial(bim, steps=10)], ids=["fgsm", "bim"])
def test_l2_attacks_on_two_classes_succeed_exactly_beyond_the_distance(attack: Callable[..., Tensor]) -> None:
    model, x = linear(2), near_grey(12)
    y = predict(model, x)
    for i, distance in enumerate(distances(model, x, order=2)):
        image, label = x[i : i + 1], y[i : i + 1]
        for factor, succeeds in ((1.01, True), (0.99, False)):
            out = attack(model, image, label, eps=factor * distance, norm="l2")
            assert (predict(model, out) != label).item() == succeeds


def test_noise_of_the_same_norm_does_less_than_fgsm() -> None:
    model, x = linear(2, pixels=64), near_grey(200, side=8)
    y = predict(model, x)
    eps = float(np.quantile(distances(model, x, order=1), 0.8))
    broken_by_fgsm = (predict(model, fgsm(model, x, y, eps=eps)) != y).double().mean()
    broken_by_noise = (predict(model, noise(model, x, y, eps=eps, generator=seeded(0))) != y).double().mean()
    assert broken_by_fgsm > 0.75
    assert broken_by_noise < broken_by_fgsm - 0.3


def test_noise_has_exactly_the_norm_where_nothing_is_clipped() -> None:
    x, y = torch.full((20, 1, 8, 8), 0.5), torch.zeros(20, dtype=torch.int64)
    signs = noise(nn.Identity(), x, y, eps=0.125, generator=seeded(0)) - x
    assert set(signs.unique().tolist()) == {-0.125, 0.125}
    assert abs(signs.sign().mean()) < 0.1
    gaussian = noise(nn.Identity(), x, y, eps=0.3, norm="l2", generator=seeded(0)) - x
    np.testing.assert_allclose(norm_of(gaussian, "l2"), 0.3, rtol=1e-5)


@pytest.mark.parametrize(("value", "eps"), [(0.0, 1.5), (1.0, 0.5), (0.02, 1.5)])
def test_noise_keeps_its_length_at_a_wall(value: float, eps: float) -> None:
    """Clipping alone would leave noise on a digit's background a third shorter than its budget."""
    x, y = torch.full((20, 1, 28, 28), value), torch.zeros(20, dtype=torch.int64)
    spec = AttackSpec(name="noise", eps=eps, norm="l2")
    noisy = run_attack(spec, nn.Identity(), x, y, generator=seeded(0))
    verify_examples(x, noisy, range(20), spec)
    np.testing.assert_allclose(norm_of(noisy - x, "l2"), eps, rtol=0.01)


def test_pgd_starts_uniformly_in_the_ball() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(flat[1].weight)  # Without a gradient, the attack returns its start.
    x, y = torch.full((4000, 1, 1, 2), 0.5), torch.zeros(4000, dtype=torch.int64)
    linf = pgd(flat, x, y, eps=0.4, steps=1, generator=seeded(0)) - x
    np.testing.assert_allclose(linf.abs().mean(), 0.2, atol=0.01)
    np.testing.assert_allclose(linf.abs().max(), 0.4, atol=0.001)
    radius = norm_of(pgd(flat, x, y, eps=0.4, norm="l2", steps=1, generator=seeded(0)) - x, "l2")
    # In two dimensions the squared radius is uniform.
    np.testing.assert_allclose(((radius / 0.4) ** 2).mean(), 0.5, atol=0.02)
    assert radius.max() <= 0.4 * (1 + 1e-5)


def test_default_step_size_is_2_5_eps_over_steps() -> None:
    model, x = convnet(0), near_grey(6, side=8)
    y = predict(model, x)
    default = bim(model, x, y, eps=0.1, steps=8)
    torch.testing.assert_close(default, bim(model, x, y, eps=0.1, steps=8, step_size=2.5 * 0.1 / 8), rtol=0, atol=0)
    assert not torch.equal(default, bim(model, x, y, eps=0.1, steps=8, step_size=2 * 0.1 / 8))


some_convnet = functools.cache(convnet)


@settings(max_examples=80)
@given(
    text=st.sampled_from(
        [t.partition(":")[0] + (",norm=l2" if "norm=l2" in t else "") for t in GRADIENT_AND_NOISE[:-2]]
    ),
    eps=st.floats(1e-4, 3),
    seed=st.integers(0, 10_000),
    targeted=st.booleans(),
    black_and_white=st.booleans(),
    early=st.booleans(),
)
def test_budget_is_never_exceeded(
    text: str, eps: float, seed: int, targeted: bool, black_and_white: bool, early: bool
) -> None:
    name, _, norm = text.partition(",")
    steps = ",steps=4" if name in ("bim", "pgd") else ""
    eps = eps if norm else eps / 3  # Pixels are in [0,1].
    spec = AttackSpec.parse(f"{name}:eps={eps}{steps}{',' + norm if norm else ''}")
    x = torch.rand(5, 1, 8, 8, generator=seeded(seed))
    x = x.round() if black_and_white else x
    y = torch.randint(0, 4, (5,), generator=seeded(seed + 1))
    out = run_attack(
        spec,
        some_convnet(seed % 5),
        x,
        y,
        targeted=targeted,
        stop_on_success=early and spec.can_stop_on_success,
        generator=seeded(seed),
    )
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1
    limit = spec.eps + 1e-6 if spec.norm == "linf" else spec.eps * (1 + 1e-5)
    assert norm_of(out - x, spec.norm).max() <= limit


@pytest.mark.parametrize(
    ("text", "draws"),
    [
        *((text, text.startswith(("noise", "pgd", "ddn"))) for text in GRADIENT_AND_NOISE),
        ("apgd:eps=0.1,steps=2", True),
        ("apgd-t:eps=0.1,steps=2", True),
        ("adaptive:eps=0.1,steps=2", True),
        ("square:eps=0.1,queries=2", True),
        ("autoattack:eps=0.1,steps=2,queries=2", True),
        ("fab-t:steps=2", False),
        ("fab-t:steps=2,restarts=2", True),
        ("fgsm:eps=0.1,target=random", True),
        ("bim:eps=0.1,steps=2,target=least_likely", False),
        ("cw:steps=2,target=random", True),
    ],
)
def test_a_spec_says_whether_its_attack_draws(text: str, draws: bool) -> None:
    model, x, generator = linear(4), near_grey(6), seeded(0)
    spec, before = AttackSpec.parse(text), generator.get_state()
    auxiliary = (lambda now, rows: 0 * now.flatten(1).sum(dim=1)) if spec.name == "adaptive" else None
    run_attack(spec, model, x, predict(model, x), auxiliary=auxiliary, generator=generator)
    assert spec.draws == draws == (not torch.equal(generator.get_state(), before))


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_a_sample_does_not_depend_on_its_neighbours(text: str, blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    x, y, (model, _) = blobs
    spec = AttackSpec.parse(text)
    whole = run_attack(spec, model, x[:12], y[:12])
    parts = torch.cat([run_attack(spec, model, x[i : i + 5], y[i : i + 5]) for i in range(0, 12, 5)])[:12]
    # Another batch size is another order of summation, which may flip the sign of a gradient close to zero.
    assert ((whole - parts).abs() < 1e-4).double().mean() > 0.99


@pytest.mark.parametrize(
    ("text", "backward", "forward"),
    [
        ("noise:eps=0.1", 0, 0),
        ("fgsm:eps=0.1", 1, 0),
        ("bim:eps=0.1,steps=7", 7, 0),
        ("pgd:eps=0.1,steps=7", 7, 0),
        ("ddn:steps=9", 9, 1),
        ("cw:steps=4,binary_search_steps=3", 1 + 3 * 3, 3),
    ],
)
def test_no_pass_is_wasted(text: str, backward: int, forward: int) -> None:
    model = Counting(linear(3))
    run_attack(AttackSpec.parse(text), model, near_grey(6), torch.zeros(6, dtype=torch.int64))
    assert (len(model.with_gradient), len(model.without)) == (backward, forward)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text", ["noise:eps=0.1", "pgd:eps=0.1,steps=1"])
def test_a_gpu_draws_what_a_cpu_draws(text: str) -> None:
    model, x, y = linear(3), near_grey(6), torch.zeros(6, dtype=torch.int64)
    cpu = run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    gpu = run_attack(AttackSpec.parse(text), model.cuda(), x.cuda(), y.cuda(), generator=seeded(0))
    torch.testing.assert_close(gpu.cpu(), cpu)


@pytest.mark.parametrize(
    "text",
    [
        "fgsm:eps=0.3",
        "bim:eps=0.3,steps=10",
        "bim:eps=1.2,norm=l2,steps=10",
        "pgd:eps=0.3,steps=10",
        "cw:steps=40,lr=0.1",
        "ddn:steps=40",
    ],
)
def test_targeted_attacks_reach_the_target(text: str) -> None:
    model, x = linear(3), near_grey(20)
    target = (predict(model, x) + 1) % 3
    out = run_attack(AttackSpec.parse(text), model, x, target, targeted=True, generator=seeded(0))
    assert (predict(model, out) == target).all()


@pytest.mark.parametrize("text", ["cw:steps=150,binary_search_steps=8,lr=0.01", "ddn:steps=200,initial_norm=0.1"])
def test_targeted_minimal_norm_is_the_distance_to_the_target(text: str) -> None:
    model, x = linear(2), near_grey(30)
    truth = distances(model, x, order=2)
    keep = truth > 0.01
    assert keep.sum() > 15
    out = run_attack(AttackSpec.parse(text), model, x, 1 - predict(model, x), targeted=True)
    ratio = norm_of(out - x, "l2")[keep] / truth[keep]
    assert ratio.min() > 1 - 1e-3
    assert np.median(ratio) < 1.02


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stop_on_success_returns_the_first_adversarial_iterate(
    norm: str, blobs: tuple[Tensor, Tensor, list[nn.Module]]
) -> None:
    x, y, (model, _) = blobs
    x, y = x[:100], y[:100]
    eps = 0.1 if norm == "linf" else 0.5
    options = {"eps": eps, "norm": norm, "step_size": eps / 6}
    iterates = [x] + [bim(model, x, y, steps=k, **options) for k in range(1, 13)]
    broken = torch.stack([predict(model, iterate) != y for iterate in iterates])
    out = bim(model, x, y, steps=12, stop_on_success=True, **options)
    stopped = 0
    for i in range(len(x)):
        # The twelfth iterate is returned whether it is adversarial or not.
        first = int(broken[:, i].int().argmax()) if broken[:, i].any() else 12
        stopped += first < 12
        torch.testing.assert_close(out[i], iterates[first][i], rtol=0, atol=1e-5)
    assert 20 < stopped < 100, "the case is of no use unless some samples leave and some stay"


@pytest.mark.parametrize("attack", [bim, pgd])
def test_stop_on_success_breaks_no_fewer_and_costs_less(
    attack: Callable[..., Tensor], blobs: tuple[Tensor, Tensor, list[nn.Module]]
) -> None:
    x, y, (inner, _) = blobs
    passes, broken = {}, {}
    for early in (True, False):
        model = Counting(inner)
        out = attack(model, x, y, eps=0.1, steps=10, stop_on_success=early, generator=seeded(0))
        passes[early], broken[early] = sum(model.with_gradient), predict(inner, out) != y
    assert (broken[True] | ~broken[False]).all()
    assert passes[False] == 10 * len(x)
    assert passes[True] < 0.8 * passes[False]


def test_stop_on_success_stops_when_all_have_left() -> None:
    model = Counting(linear(2))
    x = near_grey(5)
    out = bim(model, x, 1 - predict(model.inner, x), eps=0.1, steps=10, stop_on_success=True)
    assert model.with_gradient == [5]
    assert torch.equal(out, x)


@pytest.mark.parametrize("text", ["noise:eps=0.1", "fgsm:eps=0.1", "cw", "ddn"])
def test_stop_on_success_is_refused_where_there_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="stop_on_success"):
        run_attack(AttackSpec.parse(text), linear(2), near_grey(1), torch.tensor([0]), stop_on_success=True)


def test_why_examples_for_another_model_must_not_leave_early(
    blobs: tuple[Tensor, Tensor, list[nn.Module]],
) -> None:
    x, y, (source, other) = blobs
    accuracy = {}
    for early in (True, False):
        out = bim(source, x, y, eps=0.15, steps=20, stop_on_success=early)
        accuracy[early] = (predict(other, out) == y).double().mean().item()
        assert (predict(source, out) == y).double().mean() < 0.05, "equally strong on the model they were made on"
    assert accuracy[True] > accuracy[False] + 0.2
