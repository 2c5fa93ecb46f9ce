"""The experiment that tests a choice on test images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import (
    BLOCKS,
    DATA,
    SHAPES,
    plan,
    recipe,
)

from components.config import roles
from components.errors import ConfigError
from components.fields import to_dict
from components.search_space import Choice, Space
from pipeline.cli.arguments import parse_sweep
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.recipes.suites import full_suite
from pipeline.runtime.storage import Storage
from pipeline.sweep import final_experiment, preflight
from pipeline.training import train


def test_an_undefended_model_is_swept_over_values_that_are_its_own_and_its_controls() -> None:
    """A trial may be the recipe's own model, and the choice may be its source or control."""
    e = recipe()
    space = Space(parameters={"lr": Choice([e.train.lr, 0.01])}, model="no_defense", search="grid")
    name, base = preflight.varied_model(e, space)
    assert "base" in preflight.preflight_experiment(e, space, base).model_configs()
    for point in space.points(0):
        final = final_experiment.final_experiment(e, name, point)
        assert len({c.canonical() for c in final.model_configs().values()}) == 3, point
    undefended = final_experiment.final_experiment(
        e, "defend", {"defense": "none"}
    )  # with defend's seed it is the recipe's control
    assert len({c.canonical() for c in undefended.model_configs().values()}) == 3


def test_by_default_the_choice_is_tested_under_the_full_suite_at_the_recipes_budget() -> None:
    given = recipe().evaluation
    final = final_experiment.final_experiment(recipe(), "defend", {"lam": 0.1}).evaluation
    assert final.attacks == full_suite("0.2")
    assert final.threat_models == ("white_box", "black_box", "transfer")
    assert (final.test_images, final.chunk_size) == (given.test_images, given.chunk_size)
    assert parse_sweep(["--space", "x"])[0].evaluate == "full"
    assert parse_sweep(["--space", "x", "--no-evaluate"])[0].evaluate == "none"
    with pytest.raises(ConfigError, match="--evaluate"):
        parse_sweep(["--space", "x", "--evaluate", "some"])
    other = recipe(evaluation=replace(given, attacks=("ddn:steps=10", "pgd:eps=8/255,steps=3", "bim:eps=0.3")))
    assert final_experiment.final_experiment(other, "defend", {}).evaluation.attacks == full_suite(f"{8 / 255}")
    norms = recipe(evaluation=replace(given, attacks=("ddn:steps=10",)))
    assert final_experiment.final_experiment(norms, "defend", {}).evaluation.attacks == full_suite("0.3")
    two = recipe(evaluation=replace(given, attacks=("pgd:eps=1.5,norm=l2",)))
    assert final_experiment.final_experiment(two, "defend", {}).evaluation.attacks == full_suite("1.5", "l2")


def test_the_final_experiment_has_the_choice_undefended_and_control_and_trains_no_model_twice(tmp_path: Path) -> None:
    e = recipe(storage=str(tmp_path), seeds=2)
    point = {"lam": 0.123, "shared_blocks": 2}
    final = final_experiment.final_experiment(e, "defend", point, "recipe")
    assert final.name == "mnist-smoke-best"
    assert [t.partition(":")[0] for t in final.models] == ["no_defense", "control", "best"]
    same = replace(plan(tmp_path, seeds=2), base=preflight.varied_model(e, BLOCKS)[1]).jobs(point)
    made = train.prepare_jobs(final, SHAPES, DATA, Storage(str(tmp_path)))
    assert [j.address for j in made if j.name.startswith("best")] == [j.address for j in same]
    assert final.evaluation.attacks == e.evaluation.attacks
    # of another width, transfer needs undefended networks of that width
    wide = final_experiment.final_experiment(e, "defend", {"width": 8})
    assert {c.width for c in wide.model_configs().values()} == {8}
    assert {c.seed % 1000 for n, c in wide.model_configs().items() if not n.startswith("best")} == {0, 1}
    # a recipe whose threat models name models that are not there any more
    named = replace(e, evaluation=replace(e.evaluation, threat_models=("white_box", "transfer:defend")))
    assert final_experiment.final_experiment(named, "defend", point, "recipe").evaluation.threat_models == (
        "white_box",
    )


def test_the_best_recipe_is_one_that_run_takes(tmp_path: Path) -> None:
    final = final_experiment.final_experiment(recipe(storage=str(tmp_path)), "defend", {"lam": 0.123})
    (tmp_path / "best.json").write_text(json.dumps({"schema": 1, "experiment": to_dict(final)}))
    assert parse_experiment("run", ["--from", str(tmp_path / "best.json")]) == final
    other = parse_experiment("run", ["--from", str(tmp_path / "best.json"), "--seeds", "3"])
    assert other == replace(final, seeds=3)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"best\.json"):
        parse_experiment("run", ["--from", str(tmp_path / "best.json")])


def test_the_choice_of_adversarial_training_is_tested_beside_the_same_without_the_auto_encoder() -> None:
    experiment = parse_experiment(
        "run", ["mnist-smoke", "--models", "no_defense:defense=none", "ours:seed=1,adversarial_training=true"]
    )
    final = final_experiment.final_experiment(experiment, "ours", {"lam": 0.1, "adversarial_eps": 0.1})
    configs = final.first_replicates()
    assert list(configs) == ["no_defense", "control", "adversarial", "best"]
    assert configs["adversarial"].defense == "adversarial"
    assert configs["adversarial"].adversarial_eps == 0.1
    assert roles.control_of(final)["best"] == "adversarial"
