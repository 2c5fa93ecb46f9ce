"""Phases and learning rates: pure functions of step and config, checked at every step of small runs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from components.config import TrainConfig
from components.training.schedule import Phase, learning_rate, phase_at_epoch


def alternating(cycles: int, autoencoder: int, classifier: int, joint: int) -> TrainConfig:
    return TrainConfig(
        schedule="alternating",
        cycles=cycles,
        autoencoder_epochs=autoencoder,
        classifier_epochs=classifier,
        epochs=cycles * (autoencoder + classifier) + joint,
    )


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("joint", [0, 1, 4])
def test_alternating_phases_in_order_and_number(cycles: int, joint: int) -> None:
    for autoencoder, classifier in itertools.product((1, 2, 5), (1, 3)):
        config = alternating(cycles, autoencoder, classifier, joint)
        expected: list[Phase] = []
        for _ in range(cycles):
            expected += ["autoencoder"] * autoencoder
            expected += ["classifier"] * classifier
        expected += ["joint"] * joint
        assert [phase_at_epoch(e, config) for e in range(config.epochs)] == expected
        # The last phase goes on after the last epoch.
        assert phase_at_epoch(10 * config.epochs, config) == "joint"


def test_joint_and_undefended_have_one_phase() -> None:
    assert {phase_at_epoch(epoch, TrainConfig(epochs=5)) for epoch in range(5)} == {"joint"}
    assert {phase_at_epoch(epoch, TrainConfig(epochs=5, defense="none")) for epoch in range(5)} == {"classifier"}


def test_phases_on_examples_come_last_and_replace_those_on_clean_images() -> None:
    on_examples = {"adversarial_training": True, "adversarial_epochs": 4}
    config = dataclasses.replace(alternating(2, 1, 1, 2), **on_examples)  # type: ignore[arg-type]
    assert [phase_at_epoch(e, config) for e in range(6)] == [
        *("autoencoder", "classifier"),
        *("adversarial_autoencoder", "adversarial"),
        *("adversarial_joint", "adversarial_joint"),
    ]
    joint = TrainConfig(adversarial_training=True, epochs=3)
    assert {phase_at_epoch(epoch, joint) for epoch in range(3)} == {"adversarial_joint"}
    bare = TrainConfig(defense="none", adversarial_training=True, epochs=3)
    assert {phase_at_epoch(epoch, bare) for epoch in range(3)} == {"classifier"}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (10, 1), (4, 25), (3, 7), (1, 1), (1, 2)])
def test_one_cycle(epochs: int, steps: int) -> None:
    config = TrainConfig(epochs=epochs, lr=0.2)
    total = epochs * steps
    rates = [learning_rate(s, steps, config) for s in range(total)]
    assert rates[0] == pytest.approx(0.2 / 25)
    assert all(0 < r <= 0.2 for r in rates)
    top = rates.index(max(rates))
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[top:]))
    if total >= 10:
        assert abs(top - 0.3 * total) <= 1
        assert rates[-1] < 0.2 * (2.5 / (0.7 * total)) ** 2  # half a cosine: quadratic in the steps that are left
    if 0.3 * total == int(0.3 * total):
        assert rates[round(0.3 * total)] == 0.2


def test_one_cycle_values() -> None:
    """By hand, 10 steps: linear 1/25 to 1 over three steps, then (1 + cos) / 2 over seven."""
    config = TrainConfig(epochs=2, lr=1.0)
    rates = [learning_rate(s, 5, config) for s in range(10)]
    expected = [0.04, 0.36, 0.68, 1.0, 0.9504844, 0.8117449, 0.6112605, 0.3887395, 0.1882551, 0.0495156]
    assert rates == pytest.approx(expected, abs=1e-7)


def test_the_learning_rate_goes_on_over_phases() -> None:
    for kind in ("one_cycle", "step"):
        mixed = alternating(2, 2, 1, 3)
        a = TrainConfig(**{**vars(mixed), "lr_schedule": kind, "lr_step_epochs": 4})
        b = TrainConfig(**{**vars(a), "schedule": "joint"})
        assert [learning_rate(s, 3, a) for s in range(27)] == [learning_rate(s, 3, b) for s in range(27)]


def test_step_drops() -> None:
    config = TrainConfig(epochs=300, lr=0.1, lr_schedule="step")
    rates = [learning_rate(s, 4, config) for s in range(1200)]
    assert rates == pytest.approx([0.1] * 400 + [0.01] * 400 + [0.001] * 400, rel=1e-12)
    config = TrainConfig(epochs=6, lr=0.4, lr_schedule="step", lr_step_epochs=2, lr_gamma=0.5)
    assert [learning_rate(s, 1, config) for s in range(6)] == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1, 0.1])
    for epochs, drops in ((2, [1]), (3, [1, 2]), (4, [2]), (25, [9, 18]), (300, [100, 200])):
        config = TrainConfig(epochs=epochs, lr_schedule="step", lr_step_epochs=0)
        rates = [learning_rate(s, 1, config) for s in range(epochs)]
        assert [e for e in range(1, epochs) if rates[e] < rates[e - 1]] == drops, "thirds, as the paper's 300"
