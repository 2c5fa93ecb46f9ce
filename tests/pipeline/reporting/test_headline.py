"""The verdict of a run says what the tests of significance of its record say."""

from __future__ import annotations

from typing import Any

import fake_run
import pytest

from components.config import EvaluationConfig, Experiment, TrainConfig
from components.evaluation.statistics import wilson_interval
from components.fields import to_dict
from pipeline.records import RunRecord
from pipeline.reporting import headline
from pipeline.reporting.headline import Verdict, verdict

MODELS = fake_run.experiment().models
N = 200


def evaluation(model: str, threat: str, attack: str, right: int, n: int = N) -> dict[str, Any]:
    low, high = wilson_interval(right, n)
    metrics = {"accuracy": right / n, "accuracy_low": low, "accuracy_high": high}
    source = model if threat == "white_box" else None
    return {"model": model, "source": source, "threat_model": threat, "attack": attack, "n": n, "metrics": metrics}


def worst(model: str, eps: float, right: int, n: int = N) -> dict[str, Any]:
    low, high = wilson_interval(right, n)
    case = {"model": model, "threat_model": "white_box", "norm": "linf", "eps": eps, "n": n, "attacks": 2}
    return {**case, "accuracy": right / n, "accuracy_low": low, "accuracy_high": high}


def pair(eps: float, only_model: int, only_control: int, p: float, model: str = "defend") -> dict[str, Any]:
    case = {"model": model, "against": "control", "threat_model": "white_box", "norm": "linf", "eps": eps, "n": N}
    return {**case, "only_model": only_model, "only_against": only_control, "p": p}


def run(
    *pairs: dict[str, Any],
    left: dict[str, dict[float, int]],
    models: tuple[str, ...] = MODELS,
    clean: int = 190,
    **more: Any,
) -> RunRecord:
    """Return a run with these worst cases: model -> eps -> images that are left."""
    evaluations = [evaluation(model, "clean", "none", clean) for model in left]
    evaluations += [
        evaluation(m, "white_box", f"pgd:eps={eps}", right) for m, r in left.items() for eps, right in r.items()
    ]
    experiment = Experiment(name="x", models=models, evaluation=EvaluationConfig(test_images=N))
    return RunRecord.from_json(
        {
            "name": "x",
            "experiment": to_dict(experiment),
            "evaluations": evaluations,
            "worst_case": [worst(m, eps, right) for m, r in left.items() for eps, right in r.items()],
            "worst_case_pairs": list(pairs),
            **more,
        }
    )


def said(record: RunRecord, *comparisons: dict[str, Any]) -> tuple[str, str]:
    found = verdict(record, comparisons)
    return found.headline, " ".join(found.reasons)


@pytest.mark.parametrize(
    ("pairs", "left", "phrase"),
    [
        ([pair(0.2, 0, 0, 1.0)], {0.2: (0, 0)}, "not more robust than its control here"),
        ([pair(0.2, 40, 2, 1e-9)], {0.2: (60, 22)}, "more robust than its control here"),
        ([pair(0.2, 0, 16, 3e-5)], {0.2: (0, 16)}, "less robust than its control here"),
        ([pair(0.2, 9, 5, 0.42)], {0.2: (14, 10)}, "not distinguishable in robustness from its control here"),
        (
            [pair(0.1, 40, 2, 1e-9), pair(0.2, 0, 16, 3e-5)],
            {0.1: (60, 22), 0.2: (0, 16)},
            "more robust at one budget and less robust at another than its control here",
        ),
        # Of two tests, each counts below 0.025.
        (
            [pair(0.1, 10, 2, 0.04), pair(0.2, 0, 0, 1.0)],
            {0.1: (12, 4), 0.2: (0, 0)},
            "not distinguishable in robustness",
        ),
        ([pair(0.1, 10, 2, 0.04)], {0.1: (12, 4)}, "more robust than its control here"),
    ],
)
def test_the_verdict_is_that_of_mcnemars_test(
    pairs: list[Any], left: dict[float, tuple[int, int]], phrase: str
) -> None:
    record = run(*pairs, left={m: {eps: k[i] for eps, k in left.items()} for i, m in enumerate(("defend", "control"))})
    title, reasons = said(record)
    assert title.startswith(f"defend (Defend++) is {phrase}")
    for eps, (ours, theirs) in left.items():
        if ours == theirs == 0:
            assert f"At Linf ≤ {eps}, white-box PGD leaves 0 of 200 images of both defend and control." in reasons
        else:
            assert (
                f"At Linf ≤ {eps}, white-box attacks leave {ours} of 200 images of defend and {theirs} of 200"
                in reasons
            )
    assert "There is one seed per model." in reasons


def test_of_several_tests_the_sentence_names_the_level() -> None:
    left = {"defend": {0.1: 12, 0.2: 0}, "control": {0.1: 4, 0.2: 0}}
    _, reasons = said(run(pair(0.1, 10, 2, 0.04), pair(0.2, 0, 0, 1.0), left=left))
    assert "(no significant difference: exact McNemar test, p = 0.04; with 2 budgets it must be below 0.025)" in reasons
    _, reasons = said(run(pair(0.1, 10, 9, 0.9), pair(0.2, 0, 0, 1.0), left=left))
    assert "must be below" not in reasons


def test_a_higher_number_under_attacks_that_fail_is_doubted() -> None:
    test = {"n": 8, "found": 1, "share": 0.1, "random_found": 0, "passed": False}
    flag = {"name": "zero_gradients", "fired": True, "measured": "", "remedy": ""}
    for tests in ({"active": {"pgd:eps=0.2": test}}, {"flags": [flag]}):

        def title(ours: int, theirs: int, doubted: str, tests: dict[str, Any] = tests) -> str:
            left = {"defend": {0.2: ours}, "control": {0.2: theirs}}
            return said(run(pair(0.2, ours, theirs, 1e-9), left=left, reliability={doubted: tests}))[0]

        assert "is apparently more robust, but under attacks that cannot be trusted, than" in title(60, 22, "defend")
        assert title(60, 22, "control").endswith("is more robust than its control here"), "the control may have less"
        assert title(22, 60, "defend").endswith("is less robust than its control here"), "it may have less still"
        assert "is apparently less robust, but under attacks that cannot be trusted, than" in title(22, 60, "control")


def test_a_control_that_guesses_says_nothing_about_a_model() -> None:
    record = run(pair(0.2, 40, 2, 1e-9), left={"defend": {0.2: 60}, "control": {0.2: 22}}).to_json()
    clean = [evaluation("defend", "clean", "none", 190), evaluation("control", "clean", "none", 20)]
    attacks = [e for e in record["evaluations"] if e["threat_model"] != "clean"]
    title, reasons = said(RunRecord.from_json({**record, "evaluations": [*clean, *attacks]}))
    assert title == (
        "defend (Defend++) cannot be compared with its control, which cannot be told from guessing on clean images"
    )
    assert "leave" not in reasons


def test_without_white_box_results_robustness_is_not_compared() -> None:
    record = run(left={"defend": {}, "control": {}}).to_json()
    transferred = [
        {**evaluation(model, "transfer", "fgsm:eps=0.2", 100), "source": "no_defense"}
        for model in ("defend", "control")
    ]
    record["evaluations"] += transferred
    title, _ = said(RunRecord.from_json(record))
    assert title.startswith("defend (Defend++) is not compared with its control")


def test_a_model_that_guesses_has_no_verdict() -> None:
    title, reasons = said(run(pair(0.2, 40, 2, 1e-9), left={"defend": {0.2: 60}, "control": {0.2: 22}}, clean=20))
    assert title == "defend cannot be told from guessing on clean images, so its robustness means nothing"
    assert "cannot be told from chance (10.0 %): control 10.0 %, defend 10.0 % (n = 200)" in reasons
    assert "leave" not in reasons


def test_models_with_one_verdict_share_a_sentence() -> None:
    models = (*MODELS, "adv:defense=adversarial,seed=1", "other:seed=2")
    left = {"defend": {0.2: 0}, "control": {0.2: 0}, "adv": {0.2: 150}, "other": {0.2: 0}}
    pairs = [pair(0.2, 0, 0, 1.0), pair(0.2, 150, 0, 1e-30, "adv"), pair(0.2, 0, 0, 1.0, "other")]
    title, reasons = said(run(*pairs, left=left, models=models))
    assert title == (
        "defend and other are not more robust than their control here; adv is more robust than its control here"
    )
    assert "corrected for the number of budgets, not for the number of models" in reasons


def test_without_a_control_nothing_is_attributed_to_the_defense() -> None:
    models = tuple(m for m in MODELS if not m.startswith("control"))
    title, reasons = said(run(left={"defend": {0.2: 50}}, models=models))
    assert title == "defend withstands the attacks on 50 of 200 images at Linf ≤ 0.2"
    assert "nothing of that can be attributed to the defense" in reasons
    assert "25.0 % (19.5–31.4) at Linf ≤ 0.2. Without an attack, 190 of 200 are right." in reasons


def test_an_external_model_is_compared_with_nothing() -> None:
    net = TrainConfig(defense="none", epochs=0, shared_blocks=1, pretrained="/x/net.pth")
    record = run(left={"net": {8 / 255: 50}})
    record = RunRecord.from_json(
        {**record.to_json(), "experiment": to_dict(Experiment(name="x", models=("net",), train=net))}
    )
    title, reasons = said(record)
    assert title == "net withstands the attacks on 50 of 200 images at Linf ≤ 8/255"
    assert "control" not in reasons
    assert "seed" not in reasons
    broken = RunRecord.from_json({**record.to_json(), "worst_case": [worst("net", 8 / 255, 0)]})
    assert said(broken)[0] == "net is broken on all 200 images at Linf ≤ 8/255"


def test_a_record_without_worst_cases_compares_intervals() -> None:
    """Records of early revisions have none."""
    record = run(left={"defend": {0.2: 60}, "control": {0.2: 22}}).to_json()
    old = RunRecord.from_json({k: v for k, v in record.items() if not k.startswith("worst_case")})
    title, reasons = said(old)
    assert title.endswith("is more robust than its control here")
    assert "leaves 60 of 200 images of defend; the most harmful attack on control leaves 22 of 200." in reasons
    assert headline.main_budget(old) is None
    damaged = RunRecord.from_json({**record, "worst_case": [], "worst_case_pairs": [pair(0.2, 40, 2, 1e-9)]})
    assert said(damaged) == (title, reasons)


def over_seeds(*seeds: dict[str, dict[float, int]], pairs: tuple[dict[str, Any], ...] = (), **more: Any) -> RunRecord:
    """Return a run of several seeds: model -> eps -> images that are left, of each seed."""
    left = {f"{model}-s{i}": eps for i, models in enumerate(seeds) for model, eps in models.items()}
    record = run(*pairs, left=left, **more)
    return RunRecord.from_json({**record.to_json(), "experiment": {**to_dict(record.experiment), "seeds": len(seeds)}})


def both(ours: int, theirs: int) -> dict[str, dict[float, int]]:
    return {"defend": {0.2: ours}, "control": {0.2: theirs}}


def test_over_seeds_a_difference_must_exceed_their_spread() -> None:
    title, reasons = said(over_seeds(both(60, 20), both(62, 21), both(64, 20)))
    assert title.endswith("is more robust than its control here")
    assert "31.0 % on average over 3 seeds, +20.8 points against control" in reasons
    assert "one seed" not in reasons
    title, reasons = said(over_seeds(both(60, 20), both(10, 40), both(30, 35)))
    assert "not distinguishable in robustness from" in title
    assert "no more than seeds alone explain" in reasons


def test_over_seeds_the_interval_is_wider_with_more_budgets() -> None:
    def of(budgets: tuple[float, ...]) -> tuple[str, str]:
        seeds = ((50, 40), (48, 40), (46, 40))
        left = [{"defend": dict.fromkeys(budgets, a), "control": dict.fromkeys(budgets, b)} for a, b in seeds]
        return said(over_seeds(*left))

    assert of((0.2,))[0].endswith("is more robust than its control here")
    title, reasons = of((0.1, 0.2, 0.3))
    assert "not distinguishable in robustness from" in title
    assert "95 % for 3 budgets together" in reasons


def test_over_seeds_one_image_more_in_each_seed_is_no_difference() -> None:
    """The spread is 0 then, so that seeds alone would not explain it."""

    def pairs(only_model: int, p: float) -> tuple[dict[str, Any], ...]:
        return tuple({**pair(0.2, only_model, 0, p, f"defend-s{i}"), "against": f"control-s{i}"} for i in range(2))

    title, reasons = said(over_seeds(both(11, 10), both(11, 10), pairs=pairs(1, 1.0)))
    assert "not distinguishable in robustness from" in title
    assert "more than seeds alone explain, but too few images to be significant" in reasons
    title, _ = said(over_seeds(both(30, 10), both(30, 10), pairs=pairs(20, 2e-6)))
    assert title.endswith("is more robust than its control here")


def test_a_seed_without_a_partner_gives_no_comparison() -> None:
    title, _ = said(over_seeds(both(60, 20), {"defend": {0.2: 62}}))
    assert title.startswith("defend (Defend++) is not compared with its control")


def test_over_seeds_a_model_without_a_control_has_the_mean_of_its_seeds() -> None:
    models = tuple(m for m in MODELS if not m.startswith("control"))
    title, reasons = said(over_seeds({"defend": {0.2: 50}}, {"defend": {0.2: 70}}, models=models))
    assert title == "defend withstands the attacks on 30.0 % of the images on average over 2 seeds at Linf ≤ 0.2"
    assert "(lowest to highest seed): 30.0 % (25.0–35.0) at Linf ≤ 0.2." in reasons
    assert "Without an attack, 95.0 % on average are right." in reasons
    title, _ = said(over_seeds({"defend": {0.2: 0}}, {"defend": {0.2: 0}}, models=models))
    assert title == "defend is broken on all images in all 2 seeds at Linf ≤ 0.2"


def test_the_only_seed_that_is_left_is_shown_by_its_own_name() -> None:
    models = tuple(m for m in MODELS if not m.startswith("control"))
    title, reasons = said(over_seeds({}, {"defend": {0.2: 50}}, models=models))
    assert title == "defend-s1 withstands the attacks on 50 of 200 images at Linf ≤ 0.2"
    assert "(95 % interval): 25.0 % (19.5–31.4) at Linf ≤ 0.2." in reasons


def test_without_a_control_failed_attacks_are_doubted_unless_they_break_the_model() -> None:
    models = tuple(m for m in MODELS if not m.startswith("control"))
    flag = {"name": "zero_gradients", "fired": True, "measured": "", "remedy": ""}
    for right, doubted in ((50, True), (0, False)):
        record = run(left={"defend": {0.2: right}}, models=models, reliability={"defend": {"flags": [flag]}})
        assert said(record)[0].endswith(", but its attacks cannot be trusted") == doubted


def test_transfer_says_where_a_difference_shows() -> None:
    def row(attack: str, ours: int, theirs: int, p: float) -> dict[str, Any]:
        names = {"defended": "defend", "control": "control", "source": "no_defense", "attack": attack}
        return {**names, "only_defended": ours, "only_control": theirs, "p": p}

    record = run(pair(0.2, 0, 0, 1.0), left={"defend": {0.2: 0}, "control": {0.2: 0}})
    fgsm, cw = row("fgsm:eps=0.2", 40, 3, 1e-6), row("cw:steps=20", 2, 30, 1e-6)
    both = "right significantly more often than control under FGSM, and less often than control under C&W (2 attacks"
    assert both in said(record, fgsm, cw)[1]
    none = said(record, row("fgsm:eps=0.2", 5, 3, 0.7))[1]
    assert "no difference between defend and control is significant (1 attack compared)." in none


def test_few_images_are_said_to_be_few() -> None:
    def with_n(n: int) -> str:
        record = run(pair(0.2, 1, 0, 1.0), left={"defend": {0.2: 1}, "control": {0.2: 0}}).to_json()
        record["worst_case"] = [{**w, "n": n} for w in record["worst_case"]]
        return said(RunRecord.from_json(record))[1]

    assert "With n = 12, a difference shows only from 6 images on, all in one direction." in with_n(12)
    assert "a difference shows only" not in with_n(200)


def test_the_main_budget_leaves_something_of_a_model() -> None:
    record = run(left={"defend": {0.1: 0, 0.3: 0}, "control": {0.1: 9, 0.3: 0}})
    assert headline.main_budget(record) == ("linf", 0.1)
    nothing = run(left={"defend": {0.1: 0, 0.3: 0}, "control": {0.1: 0, 0.3: 0}})
    assert headline.main_budget(nothing) == ("linf", 0.1), "the smaller one"


def test_before_any_attack_there_is_no_verdict() -> None:
    record = run(left={})
    assert verdict(record, []) == Verdict("", [])
