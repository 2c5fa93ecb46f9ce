"""Which model is the control of which, and what all models of a recipe are compared with."""

from __future__ import annotations

import pytest

from components.config import EvaluationConfig, Experiment, TrainConfig, roles
from pipeline.recipes.registry import RECIPES

TABLE = ("no_defense:defense=none,seed=0", "control:defense=none,seed=1", "defend:seed=1")


@pytest.mark.parametrize(
    ("models", "controls", "references"),
    [
        (TABLE, {"defend": "control"}, ["control", "defend"]),
        ((*TABLE[:1], TABLE[2]), {}, ["defend"]),
        (
            ("adv:defense=adversarial,seed=1", "ours:adversarial_training=true,seed=1"),
            {"ours": "adv"},
            ["adv"],
        ),
        # Another seed, or another loss, is another training.
        (("adv:defense=adversarial,seed=2", "ours:adversarial_training=true,seed=1"), {}, ["ours"]),
        (
            ("adv:defense=adversarial", "ours:adversarial_training=true,adversarial_loss=trades"),
            {},
            ["ours"],
        ),
        (
            (*TABLE, "adv:defense=adversarial,seed=1", "ours:adversarial_training=true,seed=1"),
            {"defend": "control", "adv": "control", "ours": "adv"},
            ["control", "adv", "defend"],
        ),
        # A longer training has a control of its length.
        (
            (*TABLE, "longer:defense=none,seed=1,epochs=9", "defend_longer:seed=1,epochs=9"),
            {"defend": "control", "defend_longer": "longer"},
            ["control", "longer", "defend"],
        ),
    ],
)
def test_a_control_differs_by_the_defense_alone(
    models: tuple[str, ...], controls: dict[str, str], references: list[str]
) -> None:
    made = Experiment(
        name="x",
        train=TrainConfig(width=4, adversarial_attack="pgd"),
        models=models,
        evaluation=EvaluationConfig(threat_models=("white_box",)),
    )
    assert roles.control_of(made) == controls
    assert roles.references(made) == references


def test_the_pairs_of_recipe_robust_are_of_one_seed_and_one_loss() -> None:
    robust = RECIPES["robust-slim"].make()
    pairs = roles.pairs(robust)
    assert ("defend4_ce-s2", "adv_ce-s2") in pairs
    assert ("defend1_trades-s0", "adv_trades-s0") in pairs
    assert all(model.rpartition("-s")[2] == against.rpartition("-s")[2] for model, against in pairs)
