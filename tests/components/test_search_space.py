"""Search spaces, the Pareto front and the choice: what a user writes, and what is refused."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT

from components.config import TrainConfig
from components.errors import ConfigError
from components.search_space import Asha, Choice, IntRange, LogUniform, Space, Uniform, choose, pareto_front
from components.training.schedule import learning_rate

SPACES = sorted((ROOT / "tune_spaces").glob("[a-z]*.py"))
LAM = {"lam": LogUniform(1e-4, 10.0)}


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_each_space_of_the_project_is_one(path: Path) -> None:
    space = runpy.run_path(str(path))["SPACE"]
    assert isinstance(space, Space)
    assert set(space.to_dict()["parameters"]) == set(space.parameters)
    for point in space.points(0):
        TrainConfig(**point)  # type: ignore[arg-type]


def test_the_schedules_of_the_space_are_two_in_a_recipe_of_any_length() -> None:
    space = runpy.run_path(str(SPACES[0].parent / "learning_rate.py"))["SPACE"]
    fixed = {name: domain.values[0] for name, domain in space.parameters.items() if name.startswith("lr_step")}
    for epochs in (2, 3, 4, 25, 300):
        config = TrainConfig(epochs=epochs, lr_schedule="step", **fixed)
        assert learning_rate(epochs - 1, 1, config) < config.lr, "step, and not a constant rate"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space(parameters={}), "at least one field"),
        (lambda: Space(parameters={"lambda": Choice([1.0])}), "unknown field of TrainConfig"),
        (lambda: Space(parameters={"seed": IntRange(0, 3)}), "--seeds"),
        (lambda: Space(parameters={"pretrained": Choice(["a"])}), "for each file"),
        (lambda: Space(parameters={"lam": [0.1, 1.0]}), "Choice(["),  # type: ignore[dict-item]
        (lambda: Space(parameters={"lam": Choice(["much"])}), "a number"),
        (
            lambda: Space(parameters={"decoder": Choice(["hourglas"])}),
            "one of pyramid, hourglass, hourglass_concat, hourglass_add; did you mean hourglass",
        ),
        (lambda: Space(parameters={"shared_blocks": Uniform(1, 4)}), "IntRange"),
        (lambda: Space(parameters={"shared_blocks": Choice([1.5])}), "a whole number"),
        (lambda: Space(parameters={"normalize_mean": Choice([0.5])}), "normalize_mean"),
        (lambda: Space(parameters=LAM, search="grid"), "no end of points"),
        (lambda: Space(parameters=LAM, search="bayes"), "grid, random, tpe"),  # type: ignore[arg-type]
        (lambda: Space(parameters=LAM, trials=0), "at least 1"),
        (lambda: Space(parameters={"epochs": IntRange(1, 3)}, asha=Asha()), "unlike length"),
        (lambda: Space(parameters=LAM, attack="ddn"), "with a budget"),
        (lambda: Space(parameters=LAM, attack="noise:eps=0.1"), "with a budget"),
        (lambda: Space(parameters=LAM, attack="pgd"), "needs eps"),
        (lambda: Space(parameters=LAM, images=0), "at least 1"),
        (lambda: Space(parameters=LAM, clean_tolerance=math.nan), "in [0, 1]"),
        (lambda: Choice([]), "at least one value"),
        (lambda: Choice("abc"), "at least one value"),
        (lambda: Choice([1, 1]), "each value once"),
        (lambda: Uniform(1, 1), "low < high"),
        (lambda: Uniform(0, math.inf), "both finite"),
        (lambda: LogUniform(0, 1), "0 < low"),
        (lambda: IntRange(4, 1), "low < high"),
        (lambda: IntRange(1, 2.5), "whole"),  # type: ignore[arg-type]
        (lambda: Asha(grace_epochs=0), "at least 1"),
        (lambda: Asha(reduction=1), "above 1"),
    ],
)
def test_what_is_no_space_is_refused_with_what_would_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        make()
    assert message in str(e.value)


def test_a_grid_is_every_combination_in_order() -> None:
    space = Space(
        parameters={"targets": Choice(["lowpass", "none"]), "shared_blocks": IntRange(1, 3)}, search="grid", trials=0
    )
    points = space.points(7)
    assert points == [{"targets": t, "shared_blocks": b} for t in ("lowpass", "none") for b in (1, 2, 3)]
    assert Space(parameters=space.parameters, search="grid", trials=4).points(0) == points[:4]


def test_random_points_follow_from_the_seed_and_more_begin_with_the_same() -> None:
    few, many = (Space(parameters={**LAM, "shared_blocks": IntRange(1, 4)}, trials=n) for n in (5, 50))
    assert many.points(1)[:5] == few.points(1)
    assert few.points(1) != few.points(2)
    drawn = many.points(1)
    assert all(1e-4 <= p["lam"] <= 10 for p in drawn)  # type: ignore[operator]
    assert {p["shared_blocks"] for p in drawn} == {1, 2, 3, 4}
    below = sum(p["lam"] < math.sqrt(1e-4 * 10) for p in drawn)  # type: ignore[operator]
    assert 23 <= below <= 27, "half of them lie below the geometric middle"
    for blocks in range(1, 5):
        assert 11 <= sum(p["shared_blocks"] == blocks for p in drawn) <= 14, "evenly spread"


def test_a_small_space_is_drawn_out_without_repetition() -> None:
    points = Space(parameters={"shared_blocks": IntRange(1, 4)}, trials=24).points(0)
    assert sorted(p["shared_blocks"] for p in points) == [1, 2, 3, 4]  # type: ignore[type-var]


def test_the_front_by_hand() -> None:
    scores = [(0.9, 0.1), (0.8, 0.5), (0.8, 0.4), (0.7, 0.5), (0.5, 0.9), (0.5, 0.9)]
    assert pareto_front(scores) == [0, 1, 4, 5]
    assert pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_whatever_is_not_on_the_front_is_exceeded_by_something_on_it(scores: list[tuple[float, float]]) -> None:
    front = pareto_front(scores)
    for i, mine in enumerate(scores):
        exceeded = any(scores[j] != mine and scores[j][0] >= mine[0] and scores[j][1] >= mine[1] for j in front)
        assert exceeded == (i not in front)
    assert choose(scores, 5) in front
    assert choose(scores, 0) in front


def test_the_choice_is_the_most_robust_of_the_nearly_cleanest() -> None:
    scores = [(0.99, 0.2), (0.98, 0.4), (0.97, 0.9), (0.985, 0.4)]
    assert choose(scores, 0.0) == 0
    assert choose(scores, 0.01) == 3, "of equally robust ones the cleaner"
    assert choose(scores, 0.02) == 2
    assert choose([(0.5, 0.5), (0.5, 0.5)], 0.01) == 0
    with pytest.raises(ValueError, match="empty"):
        choose([], 0.01)


def test_a_space_knows_how_many_points_it_has() -> None:
    blocks = {"shared_blocks": IntRange(1, 4), "decoder": Choice(["pyramid", "hourglass"])}
    assert Space(parameters=blocks, search="tpe", trials=24).count == 8
    assert Space(parameters=blocks, search="tpe", trials=5).count == 5
    assert Space(parameters=blocks, search="grid", trials=0).count == 8
    assert Space(parameters={**LAM, **blocks}, trials=24).count == 24


@pytest.mark.slow
def test_tpe_proposes_no_point_twice_and_ends_when_there_is_none_left() -> None:
    """Optuna's own does: after its random trials it comes back to what was best again and again."""
    import optuna
    from ray.tune.search import Searcher

    from pipeline.sweep.search.optuna_search import UnrepeatedSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = Space(parameters={"shared_blocks": IntRange(1, 4), "width": Choice([4, 8, 16, 32])}, search="tpe")
    known = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=known, study_name="sweep", directions=["maximize", "maximize"])
    unended, ended = {"shared_blocks": 4, "width": 32}, {"shared_blocks": 1, "width": 4}
    study.enqueue_trial(unended)
    search = UnrepeatedSearch(
        space,
        [unended, ended],
        metric=["clean", "robust"],
        mode=["max", "max"],
        sampler=optuna.samplers.TPESampler(seed=0),
        storage=known,
        study_name="sweep",
    )
    points = []
    for i in range(15):
        point = search.suggest(f"t{i}")
        assert isinstance(point, dict)
        points.append((point["shared_blocks"], point["width"]))
        score = -abs(point["shared_blocks"] - 2) - abs(point["width"] - 8)
        search.on_trial_complete(f"t{i}", {"clean": score, "robust": score})
    assert points[0] == (4, 32), "what had not ended comes first"
    assert {*points, (1, 4)} == {(b, w) for b in range(1, 5) for w in (4, 8, 16, 32)}
    assert search.suggest("t15") == Searcher.FINISHED
