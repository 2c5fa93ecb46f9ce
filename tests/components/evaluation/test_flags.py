"""Flags of constructed evaluations and measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flagged_networks import (
    ALIVE,
    NAMES,
    OTHERS,
    SINGLE,
    N,
    clean_probe,
    dependence,
    runs,
)

from components.attacks.spec import AttackSpec
from components.evaluation.flags import Judged, flags


def names(measured: dict[str, Any] | None = None, judged: tuple[Judged, ...] = (), active: Any = None) -> set[str]:
    return {f.name for f in flags(measured or clean_probe(), judged, active) if f.fired}


def dead(**counts: int) -> dict[str, Any]:
    return {"n": N, "cross_entropy": {**ALIVE, **counts}, "margin": ALIVE}


def random_output(difference: float) -> dict[str, Any]:
    return {"passes": 5, "largest_difference": difference, "largest_output": 10.0, "changed": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        # the lower end of the interval of 5 of 100 is 0.022, of 4 of 100 0.016, of 3 of 100 0.010, of 2 of 100 0.006
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 1.0: 2})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 1.0: 4})}, {"not_zero_at_unbounded_eps"}),
        # found in a smaller ball is found
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 0, 1.0: 4})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 7, 1.0: 0})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 8, 1.0: 0})}, {"not_falling_with_eps"}),
        (
            {"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 60, 1.0: 60})},
            {"not_zero_at_unbounded_eps", "not_falling_with_eps"},
        ),
        (
            {"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 56, 1.0: 53})},
            {"not_zero_at_unbounded_eps", "not_falling_with_eps"},
        ),
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 56, 1.0: 52})}, {"not_zero_at_unbounded_eps"}),
        ({"accuracy_by_eps": runs("eps", {1.0: 60})}, {"not_zero_at_unbounded_eps"}),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 0, 1.0: 0})}, set()),
        ({"accuracy_by_steps": runs("steps", {5: 60, 20: 67, 50: 60})}, set()),
        ({"accuracy_by_steps": runs("steps", {5: 60, 20: 68, 50: 60})}, {"not_falling_with_steps"}),
        ({"accuracy_by_steps": runs("steps", {5: 0, 20: 0, 50: 0})}, set()),
        ({"zero_gradients": dead(zero=5)}, set()),
        ({"zero_gradients": dead(zero=6)}, {"zero_gradients"}),
        ({"zero_gradients": dead(not_finite=6)}, {"zero_gradients"}),
        ({"zero_gradients": dead(tiny=2, zero=2, not_finite=2)}, {"zero_gradients"}),
        ({"zero_gradients": {"n": N, "cross_entropy": ALIVE, "margin": {**ALIVE, "zero": 6}}}, {"zero_gradients"}),
        ({"random_output": random_output(9e-4)}, set()),
        ({"random_output": random_output(2e-3)}, {"random_output"}),
        ({"batch_dependence": dependence(5)}, set()),
        ({"batch_dependence": dependence(6)}, {"batch_dependent_output"}),
        # a single image that rounding moves is no sign, unless it is the only one
        ({"batch_dependence": dependence(1, 8)}, set()),
        ({"batch_dependence": dependence(2, 8)}, {"batch_dependent_output"}),
        ({"batch_dependence": dependence(0, 1)}, set()),
        ({"batch_dependence": dependence(1, 1)}, {"batch_dependent_output"}),
        ({"output": "probabilities"}, {"not_logits"}),
        ({"output": "log_probabilities"}, {"not_logits"}),
    ],
)
def test_flags_of_a_probe(change: dict[str, Any], expected: set[str]) -> None:
    assert names(clean_probe(**change)) == expected


def test_the_remedy_names_what_saturates() -> None:
    def remedy(**counts: Any) -> str:
        made = flags(clean_probe(zero_gradients={"n": N, "cross_entropy": ALIVE, "margin": ALIVE, **counts}), [])
        return next(f.remedy for f in made if f.name == "zero_gradients")

    gone = {**ALIVE, "zero": N}
    assert "BPDA" in remedy(cross_entropy=gone, margin=gone)
    assert "BPDA" not in remedy(cross_entropy=gone)


def evaluation(
    threat: str,
    text: str,
    broken: range,
    *,
    clean_wrong: range = range(0),
    norms: float | None = None,
    n: int = N,
) -> Judged:
    """Samples ``broken`` fall to the attack, all examples having its eps as their norm (or ``norms``)."""
    spec = AttackSpec.parse(text)
    clean, adversarial = np.zeros(n, np.int32), np.zeros(n, np.int32)
    clean[list(clean_wrong)] = 1
    adversarial[list(broken)] = 1
    # as far above eps as verify_examples allows
    above = {"linf": lambda eps: eps + 9e-7, "l2": lambda eps: eps * (1 + 9e-6)}[str(spec.norm)]
    at = np.full(n, above(spec.eps) if norms is None and spec.eps else norms or 0.0)
    columns = {
        "label": np.zeros(n, np.int32),
        "clean_prediction": clean,
        "adversarial_prediction": adversarial,
        "rounded_prediction": adversarial,
        "l2": at,
        "linf": at,
    }
    return Judged(threat_model=threat, spec=spec, columns=columns)


FGSM = "fgsm:eps=0.1"


@pytest.mark.parametrize(
    ("step", "iterated"),
    [(FGSM, "bim:eps=0.1"), (FGSM, "pgd:eps=0.1,steps=40"), (f"{FGSM},norm=l2", "apgd:eps=0.1,norm=l2")],
)
@pytest.mark.parametrize(
    ("single", "weaker", "fires"),
    [
        (range(50), range(42), True),  # eight more: p = 0.0078
        (range(50), range(43), False),  # seven more: p = 0.016
        (range(42), range(50), False),
        (range(50), range(50), False),
        (range(N), range(N), False),
        (range(0), range(0), False),
        (range(60), range(30, 90), False),  # 30 each way
    ],
)
def test_iterative_weaker_than_single_step(step: str, iterated: str, single: range, weaker: range, fires: bool) -> None:
    judged = (evaluation("white_box", step, single), evaluation("white_box", iterated, weaker))
    assert names(judged=judged) == ({SINGLE} if fires else set())
    assert names(judged=judged[::-1]) == ({SINGLE} if fires else set())
    made = flags(clean_probe(), judged)[0]
    assert made.attacks == ((str(judged[1].spec),) if fires else ())
    assert str(judged[1].spec) in made.measured


@pytest.mark.parametrize(
    "other",
    [
        evaluation("white_box", "pgd:eps=0.05", range(10)),
        evaluation("white_box", "pgd:eps=0.1,norm=l2", range(10)),
        evaluation("white_box", "noise:eps=0.1", range(10)),
        evaluation("white_box", "square:eps=0.1", range(10)),
        evaluation("white_box", "adaptive:eps=0.1", range(10)),
        evaluation("white_box", "pgd:eps=0.1,target=random", range(10)),
        evaluation("white_box", "ddn", range(10), norms=0.1),
    ],
    ids=lambda j: str(j.spec),
)
def test_what_a_single_step_is_not_compared_with(other: Judged) -> None:
    judged = (evaluation("white_box", FGSM, range(50)), other)
    assert names(judged=judged) == set()
    assert "Not measurable" in flags(clean_probe(), judged)[0].measured


def test_single_step_examples_may_transfer_better() -> None:
    judged = (evaluation("transfer", FGSM, range(50)), evaluation("transfer", "pgd:eps=0.1", range(10)))
    assert names(judged=judged) == set()


@pytest.mark.parametrize("threat", ["black_box", "transfer", "transfer:vgg16", "grey_box", "random"])
@pytest.mark.parametrize(
    ("theirs", "white", "fires"),
    [
        (range(50), range(42), True),
        (range(50), range(43), False),
        (range(42), range(50), False),
        (range(N), range(N), False),
        (range(0), range(0), False),
    ],
)
def test_others_stronger_than_white_box(threat: str, theirs: range, white: range, fires: bool) -> None:
    judged = (evaluation(threat, "bim:eps=0.1", theirs), evaluation("white_box", "pgd:eps=0.1", white))
    assert names(judged=judged) == ({OTHERS} if fires else set())
    made = flags(clean_probe(), judged)[1]
    assert made.attacks == ((f"{threat} {judged[0].spec}",) if fires else ())


def test_what_fires_is_not_buried_under_what_does_not() -> None:
    strong, *weak = (evaluation("transfer", f"bim:eps=0.1,steps={i}", range(50 if i == 1 else 2)) for i in range(1, 5))
    white = evaluation("white_box", "pgd:eps=0.1", range(10))
    said = flags(clean_probe(), (strong, *weak, white))[1].measured
    assert said.count("breaks 40 of") == said.count("breaks") - 1 == 1
    assert said.endswith("none of 3 others breaks significantly more")
    assert "others" not in flags(clean_probe(), (strong, white))[1].measured
    assert flags(clean_probe(), (*weak, white))[1].measured.count("breaks 0 of") == 3


def test_white_box_attacks_count_together() -> None:
    parts = (
        evaluation("white_box", "pgd:eps=0.1", range(30)),
        evaluation("white_box", FGSM, range(30, 50)),
    )
    other = evaluation("transfer", "bim:eps=0.1", range(50))
    assert OTHERS in names(judged=(*parts[:1], other))
    assert OTHERS not in names(judged=(*parts, other))


@pytest.mark.parametrize(
    ("white", "fires"),
    [
        (("pgd:eps=0.1", {}), True),
        (("pgd:eps=0.2", {}), True),  # a larger budget, and still weaker
        (("pgd:eps=0.05", {}), False),  # a smaller one may be weaker
        (("pgd:eps=0.1,norm=l2", {}), False),
    ],
)
def test_budgets_that_are_compared(white: tuple[str, dict[str, Any]], fires: bool) -> None:
    judged = (
        evaluation("transfer", "bim:eps=0.1", range(50)),
        evaluation("white_box", white[0], range(10), **white[1]),
    )
    assert names(judged=judged) == ({OTHERS} if fires else set())
    assert ("Not measurable" in flags(clean_probe(), judged)[1].measured) is not fires


@pytest.mark.parametrize(("norm_found", "fires"), [(0.4, False), (0.5, False), (0.6, True)])
def test_minimal_norm_attacks_count_within_the_budget_of_the_other(norm_found: float, fires: bool) -> None:
    judged = (
        evaluation("transfer", "pgd:eps=0.5,norm=l2", range(50)),
        evaluation("white_box", "ddn", range(N), norms=norm_found),
        evaluation("white_box", "pgd:eps=2,norm=l2", range(5), norms=2.0),
    )
    assert names(judged=judged) == ({OTHERS} if fires else set())
    # two of them are compared at any norm
    judged = (evaluation("transfer", "ddn", range(50), norms=9.0), evaluation("white_box", "cw", range(40), norms=1.0))
    assert names(judged=judged) == {OTHERS}
    judged = (evaluation("transfer", "ddn", range(50), norms=9.0), evaluation("white_box", "cw", range(50), norms=1.0))
    assert names(judged=judged) == set()


def test_what_is_wrong_without_an_attack_is_broken_for_everyone() -> None:
    """The single step happens to leave eight samples wrong that an iterative attack sets right by accident."""
    wrong = range(8)
    judged = (
        evaluation("white_box", FGSM, range(8), clean_wrong=wrong),
        evaluation("white_box", "pgd:eps=0.1", range(0), clean_wrong=wrong),
        evaluation("random", "noise:eps=0.1", range(8), clean_wrong=wrong),
    )
    assert names(judged=judged) == set()


def test_few_samples_decide_nothing() -> None:
    judged = (
        evaluation("white_box", FGSM, range(4), n=4),
        evaluation("white_box", "pgd:eps=0.1", range(0), n=4),
        evaluation("random", "noise:eps=0.1", range(4), n=4),
    )
    measured = clean_probe(
        n=2,
        clean_correct=2,
        zero_gradients={"n": 2, "cross_entropy": ALIVE, "margin": ALIVE},
        accuracy_by_eps=runs("eps", {0.1: 1, 0.2: 2, 1.0: 0}, n=2),
        accuracy_by_steps=runs("steps", {5: 1, 20: 2, 50: 2}, n=2),
    )
    assert names(measured, judged) == set()


def test_without_evaluations_nothing_can_be_compared() -> None:
    made = {f.name: f for f in flags(clean_probe(), [])}
    assert list(made) == NAMES
    for name in (SINGLE, OTHERS, "active_test_failed"):
        assert not made[name].fired
        assert made[name].measured.startswith("Not measurable")


def test_other_samples_cannot_be_compared() -> None:
    mine, other = evaluation("white_box", FGSM, range(5)), evaluation("random", "noise:eps=0.1", range(5), n=99)
    with pytest.raises(ValueError, match=r"random noise:eps=0\.1 was judged on other samples than fgsm:eps=0\.1"):
        flags(clean_probe(), [mine, other])


def test_active_tests_that_fail_are_named() -> None:
    def result(attack: str, passed: bool | None) -> dict[str, Any]:
        return {
            "attack": attack,
            "parts": [attack],
            "norm": "linf",
            "eps": 0.1,
            "n": 16,
            "left_out": 1,
            "found": 3,
            "random_found": 2,
            "passed": passed,
        }

    active = [result("a", True), result("b", False), result("c", None), result("d", False)]
    made = flags(clean_probe(), [], active)
    assert {f.name for f in made if f.fired} == {"active_test_failed"}
    assert made[-1].attacks == ("b", "d")
    assert made[-1].to_dict()["attacks"] == ["b", "d"]
    assert "b found 3 of 16" in made[-1].measured
    assert names(active=[result("a", True), result("c", None)]) == set()
