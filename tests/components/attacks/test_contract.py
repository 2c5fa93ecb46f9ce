"""The contract of every attack: rules, random draws, passes."""

from __future__ import annotations

import pytest
import torch
from attacked_models import (
    CASCADE_ATTACKS,
    GRADIENT_AND_NOISE,
    Counting,
    broken,
    convnet,
    linear,
    near_grey,
    predict,
    seeded,
)
from torch import Tensor, nn

from components.attacks.apgd import apgd, apgd_t
from components.attacks.fab import fab_t
from components.attacks.fgsm import fgsm
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.judge import verify_examples


def test_dlr_does_not_change_with_the_scale_of_the_logits() -> None:
    model, x = convnet(0), near_grey(12, side=8)
    y = predict(model, x)
    scaled = nn.Sequential(model, Times(2.0**-10))
    for attack, options in ((apgd, {"loss": "dlr"}), (apgd_t, {"targets": 2})):
        outs = [attack(m, x, y, eps=0.05, steps=8, generator=seeded(0), **options) for m in (model, scaled)]
        assert (outs[0] != x).any()
        assert ((outs[0] - outs[1]).abs() < 1e-5).double().mean() > 0.99


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_few_classes_are_enough(classes: int, norm: str) -> None:
    model, x = linear(classes), near_grey(20)
    y = predict(model, x)
    eps = 0.2 if norm == "linf" else 0.8
    for out in (
        apgd(model, x, y, eps=eps, norm=norm, steps=10, loss="dlr", generator=seeded(0)),
        apgd_t(model, x, y, eps=eps, norm=norm, steps=10, generator=seeded(0)),
        fab_t(model, x, y, norm=norm, steps=10),
    ):
        assert broken(model, out, y).all()


EVERY_ATTACK = (*GRADIENT_AND_NOISE, *CASCADE_ATTACKS)
RULED = [*CASCADE_ATTACKS, "square:eps=1.5,norm=l2,queries=40", "square:eps=0.3,queries=40"]


@pytest.mark.parametrize("kind", ["grey", "black and white", "uniform"])
@pytest.mark.parametrize(
    ("text", "early"),
    [
        (text, early)
        for text in RULED
        for early in (False, True)
        if not early or AttackSpec.parse(text).can_stop_on_success
    ],
)
def test_examples_are_within_the_rules(text: str, kind: str, early: bool) -> None:
    spec = AttackSpec.parse(text)
    x = torch.rand(6, 2, 9, 8, generator=seeded(0))
    if kind != "uniform":
        x = x.round() if kind == "black and white" else 0.5 + 0.1 * (x - 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 30), nn.ReLU(), nn.Linear(30, 5))
    y = predict(model, x)
    y[0] = (y[0] + 1) % 5
    before = x.clone()
    out = run_attack(spec, model, x, y, stop_on_success=early, generator=seeded(1))
    verify_examples(x, out, range(6), spec)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()
    assert not out.requires_grad
    if spec.judged_on_source_only or spec.kind == "minimal_norm" or (early and spec.name == "apgd" and not spec.target):
        assert torch.equal(out[0], x[0]), "misclassified already"
    elif not early:
        assert (out[0] != x[0]).any(), "what another model will judge is attacked all the same"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_the_cascade_a_samples_draws_do_not_depend_on_who_is_left(norm: str) -> None:
    model, x = convnet(4), torch.rand(16, 1, 8, 8, generator=seeded(4))
    y = predict(model, x)
    spec = AttackSpec.parse(f"autoattack:eps={0.05 if norm == 'linf' else 0.3},norm={norm},steps=3,queries=4")
    expected = run_attack(spec, model, x, y, generator=seeded(3))
    moved = (expected != x).flatten(1).any(dim=1)
    assert 0 < int(moved[4:].sum()) < 12, "some are broken on the way, some go through all four"
    wrong = y.clone()
    wrong[:4] = (wrong[:4] + 1) % 4
    examples = run_attack(spec, model, x, wrong, generator=seeded(3))
    assert torch.equal(examples[:4], x[:4]), "misclassified already"
    # Another batch size is another order of summation.
    torch.testing.assert_close(examples[4:], expected[4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", EVERY_ATTACK)
@pytest.mark.parametrize("training", [True, False])
def test_model_inputs_and_random_state_are_left_alone(text: str, training: bool) -> None:
    model = convnet(0).train(training)
    model[1].eval()  # model.train() or model.eval() would overwrite this mode.
    modes = [module.training for module in model.modules()]
    x, y, state = torch.rand(4, 1, 8, 8, generator=seeded(0)), torch.arange(4), torch.get_rng_state()
    before = x.clone()
    out = run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()
    if not training:  # Dropout draws from the global stream.
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", EVERY_ATTACK)
def test_the_generator_decides_also_under_no_grad_with_frozen_parameters(text: str) -> None:
    model, x = convnet(0), near_grey(6, side=8)
    y, spec = predict(model, x), AttackSpec.parse(text)
    first, again, other = (run_attack(spec, model, x, y, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    if not spec.draws or spec.name.startswith(("noise", "pgd", "apgd")):
        assert torch.equal(first, other) == (not spec.draws)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(run_attack(spec, model, x, y, generator=seeded(0)), first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", [*EVERY_ATTACK, "adaptive:eps=0.1,steps=2,restarts=2"])
def test_an_empty_batch_comes_back_empty(text: str) -> None:
    auxiliary = (lambda x, rows: x.flatten(1).sum(1)) if text.startswith("adaptive") else None
    x, y = torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64)
    assert run_attack(AttackSpec.parse(text), linear(3), x, y, auxiliary=auxiliary).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("text", EVERY_ATTACK)
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
        ("pgd:eps=0.001,steps=7,restarts=3", 21, 3),
        ("apgd:eps=0.001,steps=7", 7, 1),
        ("apgd:eps=0.001,steps=7,restarts=2,loss=dlr", 14, 2),
        ("apgd-t:eps=0.001,steps=7,targets=2", 14, 3),
        ("apgd-t:eps=0.001,steps=7,targets=9", 28, 5),
        ("fab-t:steps=5,targets=2", 10, 11),
        ("square:eps=0.0001,queries=30", 0, 31),
        ("fgsm:eps=0.1,target=random", 1, 1),
    ],
)
def test_no_pass_is_wasted(text: str, backward: int, forward: int) -> None:
    model, x = Counting(linear(5)), near_grey(6)
    y = predict(model.inner, x)
    run_attack(AttackSpec.parse(text), model, x, y, generator=seeded(0))
    assert (len(model.with_gradient), len(model.without)) == (backward, forward)


@pytest.mark.parametrize(
    "text",
    [
        "pgd:eps=0.03,steps=4,restarts=3",
        "apgd:eps=0.03,steps=6,restarts=2",
        "apgd-t:eps=0.3,norm=l2,steps=6",
        "fab-t:steps=6,restarts=2",
        "square:eps=0.03,queries=25",
        "square:eps=0.3,norm=l2,queries=25",
    ],
)
def test_a_sample_does_not_depend_on_who_is_left(text: str, mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    x, y, spec = x[:12], y[:12], AttackSpec.parse(text)
    options = {"stop_on_success": True} if spec.can_stop_on_success else {}
    alone = y.clone()
    alone[1::2] = (alone[1::2] + 1) % 10  # Every other sample is misclassified from the start.
    together, apart = (run_attack(spec, model, x, labels, generator=seeded(0), **options) for labels in (y, alone))
    # Another batch size is another order of summation, which may flip the sign of a gradient close to zero.
    assert ((together - apart)[::2].abs() < 1e-4).double().mean() > 0.99


def test_fgsm_of_one_step_is_what_a_target_turns_round() -> None:
    model, x = linear(2), near_grey(10)
    y = predict(model, x)
    spec = AttackSpec.parse("fgsm:eps=0.1,target=random")
    assert torch.equal(run_attack(spec, model, x, y), fgsm(model, x, 1 - y, eps=0.1, targeted=True))
