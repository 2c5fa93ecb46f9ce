"""Attacks against closed forms, against their contract and against Foolbox."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attacked_models import Counting, convnet, distances, linear, near_grey, norm_of, predict, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from components.attacks.bim import bim
from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.fgsm import fgsm
from components.attacks.noise import noise
from components.attacks.pgd import pgd
from components.attacks.registry import ATTACKS, run_attack
from components.attacks.spec import ATTACK_NAMES, AttackSpec
from components.errors import ConfigError
from components.evaluation.judge import verify_examples
from components.fields import from_dict, to_dict

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_OF_EACH = (
    "noise:eps=0.1",
    "noise:eps=0.5,norm=l2",
    "fgsm:eps=0.1",
    "bim:eps=0.1,steps=5",
    "bim:eps=0.5,norm=l2,steps=5",
    "pgd:eps=0.1,steps=5",
    "pgd:eps=0.5,norm=l2,steps=5",
    "cw:steps=5,binary_search_steps=2",
    "ddn:steps=8",
)
GRADIENT_ATTACKS = tuple(text for text in ONE_OF_EACH if not text.startswith("noise"))
DETERMINISTIC = tuple(text for text in GRADIENT_ATTACKS if not text.startswith("pgd"))


@pytest.fixture(scope="module")
def blobs() -> tuple[Tensor, Tensor, list[nn.Module]]:
    """400 noisy images of 4 classes, and two different small networks trained on others like them."""
    prototypes = torch.rand(4, 1, 8, 8, generator=seeded(0))
    labels = torch.arange(1200) % 4
    images = (0.25 + 0.5 * prototypes[labels] + 0.12 * torch.randn(1200, 1, 8, 8, generator=seeded(1))).clamp(0, 1)
    models = []
    for seed in (0, 1):
        model = convnet(seed).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(4):
                for rows in torch.randperm(800).split(50):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                    optimizer.step()
        model.zero_grad(set_to_none=True)
        models.append(model.eval())
    x, y = images[800:], labels[800:]
    for model in models:
        assert (predict(model, x) == y).double().mean() > 0.95
    return x, y, models


# --- spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fgsm:eps=0.2", {"eps": 0.2, "norm": "linf", "steps": None, "step_size": None}),
        ("bim:eps=0.2", {"eps": 0.2, "norm": "linf", "steps": 100, "step_size": 0.0}),
        ("pgd:eps=8/255,norm=l2,steps=7", {"eps": 8 / 255, "norm": "l2", "steps": 7}),
        ("cw", {"eps": None, "norm": "l2", "steps": 20, "binary_search_steps": 5, "confidence": 0.0}),
        (
            "ddn",
            {"eps": None, "norm": "l2", "steps": 100, "gamma": 0.05, "initial_norm": 1.0, "quantization_levels": 0},
        ),
        ("noise:eps=1", {"eps": 1.0, "norm": "linf", "steps": None}),
    ],
)
def test_parse_fills_the_defaults(text: str, expected: dict[str, object]) -> None:
    spec = AttackSpec.parse(text)
    assert {name: getattr(spec, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("bim:steps=100,eps=.2", "bim:eps=0.2,steps=100"),
        ("bim:eps=0.2", "bim:eps=0.2,steps=100"),
        ("pgd:norm=l2,eps=1", "pgd:eps=1.0,norm=l2,steps=100"),
        ("cw:lr=0.5", "cw:steps=20"),
        ("cw:lr=0.01", "cw:steps=20,lr=0.01"),
        ("fgsm:eps=1/4", "fgsm:eps=0.25"),
    ],
)
def test_text_of_a_spec_is_canonical(text: str, canonical: str) -> None:
    assert str(AttackSpec.parse(text)) == canonical


positive = st.floats(1e-6, 1e3)
eps_of_either_norm = st.floats(1e-6, 1)


@given(
    st.one_of(
        st.builds(
            AttackSpec,
            name=st.sampled_from(["noise", "fgsm"]),
            eps=eps_of_either_norm,
            norm=st.sampled_from(["linf", "l2"]),
        ),
        st.builds(
            AttackSpec,
            name=st.sampled_from(["bim", "pgd"]),
            eps=eps_of_either_norm,
            norm=st.sampled_from(["linf", "l2"]),
            steps=st.integers(1, 999),
            step_size=st.floats(0, 1),
        ),
        st.builds(AttackSpec, name=st.just("apgd"), eps=positive, norm=st.just("l2")),
        st.builds(
            AttackSpec,
            name=st.just("cw"),
            steps=st.integers(1, 999),
            binary_search_steps=st.integers(1, 9),
            lr=positive,
            initial_const=positive,
            confidence=st.floats(0, 50),
        ),
        st.builds(
            AttackSpec,
            name=st.just("ddn"),
            gamma=st.floats(0.01, 0.9),
            initial_norm=positive,
            quantization_levels=st.sampled_from([0, 2, 256]),
        ),
    )
)
def test_a_spec_survives_text_dict_and_pickle(spec: AttackSpec) -> None:
    assert AttackSpec.parse(str(spec)) == spec
    assert from_dict(AttackSpec, to_dict(spec)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nes:eps=1", r"unknown attack 'nes'.*noise, fgsm, bim, pgd, cw, ddn"),
        ("bim", r"bim needs eps"),
        ("noise", r"noise needs eps"),
        ("fgsm:eps=0", r"fgsm\.eps is 0\.0.*above 0"),
        ("fgsm:eps=-0.1", r"fgsm\.eps is -0\.1.*above 0"),
        ("fgsm:eps=nan", r"fgsm\.eps is nan"),
        ("fgsm:eps=inf", r"fgsm\.eps is inf"),
        ("fgsm:eps=8", r"fgsm\.eps is 8\.0.*at most 1 in linf, in units of \[0,1\] pixels: write 8/255"),
        ("noise:eps=1.0001", r"noise\.eps is 1\.0001.*at most 1 in linf"),
        ("autoattack:eps=300", r"autoattack\.eps is 300\.0.*at most 1 in linf, in units of \[0,1\] pixels$"),
        ("pgd:eps=8/255,step_size=2", r"pgd\.step_size is 2\.0.*at most 1 in linf.*write 2/255"),
        ("fgsm:eps=-1/-5", r"fgsm\.eps is '-1/-5'.*float"),
        ("fgsm:eps=1/-5", r"fgsm\.eps is '1/-5'.*float"),
        ("fgsm:eps=-1/5", r"fgsm\.eps is -0\.2.*above 0"),
        ("fgsm:eps=1/0", r"fgsm\.eps is '1/0'.*float"),
        ("fgsm:eps=big", r"fgsm\.eps is 'big'.*float"),
        ("cw:norm=linf", r"cw\.norm is 'linf'.*l2"),
        ("bim:eps=0.1,norm=l1", r"bim\.norm is 'l1'.*linf or l2"),
        ("bim:eps=0.1,steps=0", r"bim\.steps is 0.*at least 1"),
        ("bim:eps=0.1,steps=2.5", r"bim\.steps is '2\.5'.*int"),
        ("bim:eps=0.1,step_size=-1", r"bim\.step_size is -1\.0"),
        ("fgsm:eps=0.1,steps=3", r"unknown field of fgsm: 'steps'; .*There are eps, norm"),
        ("ddn:eps=1", r"unknown field of ddn: 'eps'; .*There are norm, steps"),
        ("ddn:gamma=1", r"ddn\.gamma is 1\.0.*\(0, 1\)"),
        ("ddn:quantization_levels=1", r"ddn\.quantization_levels is 1.*at least 2"),
        ("cw:restarts=2", r"unknown field of cw: 'restarts'"),
        ("cw:confidence=-1", r"cw\.confidence is -1\.0"),
        ("cw:binary_search_steps=0", r"cw\.binary_search_steps is 0.*at least 1"),
        ("cw:lr=0", r"cw\.lr is 0\.0"),
    ],
)
def test_impossible_specs_name_field_value_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackSpec.parse(text)


@pytest.mark.parametrize("values", [{"steps": 2.5}, {"steps": True}, {"eps": "0.1"}])
def test_a_spec_made_in_python_is_checked_for_types(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="a value of type"):
        AttackSpec(**{"name": "bim", "eps": 0.1, **values})


def test_kinds_and_names() -> None:
    kinds = {text.split(":")[0]: AttackSpec.parse(text).kind for text in ONE_OF_EACH}
    assert [name for name, kind in kinds.items() if kind == "minimal_norm"] == ["cw", "ddn"]
    assert {t.split(":")[0] for t in ONE_OF_EACH if AttackSpec.parse(t).can_leave_early} == {"bim", "pgd"}
    assert AttackSpec.parse("bim:eps=0.1").short_name == "bim"
    assert AttackSpec.parse("bim:eps=0.1,norm=l2").short_name == "bim-l2"
    assert tuple(ATTACKS) == ATTACK_NAMES


def test_reading_a_spec_does_not_load_torch() -> None:
    code = "import components.attacks.spec, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- closed forms


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(
    ("attack", "scale"),
    [
        # cross entropy points at the nearest class, not at a mixture of all, only where logits are far apart
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
    # a sample that sits on the boundary has no meaningful relative error
    keep = truth > 0.01
    assert keep.sum() > 30
    adversarial = attack(model, x, y)
    assert (predict(model, adversarial) != y)[torch.from_numpy(keep)].all()
    ratio = norm_of(adversarial - x, "l2")[keep] / truth[keep]
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
    """As on the background of a digit; clipped alone it is a third shorter than what the attacks may take."""
    x, y = torch.full((20, 1, 28, 28), value), torch.zeros(20, dtype=torch.int64)
    spec = AttackSpec(name="noise", eps=eps, norm="l2")
    noisy = run_attack(spec, nn.Identity(), x, y, generator=seeded(0))
    verify_examples(x, noisy, range(20), spec)
    np.testing.assert_allclose(norm_of(noisy - x, "l2"), eps, rtol=0.01)


def test_pgd_starts_uniformly_in_the_ball() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(flat[1].weight)  # no gradient, so that the start is what comes back
    x, y = torch.full((4000, 1, 1, 2), 0.5), torch.zeros(4000, dtype=torch.int64)
    linf = pgd(flat, x, y, eps=0.4, steps=1, generator=seeded(0)) - x
    np.testing.assert_allclose(linf.abs().mean(), 0.2, atol=0.01)
    np.testing.assert_allclose(linf.abs().max(), 0.4, atol=0.001)
    radius = norm_of(pgd(flat, x, y, eps=0.4, norm="l2", steps=1, generator=seeded(0)) - x, "l2")
    # in two dimensions the squared radius is uniform
    np.testing.assert_allclose(((radius / 0.4) ** 2).mean(), 0.5, atol=0.02)
    assert radius.max() <= 0.4 * (1 + 1e-5)


def test_default_step_size_is_2_5_eps_over_steps() -> None:
    model, x = convnet(0), near_grey(6, side=8)
    y = predict(model, x)
    default = bim(model, x, y, eps=0.1, steps=8)
    torch.testing.assert_close(default, bim(model, x, y, eps=0.1, steps=8, step_size=2.5 * 0.1 / 8), rtol=0, atol=0)
    assert not torch.equal(default, bim(model, x, y, eps=0.1, steps=8, step_size=2 * 0.1 / 8))


# --- contract


some_convnet = functools.cache(convnet)


@settings(max_examples=80)
@given(
    text=st.sampled_from([t.partition(":")[0] + (",norm=l2" if "norm=l2" in t else "") for t in ONE_OF_EACH[:-2]]),
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
    eps = eps if norm else eps / 3  # of pixels in [0,1]
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
        early_leaving=early and spec.can_leave_early,
        generator=seeded(seed),
    )
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1
    limit = spec.eps + 1e-6 if spec.norm == "linf" else spec.eps * (1 + 1e-5)
    assert norm_of(out - x, spec.norm).max() <= limit


@pytest.mark.parametrize("text", ONE_OF_EACH)
@pytest.mark.parametrize("training", [True, False])
def test_model_inputs_and_random_state_are_left_alone(text: str, training: bool) -> None:
    model = convnet(0).train(training)
    model[1].eval()  # a mode of its own, which model.train() or model.eval() would overwrite
    modes = [module.training for module in model.modules()]
    x = torch.rand(4, 1, 8, 8, generator=seeded(0))
    y, before, random_state = torch.arange(4), x.clone(), torch.get_rng_state()
    out = run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    if not training:  # dropout draws from the global stream
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_runs_under_no_grad_with_frozen_parameters(text: str) -> None:
    model, x, y = convnet(0), near_grey(4, side=8), torch.arange(4)
    wanted = run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    model.requires_grad_(False)
    with torch.no_grad():
        out = run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_the_generator_decides(text: str) -> None:
    model, x, y = convnet(0), near_grey(4, side=8), torch.arange(4)
    spec = AttackSpec.parse(text)
    first, again, other = (run_attack(spec, model, x, y, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (spec.name not in ("noise", "pgd"))


@pytest.mark.parametrize(
    ("text", "draws"),
    [
        *((text, text.startswith(("noise", "pgd", "ddn"))) for text in ONE_OF_EACH),
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
    # another batch size is another order of summation, which may flip the sign of a gradient close to zero
    assert ((whole - parts).abs() < 1e-4).double().mean() > 0.99


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_an_empty_batch_comes_back_empty(text: str) -> None:
    out = run_attack(AttackSpec.parse(text), linear(3), torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 1, 4, 4)


@pytest.mark.parametrize("text", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(2, 1, 4, 4).double(), torch.zeros(2, dtype=torch.int64), "float32"),
        (torch.rand(2, 16), torch.zeros(2, dtype=torch.int64), r"\[N,C,H,W\]"),
        (torch.full((2, 1, 4, 4), 1.1), torch.zeros(2, dtype=torch.int64), r"in \[0,1\]"),
        (torch.full((2, 1, 4, 4), -0.1), torch.zeros(2, dtype=torch.int64), r"in \[0,1\]"),
        (torch.full((2, 1, 4, 4), torch.nan), torch.zeros(2, dtype=torch.int64), "finite"),
        (torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int32), "int64"),
        (torch.rand(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
        (torch.rand(2, 1, 4, 4), torch.tensor([0, -100]), "from 0, got -100"),
    ],
)
def test_what_would_be_misread_is_refused(text: str, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_attack(AttackSpec.parse(text), linear(3), x, y)


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


# --- targets


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


# --- early leaving


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_early_leaving_returns_the_first_adversarial_iterate(
    norm: str, blobs: tuple[Tensor, Tensor, list[nn.Module]]
) -> None:
    x, y, (model, _) = blobs
    x, y = x[:100], y[:100]
    eps = 0.1 if norm == "linf" else 0.5
    options = {"eps": eps, "norm": norm, "step_size": eps / 6}
    iterates = [x] + [bim(model, x, y, steps=k, **options) for k in range(1, 13)]
    broken = torch.stack([predict(model, iterate) != y for iterate in iterates])
    out = bim(model, x, y, steps=12, early_leaving=True, **options)
    left = 0
    for i in range(len(x)):
        # the twelfth iterate is returned either way, so it makes no difference whether it is adversarial
        first = int(broken[:, i].int().argmax()) if broken[:, i].any() else 12
        left += first < 12
        torch.testing.assert_close(out[i], iterates[first][i], rtol=0, atol=1e-5)
    assert 20 < left < 100, "the case is of no use unless some samples leave and some stay"


@pytest.mark.parametrize("attack", [bim, pgd])
def test_early_leaving_breaks_no_fewer_and_costs_less(
    attack: Callable[..., Tensor], blobs: tuple[Tensor, Tensor, list[nn.Module]]
) -> None:
    x, y, (inner, _) = blobs
    passes, broken = {}, {}
    for early in (True, False):
        model = Counting(inner)
        out = attack(model, x, y, eps=0.1, steps=10, early_leaving=early, generator=seeded(0))
        passes[early], broken[early] = sum(model.with_gradient), predict(inner, out) != y
    assert (broken[True] | ~broken[False]).all()
    assert passes[False] == 10 * len(x)
    assert passes[True] < 0.8 * passes[False]


def test_early_leaving_stops_when_all_have_left() -> None:
    model = Counting(linear(2))
    x = near_grey(5)
    out = bim(model, x, 1 - predict(model.inner, x), eps=0.1, steps=10, early_leaving=True)
    assert model.with_gradient == [5]
    assert torch.equal(out, x)


@pytest.mark.parametrize("text", ["noise:eps=0.1", "fgsm:eps=0.1", "cw", "ddn"])
def test_early_leaving_is_refused_where_there_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="early_leaving"):
        run_attack(AttackSpec.parse(text), linear(2), near_grey(1), torch.tensor([0]), early_leaving=True)


def test_why_examples_for_another_model_must_not_leave_early(
    blobs: tuple[Tensor, Tensor, list[nn.Module]],
) -> None:
    x, y, (source, other) = blobs
    accuracy = {}
    for early in (True, False):
        out = bim(source, x, y, eps=0.15, steps=20, early_leaving=early)
        accuracy[early] = (predict(other, out) == y).double().mean().item()
        assert (predict(source, out) == y).double().mean() < 0.05, "equally strong on the model they were made on"
    assert accuracy[True] > accuracy[False] + 0.2


# --- minimal norm


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
        found = (out != x).flatten(1).any(dim=1)
        assert found.sum() > 25
        logits = model(out).detach()[found]
        own = logits.gather(1, y[found, None]).squeeze(1)
        others = logits.scatter(1, y[found, None], -torch.inf).amax(dim=1)
        margins[confidence] = others - own
    assert margins[3.0].min() >= 3 - 1e-4
    assert margins[0.0].median() < 1


def test_ddn_leaves_a_flat_start_by_chance_and_only_by_the_generator() -> None:
    class Plateau(nn.Module):
        """Flat within L1 distance 1 of the grey image: the gradient there is exactly zero."""

        def forward(self, x: Tensor) -> Tensor:
            outside = ((x - 0.5).abs().flatten(1).sum(dim=1) - 1).relu()
            return torch.stack([torch.full_like(outside, 0.1), 5 * outside], dim=1)

    x, y = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    out = ddn(Plateau(), x, y, steps=40, generator=seeded(0))
    assert (predict(Plateau(), out) == 1).all()
    assert torch.equal(out, ddn(Plateau(), x, y, steps=40, generator=seeded(0)))
    assert not torch.equal(out, ddn(Plateau(), x, y, steps=40, generator=seeded(1)))


# --- Foolbox


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
    theirs = attack.run(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, criterion, epsilon=spec.eps)
    ours = run_attack(spec, model, x, labels, targeted=targeted)
    assert (ours != x).any()
    # rounding may flip the sign of a gradient close to zero, rarely
    assert ((ours - theirs).abs() < 1e-5).double().mean() > 0.995
    assert ((predict(model, ours) == labels) == (predict(model, theirs) == labels)).double().mean() > 0.98


def test_ddn_agrees_with_foolbox(blobs: tuple[Tensor, Tensor, list[nn.Module]]) -> None:
    fb = pytest.importorskip("foolbox")
    x, y, (model, _) = blobs
    x, y = x[:60], y[:60]
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = fb.attacks.DDNAttack(steps=60).run(wrapped, x, fb.criteria.Misclassification(y))
    ours = ddn(model, x, y, steps=60)
    assert (predict(model, ours) != y).sum() >= (predict(model, theirs) != y).sum()
    norms = [norm_of(out - x, "l2") for out in (ours, theirs)]
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
    theirs = attack.run(wrapped, x, fb.criteria.Misclassification(y))
    ours = cw(model, x, y, binary_search_steps=8, steps=40, lr=0.05, initial_const=1.0)
    found = theirs.flatten(1).any(dim=1)  # Foolbox returns a black image where it found nothing
    assert found.sum() > 50
    assert (predict(model, ours) != y)[found].all()
    norms = [norm_of((out - x)[found], "l2") for out in (ours, theirs)]
    ratio = norms[0] / norms[1]
    assert np.isclose(ratio, 1, rtol=2e-3).mean() > 0.8, "the same search, so the same norms but for our last iterates"
    assert np.quantile(ratio, 0.95) < 1.002, "which only make it better"
