"""Verification, judgement and the statistics made of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from components.attacks.common import is_adversarial
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.errors import UserError
from components.evaluation.judge import AttackViolation, judge, verify_examples
from components.evaluation.metrics import standard_budgets, summarize, worst_case
from components.evaluation.statistics import mcnemar, wilson_interval

LINF, L2, FREE = AttackSpec.parse("bim:eps=0.2"), AttackSpec.parse("pgd:eps=0.5,norm=l2"), AttackSpec.parse("ddn")
METRICS = {
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_rounded",
    "clean_accuracy",
    "success_rate",
    "l2_median",
    "l2_q25",
    "l2_q75",
    "linf_median",
    "linf_q25",
    "linf_q75",
    "seconds",
}


def grey(n: int = 3) -> Tensor:
    return torch.full((n, 1, 4, 4), 0.5)


# --- verify_examples


def test_a_violation_is_the_users_to_know() -> None:
    assert issubclass(AttackViolation, UserError)


@pytest.mark.parametrize("spec", [LINF, L2, FREE], ids=str)
def test_what_keeps_to_the_rules_passes(spec: AttackSpec) -> None:
    clean = grey()
    verify_examples(clean, clean.clone(), [0, 1, 2], spec)
    verify_examples(clean, clean + 0.1249, [0, 1, 2], spec)  # L2 norm 0.4996
    verify_examples(clean[:0], clean[:0], [], spec)


@pytest.mark.parametrize(("excess", "fails"), [(5e-7, False), (3e-6, True)])
def test_linf_tolerance(excess: float, fails: bool) -> None:
    clean, adversarial = grey(), grey()
    adversarial[1, 0, 2, 2] += 0.2 + excess
    if fails:
        with pytest.raises(AttackViolation, match=r"bim:eps=0\.2.*sample 71 .*linf norm .* over eps=0\.2") as caught:
            verify_examples(clean, adversarial, np.array([70, 71, 72]), LINF)
        assert float(str(caught.value).split(", ")[1].split(" over")[0]) == pytest.approx(excess, rel=0.1)
    else:
        verify_examples(clean, adversarial, [70, 71, 72], LINF)


@pytest.mark.parametrize(("excess", "fails"), [(0.9e-9, False), (1.1e-9, True), (5e-7, True)])
def test_the_linf_tolerance_is_at_most_eps_itself(excess: float, fails: bool) -> None:
    spec = AttackSpec.parse("bim:eps=1e-9")
    clean = torch.zeros(2, 1, 4, 4)
    adversarial = clean + 1e-9
    adversarial[1, 0, 2, 2] += excess
    if fails:
        with pytest.raises(AttackViolation, match=r"sample 4 has linf norm .* over eps=1e-09"):
            verify_examples(clean, adversarial, [3, 4], spec)
    else:
        verify_examples(clean, adversarial, [3, 4], spec)
    zeros = np.zeros(2, np.int32)
    broken = {"label": zeros, "clean_prediction": zeros, "adversarial_prediction": zeros + 1}
    judged = {**broken, "linf": np.array([1e-9, 1e-9 + excess])}
    assert worst_case([judged], "linf", 1e-9).tolist() == [False, fails]


@pytest.mark.parametrize("eps", [1e-9, 3.1e-8, 5e-8, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("text", ["noise", "fgsm", "bim", "pgd", "apgd"])
def test_attacks_of_a_tiny_eps_keep_to_it_as_far_as_float32_can(text: str, eps: float) -> None:
    clean = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    spec = AttackSpec.parse(f"{text}:eps={eps}")
    model, labels = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.zeros(4, dtype=torch.int64)
    found = run_attack(spec, model, clean, labels, generator=torch.Generator().manual_seed(1))
    verify_examples(clean, found, range(4), spec)


@pytest.mark.parametrize(("excess", "fails"), [(5e-6, False), (3e-5, True)])
def test_l2_tolerance(excess: float, fails: bool) -> None:
    clean, adversarial = grey(), grey()
    adversarial[2] += 0.125 * (1 + excess)
    if fails:
        with pytest.raises(AttackViolation, match=r"pgd:eps=0\.5,norm=l2.*sample 9 .*l2 norm"):
            verify_examples(clean, adversarial, torch.tensor([7, 8, 9]), L2)
    else:
        verify_examples(clean, adversarial, [7, 8, 9], L2)


def test_the_worst_sample_is_named() -> None:
    adversarial = grey() + torch.tensor([0.3, 0.4, 0.35]).view(-1, 1, 1, 1)
    with pytest.raises(AttackViolation, match=r"sample 11 .*0\.2 over"):
        verify_examples(grey(), adversarial, [10, 11, 12], LINF)


@pytest.mark.parametrize("spec", [LINF, L2, FREE], ids=str)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "sample 5 has pixels that are not finite"),
        (math.inf, "sample 5 has pixels that are not finite"),
        (1.0625, r"sample 5 leaves \[0,1\] by 0\.0625"),
        (-0.0625, r"sample 5 leaves \[0,1\] by 0\.0625"),
        (1 + 1.2e-7, r"sample 5 leaves \[0,1\]"),
    ],
)
def test_pixels_that_are_none(spec: AttackSpec, value: float, message: str) -> None:
    adversarial = grey()
    adversarial[1, 0, 0, 0] = value
    with pytest.raises(AttackViolation, match=message):
        verify_examples(grey(), adversarial, [4, 5, 6], spec)


@pytest.mark.parametrize(
    ("adversarial", "message"),
    [(grey().double(), "float64"), (grey(2), r"\[2, 1, 4, 4\]"), (grey().half(), "float16")],
)
def test_wrong_shape_or_dtype(adversarial: Tensor, message: str) -> None:
    with pytest.raises(AttackViolation, match=message):
        verify_examples(grey(), adversarial, [0, 1, 2], LINF)


# --- judge


class Threshold(nn.Module):
    """Class 1 where the first pixel is above 0.5, and a record of what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        product = x.flatten(1)[:, :1] @ torch.ones(1, 1)  # a matrix product is what autocast would lower
        self.seen.append(product.dtype)
        return torch.cat([torch.full_like(product, 0.5), product], dim=1)


def test_judge_by_hand() -> None:
    clean = torch.zeros(4, 1, 2, 2)
    clean[:, 0, 0, 0] = torch.tensor([0.2, 0.2, 0.8, 0.8])
    adversarial = clean.clone()
    adversarial[1, 0, 0, 0] = 0.7
    # 127.4 / 255 rounds to 127 / 255 < 0.5, 127.6 to 128 / 255 > 0.5
    adversarial[2, 0, 0, 0] = 0.4999
    adversarial[3, 0, 0, 0] = 127.6 / 255
    adversarial[3, 0, 1, 1] = 0.4
    out = judge(Threshold(), clean, adversarial, torch.tensor([0, 0, 1, 1]))
    assert out["label"].tolist() == [0, 0, 1, 1]
    assert out["clean_prediction"].tolist() == [0, 0, 1, 1]
    assert out["adversarial_prediction"].tolist() == [0, 1, 0, 1]
    assert out["rounded_prediction"].tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(out["linf"], [0, 0.5, 0.3001, 0.4], atol=1e-6)
    np.testing.assert_allclose(out["l2"], [0, 0.5, 0.3001, math.hypot(0.8 - 127.6 / 255, 0.4)], atol=1e-6)
    assert all(out[name].dtype == np.int32 for name in out if name == "label" or name.endswith("prediction"))
    assert out["l2"].dtype == out["linf"].dtype == np.float64


def test_rounding_to_8_bits_can_undo_an_example() -> None:
    class Above(nn.Module):
        """Class 1 where the first pixel is above 128.2 grey levels."""

        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, :1]
            return torch.cat([torch.full_like(first, 128.2 / 255), first], dim=1)

    clean = torch.full((2, 1, 2, 2), 127 / 255)
    adversarial = clean.clone()
    adversarial[:, 0, 0, 0] = torch.tensor([128.4, 128.6]) / 255  # one is rounded back across the boundary
    out = judge(Above(), clean, adversarial, torch.tensor([0, 0]))
    assert out["adversarial_prediction"].tolist() == [1, 1]
    assert out["rounded_prediction"].tolist() == [0, 1]


def test_judge_leaves_autocast_and_the_model_alone() -> None:
    model = Threshold().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        judge(model, grey(), grey(), torch.zeros(3, dtype=torch.int64))
    assert model.seen == [torch.float32] * 3
    assert model.training


def test_logits_that_are_not_finite_are_no_class() -> None:
    """A NaN counts as the largest of all logits, so argmax would call its place a class, and here the true one."""

    class Row(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = [
                [1.0, 3.0, 2.0],
                [1.0, math.nan, 2.0],
                [math.nan] * 3,
                [1.0, math.inf, 2.0],
                [-math.inf] * 3,
                [-math.inf, 0.0, -math.inf],  # logarithms of probabilities: a class, and surely
            ]
            return torch.tensor(rows)[: len(x)]

    out = judge(Row(), grey(6), grey(6), torch.ones(6, dtype=torch.int64))
    for name in ("clean_prediction", "adversarial_prediction", "rounded_prediction"):
        assert out[name].tolist() == [1, -1, -1, -1, -1, 1]
        assert out[name].dtype == np.int32
    metrics = summarize(out, LINF, 0)
    assert metrics["accuracy"] == metrics["clean_accuracy"] == pytest.approx(2 / 6)


def test_an_attack_takes_logits_that_are_not_finite_as_the_judge_does() -> None:
    rows = torch.tensor([[3.0, 1.0], [math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, 0.0]])
    labels = torch.tensor([0, 0, 1, 0, 1])
    assert is_adversarial(rows, labels, targeted=False).tolist() == [False, True, True, True, False]
    assert is_adversarial(rows, labels, targeted=True).tolist() == [True, False, False, False, True]


def test_judge_of_nothing() -> None:
    out = judge(Threshold(), grey(0), grey(0), torch.zeros(0, dtype=torch.int64))
    assert {name: len(column) for name, column in out.items()} == dict.fromkeys(out, 0)


# --- summarize


def columns() -> dict[str, np.ndarray]:
    """Ten samples of class 1: 0 wrong from the start, 1-2 robust, 3-9 broken at L2 norm 0.3, 0.4, ... 0.9."""
    n = 10
    adversarial = np.zeros(n, dtype=np.int32)
    adversarial[1:3] = 1
    rounded = adversarial.copy()
    rounded[3] = 1
    l2 = np.arange(n) / 10
    l2[:3] = 0
    clean = np.ones(n, dtype=np.int32)
    clean[0] = 0
    return {
        "label": np.ones(n, dtype=np.int32),
        "clean_prediction": clean,
        "adversarial_prediction": adversarial,
        "rounded_prediction": rounded,
        "l2": l2,
        "linf": l2 / 2,
    }


def test_summary_of_a_budget_attack_by_hand() -> None:
    metrics = summarize(columns(), LINF, 1.5)
    assert set(metrics) == METRICS
    assert metrics["accuracy"] == 0.2
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == wilson_interval(2, 10)
    assert metrics["accuracy_rounded"] == pytest.approx(0.3)
    assert metrics["clean_accuracy"] == pytest.approx(0.9)
    assert metrics["success_rate"] == pytest.approx(7 / 9)
    assert metrics["l2_median"] == pytest.approx(0.6)
    assert metrics["l2_q25"] == pytest.approx(0.45)
    assert metrics["l2_q75"] == pytest.approx(0.75)
    assert [metrics[f"linf_{q}"] for q in ("q25", "median", "q75")] == pytest.approx([0.225, 0.3, 0.375])
    assert metrics["seconds"] == 1.5


def test_summary_of_a_minimal_norm_attack_by_hand() -> None:
    metrics = summarize(columns(), FREE, 0, budgets={"l2": (0.5, 1.5), "linf": (0.3,)})
    assert set(metrics) == METRICS | {"curve", "accuracy_at_budget", "accuracy_at_budget_interval"}
    # within 0.5: the one wrong from the start and those at 0.3, 0.4 and exactly 0.5 are lost
    assert metrics["accuracy_at_budget"] == {"l2<=0.5": pytest.approx(0.6), "l2<=1.5": pytest.approx(0.2)}
    assert metrics["accuracy_at_budget_interval"] == {
        "l2<=0.5": list(wilson_interval(6, 10)),
        "l2<=1.5": list(wilson_interval(2, 10)),
    }
    curve = metrics["curve"]
    assert curve["norm"] == "l2"
    assert curve["eps"][0] == 0
    assert curve["accuracy"][0] == metrics["clean_accuracy"]
    assert curve["accuracy"][-1] == metrics["accuracy"]
    for eps, accuracy in zip(curve["eps"], curve["accuracy"], strict=True):
        lost = 1 + sum(norm <= eps for norm in columns()["l2"][3:])
        assert accuracy == pytest.approx(1 - lost / 10)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_budgets_default_to_the_fields_own() -> None:
    assert set(summarize(columns(), FREE, 0)["accuracy_at_budget"]) == {"l2<=0.5", "l2<=1.5", "l2<=3"}
    mnist = summarize(columns(), FREE, 0, budgets=standard_budgets(1, 28))
    assert set(mnist["accuracy_at_budget"]) == {"l2<=1.5"}


def test_standard_budgets() -> None:
    assert standard_budgets(1, 28) == {"l2": (1.5,), "linf": (0.3,)}
    assert standard_budgets(3, 32) == {"l2": (0.5,), "linf": (8 / 255,)}
    assert standard_budgets(3, 224) == {"l2": (3.0,), "linf": (4 / 255,)}


def test_summary_of_clean_images() -> None:
    clean = columns()
    clean["adversarial_prediction"] = clean["rounded_prediction"] = clean["clean_prediction"]
    clean["l2"] = clean["linf"] = np.zeros(10)
    metrics = summarize(clean, None, 0)
    assert set(metrics) == METRICS
    assert metrics["accuracy"] == metrics["clean_accuracy"] == metrics["accuracy_rounded"] == pytest.approx(0.9)
    assert metrics["success_rate"] == 0
    assert [metrics[f"{norm}_{q}"] for norm in ("l2", "linf") for q in ("median", "q25", "q75")] == [None] * 6
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_summary_where_no_sample_was_right() -> None:
    wrong = columns()
    wrong["clean_prediction"] = wrong["adversarial_prediction"] = np.zeros(10, dtype=np.int32)
    metrics = summarize(wrong, FREE, 0)
    assert metrics["success_rate"] == 0
    assert metrics["l2_median"] is None
    assert set(metrics["curve"]["accuracy"]) == {0.0}


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize({name: column[:0] for name, column in columns().items()}, LINF, 0)


# --- statistics


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    successes, n = case
    wanted = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 50)[0] == 0
    assert wilson_interval(50, 50)[1] == 1
    for successes, n in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=r"0\.\.5"):
            wilson_interval(successes, n)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, both: int, neither: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * both + [False] * neither, dtype=bool)
    b = np.array([False] * only_a + [True] * only_b + [True] * both + [False] * neither, dtype=bool)
    wanted = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(a, b) == pytest.approx(wanted, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_of_many_samples() -> None:
    a, b = np.zeros(10_000, dtype=bool), np.zeros(10_000, dtype=bool)
    a[:5100] = True
    b[5100:] = True
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(5100, 10_000).pvalue, rel=1e-6)
    assert mcnemar(np.ones(10_000, dtype=bool), np.zeros(10_000, dtype=bool)) == 0


def test_mcnemar_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="one shape"):
        mcnemar(np.zeros(3, dtype=bool), np.zeros(4, dtype=bool))
    with pytest.raises(ValueError, match="bool"):
        mcnemar(np.zeros(3), np.zeros(3, dtype=bool))
