"""The active test: an attack that works finds what was planted, and one that does not is found out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flagged_networks import (
    EPS,
    ITERATED,
    STRONG,
    Batch,
    Table,
    Then,
    clean_probe,
    grey,
    quantised,
    same,
    seeded,
    small_linear,
)
from torch import Tensor, nn

from components.attacks import apgd, fab
from components.attacks.common import loss_gradient
from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.spec import AttackSpec
from components.evaluation import active_test as evaluation_active_test
from components.evaluation.active_test import active_test
from components.evaluation.flags import flags
from components.evaluation.judge import AttackViolation, judge
from components.evaluation.probe import probe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["honest", "robust"])
@pytest.mark.parametrize("text", ITERATED)
def test_an_attack_that_works_finds_what_was_planted(
    name: str, text: str, request: pytest.FixtureRequest, test_images: Batch
) -> None:
    spec = AttackSpec.parse(text)
    result = active_test(
        request.getfixturevalue(name), test_images[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1)
    )
    assert (result["n"], result["found"], result["left_out"], result["passed"]) == (16, 16, 0, True)
    assert result["random_found"] <= 4  # measured: 0 to 2; a test that chance passes shows nothing
    assert (result["attack"], result["norm"], result["eps"]) == (str(spec), spec.norm, spec.eps or 1.5)


@pytest.mark.parametrize("target", ["random", "least_likely", "runner_up"])
@pytest.mark.parametrize("text", ["pgd:eps=0.3,steps=20", "ddn:steps=20", "cw:steps=20,binary_search_steps=3"])
def test_a_targeted_attack_is_tested_with_the_class_that_is_planted(
    text: str, target: str, honest: nn.Module, test_images: Batch
) -> None:
    """No other can win there: aimed at those, every attack would look broken."""
    spec = AttackSpec.parse(f"{text},target={target}")
    result = active_test(honest, test_images[0][:8], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert (result["n"], result["found"], result["passed"]) == (8, 8, True)
    assert result["attack"] == str(spec)
    assert result["parts"] == [str(AttackSpec.parse(f"{text},target=runner_up"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "noise:eps=0.1",
        "noise:eps=1.5,norm=l2",
        "pgd:eps=0.1,steps=20,step_size=0.0001",
        "bim:eps=0.3,steps=1,step_size=0.01",
        "cw:lr=0.001,binary_search_steps=2",
        "cw:lr=0.001,binary_search_steps=2,target=least_likely",
    ],
)
def test_an_attack_that_does_not_work_is_found_out(text: str, honest: nn.Module, test_images: Batch) -> None:
    spec = AttackSpec.parse(text)
    result = active_test(honest, test_images[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert result["passed"] is False
    assert result["found"] <= 4
    assert result["high"] < result["threshold"]


@pytest.mark.slow
@pytest.mark.parametrize("text", STRONG)
def test_the_attacks_of_autoattack_find_what_was_planted_and_do_not_where_they_are_broken(
    text: str, honest: nn.Module, test_images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested(text: str) -> dict[str, Any]:
        return active_test(honest, test_images[0][:8], AttackSpec.parse(text), eps=0.1, generator=seeded(1))

    result = tested(text)
    assert (result["n"], result["passed"]) == (8, True)
    assert result["random_found"] <= 3

    def downhill(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradient, logits, losses = loss_gradient(*arguments)
        return -gradient, logits, losses

    monkeypatch.setattr(apgd, "loss_gradient", downhill)
    monkeypatch.setattr(fab, "loss_gradient", downhill)
    result = tested(text.replace("queries=1000", "queries=2"))
    assert (result["n"], result["passed"]) == (8, False)


@pytest.mark.slow
def test_autoattack_does_not_pass_by_its_square_alone(honest: nn.Module, test_images: Batch) -> None:
    """Square finds what is planted behind a quantiser, too; it says so under its own name."""

    def tested(text: str) -> dict[str, Any]:
        return active_test(quantised(honest), test_images[0][:8], AttackSpec.parse(text), eps=0.1, generator=seeded(1))

    mixture = tested("autoattack:eps=0.1,steps=5,queries=1000")
    parts = ("apgd:eps=0.1,steps=5", "apgd-t:eps=0.1,steps=5", "fab-t:steps=5")
    assert mixture["parts"] == [str(AttackSpec.parse(part)) for part in parts]
    assert mixture["passed"] is False
    (failed,) = [f for f in flags(clean_probe(), [], [mixture]) if f.fired]
    assert "(without its Square) found 0 of 8" in failed.measured
    assert tested("square:eps=0.1,queries=1000")["passed"] is not False


PGD = AttackSpec.parse("pgd:eps=0.1,steps=20")


def spied(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[Any, ...]]:
    """Record what the attack is given; ``change(clean, examples)`` is what it returns."""
    seen: list[tuple[Any, ...]] = []

    def attack(
        spec: AttackSpec, model: nn.Module, fast: nn.Module | None, inputs: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        seen.append((model, inputs, labels, {"fast": fast, **options}))
        return change(inputs, run_attack_on_copy(spec, model, fast, inputs, labels, **options))

    monkeypatch.setattr(evaluation_active_test, "run_attack_on_copy", attack)
    return seen


@pytest.mark.parametrize("text", ["pgd:eps=0.1,steps=20", "ddn:steps=5"])
def test_the_planted_network(text: str, monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch) -> None:
    seen = spied(monkeypatch, lambda clean, examples: examples)
    spec = AttackSpec.parse(text)
    active_test(honest, test_images[0][:8], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert len(seen) == 8
    for i, (model, inputs, labels, options) in enumerate(seen):
        torch.testing.assert_close(inputs, test_images[0][i : i + 1], rtol=0, atol=0)
        assert labels.tolist() == [0]
        assert options["stop_on_success"] is (spec.name == "pgd")
        at = torch.cat([inputs, torch.rand(200, 1, 28, 28, generator=seeded(3))])
        with torch.no_grad():
            logits, own = model(at), honest(inputs)
        assert logits.shape == (201, 10)  # as many as the network has
        assert logits[0].argmax() == 0
        assert bool((logits.argmax(dim=1) < 2).all())
        assert bool((logits[:, 2:] == logits[0, 2]).all())
        # not surer of the clean image than the network itself
        assert 0 < float(logits[0, 0] - logits[0, 1]) <= float(own.topk(2).values.diff().abs()) * 1.001


def test_the_attack_searches_on_the_stand_in_and_the_network_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    seen = spied(monkeypatch, lambda clean, examples: examples)
    judges: list[nn.Module] = []

    def judging(model: nn.Module, *batch: Tensor) -> Any:
        judges.append(model)
        return judge(model, *batch)

    monkeypatch.setattr(evaluation_active_test, "judge", judging)

    def tested(fast: nn.Module | None, text: str = "ddn:steps=20") -> dict[str, Any]:
        return active_test(honest, test_images[0][:8], AttackSpec.parse(text), eps=1.5, fast=fast, generator=seeded(1))

    assert tested(None)["found"] == 8
    seen.clear()
    judges.clear()
    # its logits are larger, so what is found just over its boundary is not over the network's, and is searched for again
    near = Then(honest, same, lambda z: 1.05 * z)
    assert tested(near)["found"] == 8
    for (planted, clean, _, options), judged in zip(seen, judges, strict=True):
        assert planted.model is judged.model is honest
        assert options["fast"].model is near
        at = torch.cat([clean, test_images[0]])
        torch.testing.assert_close(options["fast"].on(honest)(at), planted(at), rtol=0, atol=0)
    # without a gradient nothing is found, although the network has one
    assert tested(quantised(honest))["found"] == 0


def test_inner_points_are_class_0_and_the_planted_one_is_not(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    made: list[tuple[str, Tensor]] = []
    around = evaluation_active_test.points_around

    def spy(clean: Tensor, eps: float, norm: Any, n: int, generator: Any) -> Tensor:
        points = around(clean, eps, norm, n, generator)
        made.append((f"{eps:.4g}", points))
        return points

    monkeypatch.setattr(evaluation_active_test, "points_around", spy)
    for norm, eps in (("linf", 0.1), ("l2", 1.5)):
        made.clear()
        clean = test_images[0][:1]
        planted = evaluation_active_test.plant(honest, clean, eps, norm, 32, seeded(4), 64)
        assert planted is not None
        (inner_eps, inner), (outer_eps, outer) = made
        assert (inner_eps, outer_eps) == (f"{0.95 * eps:.4g}", f"{eps:.4g}")
        assert len(inner) == 31
        with torch.no_grad():
            assert planted(torch.cat([clean, inner])).argmax(dim=1).tolist() == [0] * 32
            assert 1 in planted(outer).argmax(dim=1)
        order = math.inf if norm == "linf" else 2
        for points, distance in ((inner, 0.95 * eps), (outer, eps)):
            norms = torch.linalg.vector_norm((points - clean).double().flatten(1), ord=order, dim=1)
            assert norms.max() <= distance * (1 + 1e-6)
            assert norms.min() > 0.97 * distance
            assert points.min() >= 0
            assert points.max() <= 1


def test_an_example_beyond_eps_is_not_found(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    spec = AttackSpec.parse("ddn:steps=20")
    norms: list[float] = []

    def lengthen(clean: Tensor, examples: Tensor) -> Tensor:
        delta = examples - clean
        longer = (clean + delta * (2.5 / delta.norm())).clamp(0, 1)
        norms.append(float((longer - clean).norm()))
        return longer

    spied(monkeypatch, lengthen)
    result = active_test(honest, test_images[0][:8], spec, eps=1.5, generator=seeded(1))
    assert min(norms) > 1.51
    assert (result["n"], result["found"], result["passed"]) == (8, 0, False)


def test_an_attack_that_breaks_its_rules_is_an_error(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    spied(monkeypatch, lambda clean, examples: (clean + 0.2).clamp(0, 1))
    with pytest.raises(AttackViolation, match="sample 0 "):
        active_test(honest, test_images[0][:8], PGD, eps=0.1, generator=seeded(1))


def test_where_chance_finds_everything_nothing_is_decided() -> None:
    """Four pixels: 100 random corners hit the planted one."""
    grey_images = grey(16)[0]
    result = active_test(small_linear(), grey_images, PGD, eps=0.1, generator=seeded())
    assert (result["n"], result["found"], result["random_found"], result["passed"]) == (16, 16, 16, None)
    result = active_test(small_linear(), grey_images, AttackSpec.parse("noise:eps=0.1"), eps=0.1, generator=seeded())
    assert result["random_found"] == 16
    assert result["passed"] is False  # failing says enough


def test_too_few_images_decide_nothing(honest: nn.Module, test_images: Batch) -> None:
    for n, noise, pgd_ in ((7, None, None), (8, False, True)):
        for text, passed in (("noise:eps=0.1", noise), ("pgd:eps=0.1,steps=20", pgd_)):
            spec = AttackSpec.parse(text)
            assert active_test(honest, test_images[0][:n], spec, eps=0.1, generator=seeded())["passed"] is passed


@pytest.mark.parametrize("images", [0, 9])
def test_a_constant_network_has_nothing_to_be_planted_in(images: int) -> None:
    model = Table(lambda m: torch.tensor([[2.0, 1.0]]) + 0 * m[:, None])
    result = active_test(model, grey(images)[0], PGD, eps=0.1, generator=seeded())
    assert (result["n"], result["left_out"], result["found"]) == (0, images, 0)
    assert (result["share"], result["random_share"], result["passed"]) == (None, None, None)
    assert (result["low"], result["high"]) == (0, 1)


def test_the_same_generator_gives_the_same_result_and_the_model_stays_as_it_is(
    honest: nn.Module, test_images: Batch
) -> None:
    before = {name: value.clone() for name, value in honest.state_dict().items()}
    first, second = (
        (
            probe(honest, *test_images, eps=EPS, norm="linf", generator=seeded(5)),
            active_test(honest, test_images[0][:8], AttackSpec.parse("noise:eps=0.3"), eps=0.3, generator=seeded(5)),
        )
        for _ in range(2)
    )
    assert first == second
    assert not honest.training
    for name, parameter in honest.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("pgd:eps=0.1", {"eps": 0.2}, "eps=0.2"),
        ("ddn", {"eps": 0.0}, "eps=0.0"),
        ("ddn", {"eps": 1.0, "n_inner": 1}, "n_inner=1"),
        ("ddn", {"eps": 1.0, "inputs": 2 * torch.ones(2, 1, 2, 2)}, "in \\[0,1\\]"),
        ("ddn", {"eps": 1.0, "model": Table(lambda m: m[:, None])}, "K >= 2"),
    ],
)
def test_active_test_refuses(spec: str, change: dict[str, Any], message: str) -> None:
    arguments = {"model": small_linear(), "inputs": grey(2)[0], **change}
    with pytest.raises(ValueError, match=message):
        active_test(arguments.pop("model"), arguments.pop("inputs"), AttackSpec.parse(spec), **arguments)
