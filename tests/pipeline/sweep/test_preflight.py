"""Checks of a sweep before anything is trained: its options, its space, its trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import (
    BLOCKS,
    entry,
    opened,
    recipe,
    write_space,
)

from components.config import Experiment, ScalingConfig
from components.errors import ConfigError
from components.search_space import Asha, Choice, IntRange, LogUniform, Space, Uniform
from pipeline import run_directory
from pipeline.cli.arguments import parse_sweep
from pipeline.sweep import preflight, sweep_directory
from pipeline.sweep import run as sweep_run
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.space_file import load_space

BATCHES = Space(parameters={"batch_size": IntRange(32, 256)}, trials=1)

NO_TEST = SweepOptions(space="s", evaluate="none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SPACE = 3", "has no SPACE"),
        ("", "has no SPACE"),
        ("SPACE = Space(", "is not a search space: SyntaxError"),
        ("SPACE = Space(parameters={'lamb': Choice([1.0])})", "unknown field of TrainConfig"),
        ("import nothing_of_the_kind", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_space_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = write_space(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError, match=message) as e:
        load_space(SweepOptions(space=path))
    assert path in str(e.value)


def test_a_space_by_its_name_and_what_the_command_line_changes() -> None:
    options, rest = parse_sweep(
        ["mnist-smoke", "--space", "lambda_blocks", "--trials", "7", "--search", "tpe", "--train.epochs", "1"]
    )
    assert rest == ["mnist-smoke", "--train.epochs", "1"]
    name, space = load_space(options)
    assert (name, space.trials, space.search) == ("lambda_blocks", 7, "tpe")
    with pytest.raises(ConfigError, match="one of ablation"):
        load_space(replace(options, space="lambda_block"))
    with pytest.raises(ConfigError, match="no end of points"):
        load_space(replace(options, search="grid"))
    with pytest.raises(ConfigError, match="--space"):
        parse_sweep(["mnist-smoke"])


def test_more_trials_are_the_same_sweep_another_search_is_not() -> None:
    e = recipe()
    address = sweep_directory.sweep_address(e, "s", BLOCKS, 0)
    assert sweep_directory.sweep_address(e, "s", replace(BLOCKS, trials=99), 0) == address
    assert sweep_directory.sweep_address(replace(e, storage="/elsewhere"), "s", BLOCKS, 0) == address
    others = [
        sweep_directory.sweep_address(e, "s", replace(BLOCKS, search="tpe"), 0),
        sweep_directory.sweep_address(e, "s", BLOCKS, 1),
        sweep_directory.sweep_address(replace(e, train=replace(e.train, epochs=9)), "s", BLOCKS, 0),
    ]
    assert len({address, *others}) == 4


@pytest.mark.parametrize(
    ("experiment", "space", "message"),
    [
        (recipe(), replace(BLOCKS, model="defended"), "no_defense, control, defend"),
        (recipe(data=replace(recipe().data, validation_fraction=0.0)), BLOCKS, "never on test images"),
        (recipe(), replace(BLOCKS, parameters={"shared_blocks": IntRange(1, 5)}), "1 to 4"),
        (recipe(), replace(BLOCKS, parameters={"batch_size": Choice([0])}), "batch_size"),
        (recipe(), replace(BLOCKS, parameters={"defense": Choice(["comdefend", "defend++"])}), "reformer"),
        (recipe(), replace(BLOCKS, parameters={"width": Choice([4, 0])}), "1 to 4096 channels"),
        (
            recipe(train=replace(recipe().train, pretrained="/weights.pth")),
            replace(BLOCKS, parameters={"epochs": Choice([1, 0])}, model="no_defense"),
            "epochs=0 cannot be run.*at least 1 in a sweep",
        ),
        # both ends of the range are even
        (
            recipe(scaling=ScalingConfig(workers=2)),
            replace(BATCHES, trials=9),
            r"batch_size=\d+ cannot be run.*multiple of scaling.workers",
        ),
        (recipe(scaling=ScalingConfig(workers=2)), replace(BATCHES, search="tpe"), r"batch_size=\d+ cannot be run"),
        # each value alone is possible from where the recipe's model stands
        (
            recipe(train=replace(recipe().train, precision="bfloat16")),
            Space(
                parameters={"precision": Choice(["bfloat16", "float32"]), "channels_last": Choice([False, True])},
                search="grid",
            ),
            "precision=float32 channels_last=True cannot be run.*corrupt memory",
        ),
        (recipe(), replace(BLOCKS, parameters={"momentum": Uniform(0.5, 1.0)}), "momentum=1.0 cannot be run"),
        (recipe(), replace(BLOCKS, attack="pgd:eps=30,norm=l2,steps=5"), r"pgd\.eps is 30\.0; .*at most 28 in l2"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    experiment: Experiment, space: Space, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.preflight_experiment(experiment, space, preflight.varied_model(experiment, space)[1])


def test_a_combination_is_possible_where_one_of_its_values_alone_is_not() -> None:
    space = Space(parameters={"schedule": Choice(["alternating"]), "epochs": Choice([40])}, search="grid")
    probed = preflight.preflight_experiment(recipe(), space, recipe().train)
    assert [(c.schedule, c.epochs) for c in probed.model_configs().values()] == [("joint", 2), ("alternating", 40)]


def test_the_draws_that_are_checked_are_those_of_the_seed_in_use() -> None:
    e = recipe(scaling=ScalingConfig(workers=2))
    first = {seed: BATCHES.points(seed)[0]["batch_size"] for seed in range(20)}
    odd = next(seed for seed, size in first.items() if int(size) % 2)
    even = next(seed for seed, size in first.items() if not int(size) % 2)
    preflight.preflight_experiment(e, BATCHES, e.train, even)
    with pytest.raises(ConfigError, match=f"batch_size={first[odd]} cannot be run"):
        preflight.preflight_experiment(e, BATCHES, e.train, odd)


@pytest.mark.parametrize("search", ["grid", "tpe"])
@pytest.mark.parametrize(
    ("base", "other"),
    [
        ({}, {}),
        ({"augment": "crop_flip"}, {"augment": ["crop_flip", "none"]}),
        ({"defense": "none"}, {"defense": ["none", "defend++"]}),
    ],
)
def test_the_probe_has_every_kind_of_targets_that_a_trial_reads(
    base: dict[str, Any], other: dict[str, Any], search: Any
) -> None:
    parameters = {"targets": Choice(["lowpass", "linear", "none"]), **{k: Choice(v) for k, v in other.items()}}
    space = Space(parameters=parameters, search=search, trials=2 if search == "tpe" else 0)
    e = recipe()
    probed = preflight.preflight_experiment(e, space, replace(e.train, **base))
    assert set(run_directory.kinds_of_targets(probed)) == {"lowpass", "linear"}


def test_the_probe_has_one_network_of_those_that_differ_in_real_numbers_and_the_largest_combination() -> None:
    e = recipe()
    space = Space(parameters={"lam": LogUniform(1e-4, 10.0), "lr": Uniform(0.1, 1.0)}, trials=24)
    assert list(preflight.preflight_experiment(e, space, e.train).model_configs()) == ["base"], (
        "the recipe's model stands for all"
    )
    parameters = {"lam": LogUniform(1e-4, 10.0), "width": IntRange(2, 200), "batch_size": IntRange(2, 2000)}
    probed = preflight.preflight_experiment(e, Space(parameters=parameters, search="tpe", trials=2), e.train)
    assert (200, 2000) in {(c.width, c.batch_size) for c in probed.model_configs().values()}
    big = Space(parameters={"width": Choice([2, 200]), "batch_size": Choice([2, 2000])}, search="grid", trials=0)
    largest = preflight.preflight_experiment(e, big, e.train).model_configs()["trial-4_width-200_batch_size-2000"]
    assert (largest.width, largest.batch_size) == (200, 2000)


def test_what_a_person_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    few = Space(parameters={"shared_blocks": IntRange(1, 4)}, trials=24, asha=Asha(grace_epochs=4))
    said = "\n".join(sweep_run.announcement(opened(tmp_path, few, []), 4, 1))
    assert "4 trials (24 were asked for: the space has no more), random search" in said
    assert "none stopped early (asha.grace_epochs=4)" in said
    assert "under the full suite" in said
    done = [entry(1, {"lam": 0.1, "shared_blocks": 1}, "finished", 0.5)]
    space = replace(BLOCKS, asha=Asha(grace_epochs=3))
    said = "\n".join(sweep_run.announcement(replace(opened(tmp_path, space, done), options=NO_TEST), 3, 2))
    assert "4 trials, 1 done already" in said
    assert "the worse stopped early from epoch 3 on" in said
    assert "not tested on test images" in said
    assert "at once: 2 models" in said
