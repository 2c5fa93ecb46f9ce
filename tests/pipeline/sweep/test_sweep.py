"""Sweeps: what is asked, what goes on from a record, and whole ones through the real command line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow_server import MlflowServer
from ray import cloudpickle
from repository import ROOT

from components.config import Experiment, ScalingConfig, Shapes, TrainConfig
from components.errors import ConfigError, UserError
from components.fields import to_dict
from components.search_space import Asha, Choice, IntRange, LogUniform, Space, Uniform
from pipeline import run, run_directory
from pipeline.cli.arguments import parse_sweep
from pipeline.cli.recipe_arguments import parse_experiment as parse
from pipeline.main import main
from pipeline.recipes.registry import RECIPES
from pipeline.recipes.suites import full_suite
from pipeline.runtime import lease, provenance
from pipeline.runtime.storage import Storage, StorageError
from pipeline.sweep import final_experiment, preflight, sweep_directory
from pipeline.sweep import run as sweep_run
from pipeline.sweep.options import SweepOptions
from pipeline.sweep.report import summary
from pipeline.sweep.report.html import build
from pipeline.sweep.search import early_stopping, monitor, tuner
from pipeline.sweep.space_file import load_space
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.queue import JobQueue
from pipeline.sweep.trials.states import DONE, FAILED, TRAINING, WAITING
from pipeline.sweep.trials.trial import TrialProgress, new_entry, run_trial
from pipeline.sweep.trials.workers import TrainingPool
from pipeline.tracking import tracker
from pipeline.training import jobs, train
from pipeline.training.jobs import TrainingData

MAIN = [sys.executable, str(ROOT / "pipeline" / "main.py")]
SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
DATA = TrainingData(train={"lowpass": "pyramids/a"}, without_levels="pyramids/b", validation="pyramids/v")
OBJECTIVE = Objective(attack="pgd:eps=0.1,steps=3", images=10, validation="pyramids/v")
NO_TEST = SweepOptions(space="s", evaluate="none")
BATCHES = Space(parameters={"batch_size": IntRange(32, 256)}, trials=1)
BLOCKS = Space(parameters={"lam": LogUniform(1e-4, 10.0), "shared_blocks": IntRange(1, 4)}, trials=4)


def recipe(**changes: Any) -> Experiment:
    return replace(RECIPES["mnist-smoke"].make(), **changes)


def plan(root: Path, seeds: int = 1) -> SweepPlan:
    base = TrainConfig(width=4, epochs=3)
    e = recipe(seeds=seeds)
    return SweepPlan(root=str(root), experiment=e, base=base, shapes=SHAPES, data=DATA, weights="", objective=OBJECTIVE)


# -- addresses and the queue -----------------------------------------------------------------------------------------------


def test_a_trials_models_are_those_of_an_ordinary_run(tmp_path: Path) -> None:
    experiment = recipe(
        models=("a:lam=0.1,shared_blocks=2,seed=1", "no_defense:defense=none", "control:defense=none,seed=1"),
        seeds=2,
        storage=str(tmp_path),
    )
    ordinary = train.prepare_jobs(experiment, SHAPES, DATA, Storage(str(tmp_path)))
    mine = replace(plan(tmp_path, seeds=2), base=replace(experiment.train, seed=1))
    found = mine.jobs({"lam": 0.1, "shared_blocks": 2})
    assert [j.address for j in found] == [j.address for j in ordinary[:2]]
    # a whole number for a real one is the same model
    assert plan(tmp_path).jobs({"lam": 1}) == plan(tmp_path).jobs({"lam": 1.0})


def test_a_trials_process_does_not_load_torch() -> None:
    code = "import sys, pipeline.sweep.trials.trial; sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def orders(*names: str) -> list[dict[str, Any]]:
    return [{"address": name} for name in names]


def test_the_queue_gives_each_model_once_in_order() -> None:
    queue = JobQueue(attempts=2)
    assert queue.take(0) == {}
    for _ in range(3):  # said again and again
        assert queue.follow(orders("a", "b"), "t1") == [(WAITING, ""), (WAITING, "")]
    assert queue.take(0) == {"address": "a"}
    assert queue.take(1) == {"address": "b"}
    assert queue.take(2) == {}
    assert queue.follow(orders("a", "b"), "t1") == [(TRAINING, ""), (TRAINING, "")]
    queue.end("a", DONE)
    assert queue.follow(orders("a"), "t2") == [(DONE, "")]
    assert queue.take(0) == {}
    queue.close()
    assert queue.take(0) is None


def test_a_run_that_was_started_again_goes_on_until_its_model_counts_as_what_kills_it() -> None:
    queue = JobQueue(attempts=2)
    queue.follow(orders("a", "b"), "t")
    assert queue.take(0) == {"address": "a"}
    assert queue.take(0) == {"address": "a"}
    assert queue.take(0) == {"address": "b"}
    ((state, reason),) = queue.follow(orders("a"), "t")
    assert state == FAILED
    assert "died 2 times" in reason
    queue.lost(0)  # for good: another run may have its model
    assert queue.take(1) == {"address": "b"}


def test_a_model_that_nobody_wants_any_more_is_left_at_the_next_epoch() -> None:
    queue = JobQueue(attempts=2)
    for trial in ("t1", "t2"):
        queue.follow(orders("a"), trial)
    queue.take(0)
    queue.leave("t1")
    assert not queue.cancelled("a", 0), "t2 wants it still"
    queue.leave("t2")
    assert queue.cancelled("a", 0)
    queue.end("a", "")
    assert queue.take(0) == {}
    queue.follow(orders("a"), "t3")
    assert queue.take(0) == {"address": "a"}, "wanted again, it goes on from its checkpoint"


def test_a_queue_that_was_lost_fills_itself_again() -> None:
    queue = JobQueue(attempts=2)
    assert not queue.cancelled("a", 0), "a run trains on; what it has is known again"
    assert queue.follow(orders("a"), "t") == [(TRAINING, "")]
    assert queue.take(1) == {}


def test_an_error_of_no_one_model_gives_out_nothing_more_and_fails_none() -> None:
    queue = JobQueue(attempts=1)
    queue.follow(orders("a", "b"), "t")
    assert queue.take(0) == {"address": "a"}
    assert queue.error() == ""
    queue.close("the disk is full")
    queue.close("a consequence")
    queue.close()
    assert queue.error() == "the disk is full"
    assert queue.cancelled("a", 0)
    for _ in range(2):  # its workers died of it
        assert queue.take(0) is None
    queue.end("a", FAILED, "the other rank was gone")
    assert queue.follow(orders("a", "b"), "t") == [(WAITING, "")] * 2


def test_a_run_lost_for_good_is_told_and_the_last_one_ends_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[UserError] = []
    queue = SimpleNamespace(lost=SimpleNamespace(remote=lambda run: None))
    made = TrainingPool(queue, 0, plan(tmp_path), recipe(), Storage(str(tmp_path)), deaths=1, fail=ended.append)
    made._alive, made._ray = 2, SimpleNamespace(get=lambda answer: answer)
    made._lost(0, RuntimeError("node gone\nmore"))
    assert "lost for good, 1 left: node gone" in capsys.readouterr().out
    assert ended == []
    made._lost(1, RuntimeError("node gone"))
    assert "could not be kept up: node gone" in str(ended)


def write_epochs(root: Path, job: jobs.TrainingJob, robust: list[float], whole: bool) -> None:
    home = Storage(str(root)) / job.address
    for epoch, value in enumerate(robust):
        found = {"epoch": epoch, "clean": 0.9, "robust": value, "n": 10, "seconds": 1.0, "training_seconds": 2.0}
        home.write_json(OBJECTIVE.file(epoch), found)
    if whole:
        home.write_json("model.json", {})


def test_a_trial_reports_what_all_its_seeds_have_and_the_end_only_when_models_are_exported(tmp_path: Path) -> None:
    made = plan(tmp_path, seeds=2).jobs({"lam": 0.1})
    followed = TrialProgress(made, OBJECTIVE, Storage(str(tmp_path)))
    assert followed.new_results() == []
    write_epochs(tmp_path, made[0], [0.1, 0.2, 0.3], whole=True)
    write_epochs(tmp_path, made[1], [0.3], whole=False)
    (first,) = followed.new_results()
    assert (first["epoch"], first["robust"], first["state"]) == (1, pytest.approx(0.2), "running")
    write_epochs(tmp_path, made[1], [0.3, 0.4, 0.5], whole=False)
    assert [r["epoch"] for r in followed.new_results()] == [2]
    assert not followed.finished
    write_epochs(tmp_path, made[1], [0.3, 0.4, 0.5], whole=True)
    (last,) = followed.new_results()
    assert (last["epoch"], last["robust"], last["state"]) == (3, pytest.approx(0.4), "finished")
    assert last["each"] == [[0.9, 0.3], [0.9, 0.5]]
    assert followed.finished
    assert followed.totals()["training_seconds"] == 12


def test_a_model_that_was_only_measured_at_its_end_gives_one_result(tmp_path: Path) -> None:
    (job,) = plan(tmp_path).jobs({"lam": 0.1})
    home = Storage(str(tmp_path)) / job.address
    home.write_json(OBJECTIVE.file(2), {"clean": 1.0, "robust": 0.5, "n": 4, "seconds": 0, "training_seconds": 0})
    home.write_json("model.json", {})
    followed = TrialProgress([job], OBJECTIVE, Storage(str(tmp_path)))
    assert [r["epoch"] for r in followed.new_results()] == [3]


# -- the command line and what follows from it -----------------------------------------------------------------------------


def write_space(path: Path, text: str) -> str:
    path.write_text("from components.search_space import *\nfrom components.errors import *\n" + text)
    return str(path)


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


def test_an_undefended_model_is_swept_over_values_that_are_its_own_and_its_controls() -> None:
    """A trial may be the recipe's own model, and the choice its source or control: neither is refused as its own control."""
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


def test_what_a_person_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    few = Space(parameters={"shared_blocks": IntRange(1, 4)}, trials=24, asha=Asha(grace_epochs=4))
    said = "\n".join(sweep_run._announced(opened(tmp_path, few, []), 4, 1))
    assert "4 trials (24 were asked for: the space has no more), random search" in said
    assert "none stopped early (asha.grace_epochs=4)" in said
    assert "under the full suite" in said
    done = [entry(1, {"lam": 0.1, "shared_blocks": 1}, "finished", 0.5)]
    space = replace(BLOCKS, asha=Asha(grace_epochs=3))
    said = "\n".join(sweep_run._announced(replace(opened(tmp_path, space, done), options=NO_TEST), 3, 2))
    assert "4 trials, 1 done already" in said
    assert "the worse stopped early from epoch 3 on" in said
    assert "not tested on test images" in said
    assert "at once: 2 models" in said


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
    assert parse("run", ["--from", str(tmp_path / "best.json")]) == final
    other = parse("run", ["--from", str(tmp_path / "best.json"), "--seeds", "3"])
    assert other == replace(final, seeds=3)
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"best\.json"):
        parse("run", ["--from", str(tmp_path / "best.json")])


# -- going on from a record ------------------------------------------------------------------------------------------------


def entry(number: int, point: dict[str, Any], state: str, *robust: float) -> dict[str, Any]:
    epochs = [{"epoch": i + 1, "clean": 0.9, "robust": r, "each": [[0.9, r]], "n": 100} for i, r in enumerate(robust)]
    more = {"models": [{"seed": 0, "path": f"models/m{number}"}], "started": "2026-01-01T00:00:00+00:00"}
    return {**new_entry(number, point), "state": state, "epochs": epochs, **more}


def opened(tmp_path: Path, space: Space, trials: list[dict[str, Any]]) -> sweep_directory.Sweep:
    e = recipe(train=TrainConfig(width=4, epochs=4))
    return sweep_directory.Sweep(
        experiment=e,
        root=Storage(str(tmp_path)),
        storage=Storage(str(tmp_path)) / "sweeps/s",
        record={
            "name": e.name,
            "space_name": "s",
            "seed": 0,
            "model": "defend",
            "base": to_dict(e.train),
            "experiment": to_dict(e),
            "space": space.to_dict(),
            "trials": trials,
            "references": {},
            "front": [],
            "choice": None,
            "evaluation": None,
            "earlier_evaluations": [],
            "stages": {},
            "created": None,
            "finished": None,
            **provenance.environment(),
        },
        tracker=SimpleNamespace(),  # type: ignore[arg-type]
        space=space,
        options=SweepOptions(space="s"),
        model="defend",
        base=e.train,
    )


def test_finished_stopped_and_diverged_trials_are_not_run_again_failed_ones_are(tmp_path: Path) -> None:
    states = ["finished", "stopped", "diverged", "failed", "running"]
    points = BLOCKS.points(0)
    space = replace(BLOCKS, trials=6)
    trials = [entry(i + 1, p, s, 0.1) for i, (p, s) in enumerate(zip(space.points(0), states, strict=False))]
    one = opened(tmp_path, space, trials)
    assert [t["number"] for t in sweep_run._pending(one)] == [4, 5, 6]
    assert [t["parameters"] for t in one.trials][:4] == points, "as they were, and one more"
    few = opened(tmp_path, replace(BLOCKS, trials=4), trials[:5])
    assert [t["number"] for t in sweep_run._pending(few)] == [4]
    tpe = opened(tmp_path, replace(BLOCKS, search="tpe", trials=7), trials[:5])
    assert [t.get("number") for t in sweep_run._pending(tpe)] == [4, 5, None, None]


def test_tpe_is_told_what_ended_and_begins_with_what_did_not(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", trials=6)
    known = [
        entry(1, {"lam": 0.1, "shared_blocks": 1}, "finished", 0.1, 0.2),
        entry(2, {"lam": 9.0, "shared_blocks": 2}, "diverged"),
        entry(3, {"lam": 0.3, "shared_blocks": 3}, "running", 0.3),
    ]
    one = opened(tmp_path, space, known)
    _, search = tuner.search_algorithm(one, sweep_run._pending(one))
    assert search.suggest("t1") == {"lam": 0.3, "shared_blocks": 3}
    drawn = search.suggest("t2")
    assert 1e-4 <= drawn["lam"] <= 10
    told = [t.values for t in search._ot_study.get_trials() if t.values]
    assert told == [[0.9, 0.2], [0.0, 0.0]]
    search.on_trial_complete("t1", {"clean": 0.9, "robust": 0.7})
    assert search._ot_study.get_trials()[2].values == [0.9, 0.7], "two objectives"


def following(tmp_path: Path, space: Space, trials: list[dict[str, Any]]) -> monitor.SweepMonitor:
    one = opened(tmp_path, space, trials)
    return monitor.SweepMonitor(one, replace(plan(tmp_path), base=one.base), SimpleNamespace(), [])


def test_early_stopping_knows_the_trials_of_the_command_before(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", asha=Asha(grace_epochs=1, reduction=2))
    points = replace(BLOCKS, trials=5).points(0)
    trial, said = SimpleNamespace(trial_id="new"), {"epoch": 1, "robust": 0.4}
    known = [entry(i + 1, p, "finished", 0.5, 0.6, 0.7, 0.8) for i, p in enumerate(points[:4])]
    for trials, decision in ((known, "STOP"), ([], "CONTINUE")):
        one = following(tmp_path, space, trials)
        scheduler = early_stopping.early_stopping(one)
        scheduler.on_trial_add(None, trial)
        one.start("new", points[4])
        assert scheduler.on_trial_result(None, trial, said) == decision
    assert early_stopping.early_stopping(following(tmp_path, BLOCKS, known)) is None
    late = replace(BLOCKS, asha=Asha(grace_epochs=4))
    assert early_stopping.early_stopping(following(tmp_path, late, known)) is None, "there is no epoch left to be saved"


def test_a_trial_that_goes_on_has_passed_what_it_passed_and_a_whole_one_is_not_stopped(tmp_path: Path) -> None:
    space = replace(BLOCKS, asha=Asha(grace_epochs=1, reduction=2))
    points = space.points(0)
    # trial 1 was the first at every epoch, so nothing stopped it; those that have ended since are better
    known = [entry(i + 1, p, "finished", 0.5, 0.6, 0.7, 0.8) for i, p in enumerate(points[1:], 1)]
    one = following(tmp_path, space, [entry(1, points[0], "running", 0.1, 0.2), *known])
    made = one.plan.jobs(points[0])
    one.sweep.trials[0]["models"] = [{"seed": 0, "path": made[0].address}]
    scheduler = early_stopping.early_stopping(one)
    trial = SimpleNamespace(trial_id="x")
    scheduler.on_trial_add(None, trial)
    one.start("x", {"listed": {"number": 1, "values": points[0]}})
    assert len(one.sweep.trials[0]["epochs"]) == 2, "killed again before it tells them again, they are known still"
    more = {"clean": 0.9, "each": [], "n": 1, "training_seconds": 1, "objective_seconds": 1, "state": "running"}
    for epoch, robust in ((1, 0.1), (2, 0.2), (3, 0.2)):
        result = {**more, "epoch": epoch, "robust": robust}
        assert scheduler.on_trial_result(None, trial, result) == "CONTINUE", epoch
        one.result("x", result)
    assert [e["epoch"] for e in one.sweep.trials[0]["epochs"]] == [1, 2, 3]
    for part in (scheduler, monitor._callback(one), monitor._stopper(one)):
        assert cloudpickle.dumps(part), "Tune does that"
    # one that had not come so far is stopped
    new = SimpleNamespace(trial_id="y")
    one.sweep.trials[3].update(state="failed", epochs=[])
    scheduler = early_stopping.early_stopping(one)
    one.start("y", {"listed": {"number": 4, "values": points[3]}})
    poor = {"epoch": 1, "robust": 0.0}
    assert scheduler.on_trial_result(None, new, poor) == "STOP"
    # but not where there is nothing left to be saved: exported and measured, only not yet told
    (job,) = one.plan.jobs(points[3])
    write_epochs(tmp_path, job, [0.0, 0.0, 0.0, 0.0], whole=False)
    assert early_stopping.early_stopping(one).on_trial_result(None, new, poor) == "STOP"
    write_epochs(tmp_path, job, [0.0, 0.0, 0.0, 0.0], whole=True)
    assert early_stopping.early_stopping(one).on_trial_result(None, new, poor) == "CONTINUE"
    assert early_stopping.early_stopping(one).on_trial_result(None, new, {"epoch": 4, "robust": 0.0}) == "STOP", (
        "its end"
    )


def test_events_of_a_trial_are_in_the_record_at_once(tmp_path: Path) -> None:
    space = replace(BLOCKS, search="tpe", trials=3)
    one = opened(tmp_path, space, [entry(1, {"lam": 0.5, "shared_blocks": 1}, "failed")])
    followed = monitor.SweepMonitor(one, plan(tmp_path), SimpleNamespace(), [])

    def saved() -> list[dict[str, Any]]:
        return list(json.loads((tmp_path / "sweeps/s/sweep.json").read_text())["trials"])

    followed.start("x", {"lam": 0.5, "shared_blocks": 1})
    followed.start("y", {"lam": 0.5, "shared_blocks": 1})
    assert [t["state"] for t in saved()] == ["running", "running"], "the same point twice is two trials"
    result = {"clean": 0.9, "robust": 0.2, "each": [[0.9, 0.2]], "n": 5, "training_seconds": 1, "objective_seconds": 1}
    followed.result("x", {**result, "epoch": 1, "state": "running"})
    followed.start("x", {})  # its process died and tells all again
    followed.result("x", {**result, "epoch": 1, "state": "running"})
    followed.result("x", {**result, "epoch": 2, "state": "finished"})
    followed.result("y", {**result, "epoch": 3, "clean": 0.0, "state": "diverged", "reason": "at step 1"})
    first, second = saved()
    assert [e["epoch"] for e in first["epochs"]] == [1, 2]
    assert first["state"] == "finished"
    assert (second["state"], second["reason"], second["epochs"]) == ("diverged", "at step 1", [])


def test_a_trial_that_cannot_be_is_recorded_with_its_reason_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    space = Space(parameters={"targets": Choice(["lowpass", "linear"]), "lam": LogUniform(0.1, 1.0)}, search="tpe")
    one = following(tmp_path, space, [])
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", told.append)
    for point, reason in (
        ({"targets": "linear", "lam": 0.5}, "train.targets is 'linear'; it must be one of this run's shards: lowpass"),
        ({"targets": "lowpass", "lam": -1.0}, "train.lam is -1.0"),
    ):
        name = str(point["lam"])
        one.start(name, point)
        run_trial(dict(point), plan=one.plan, queue=None)
        result = told.pop()
        assert (result["clean"], result["robust"]) == (0.0, 0.0), "to the search it is as bad as can be"
        one.result(name, result)
        last = json.loads((tmp_path / "sweeps/s/sweep.json").read_text())["trials"][-1]
        assert last["state"] == "failed"
        assert reason in last["reason"]
    assert one.error is None


def test_a_record_that_cannot_be_written_ends_the_sweep_not_the_trial(tmp_path: Path) -> None:
    one = following(tmp_path, BLOCKS, [entry(1, BLOCKS.points(0)[0], "running")])
    callback, stopper = monitor._callback(one), monitor._stopper(one)
    trial = SimpleNamespace(trial_id="x", config={"listed": {"number": 1}})
    callback.on_trial_start(0, [], trial)
    assert not stopper.stop_all()
    (tmp_path / "sweeps").rename(tmp_path / "gone")
    (tmp_path / "sweeps").write_text("in the way")
    result = {"clean": 0.9, "robust": 0.2, "each": [], "n": 5, "training_seconds": 1, "objective_seconds": 1}
    callback.on_trial_result(0, [], trial, {**result, "epoch": 1, "state": "running"})
    assert stopper.stop_all()
    assert isinstance(one.error, StorageError)
    assert "could not be written" in str(one.error)
    (kept,) = json.loads((tmp_path / "gone/s/sweep.json").read_text())["trials"]
    assert kept["state"] == "running", "the next command goes on with it"


def test_what_test_images_were_used_for_before_stays_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[Experiment] = []
    monkeypatch.setattr(run, "execute", lambda command, e, **_: tested.append(e))
    monkeypatch.setattr(sweep_run, "_report", lambda one: None)
    monkeypatch.setattr(sweep_run, "_register", lambda one, chosen: None)
    points = BLOCKS.points(0)
    one = opened(tmp_path, BLOCKS, [entry(1, points[0], "finished", 0.3), entry(2, points[1], "failed", 0.1)])

    def conclude(test: bool = True) -> tuple[str | None, list[dict[str, Any]]]:
        sweep_run._conclude(one)
        if test:
            sweep_run._evaluate(one)
        saved = json.loads((tmp_path / "sweeps/s/sweep.json").read_text())
        earlier = saved["earlier_evaluations"]
        assert all(abs(datetime.now(UTC) - datetime.fromisoformat(e.pop("date"))) < timedelta(hours=1) for e in earlier)
        return saved["evaluation"], earlier

    first, earlier = conclude()
    assert earlier == []
    assert conclude() == (first, [])
    one.trials[1] = entry(2, points[1], "finished", 0.9)
    before = [{"evaluation": first, "trial": 1, "parameters": points[0]}]
    assert conclude(test=False) == (None, before), "what was tested is not the choice"
    second, earlier = conclude()
    assert second not in (first, None)
    assert earlier == before
    one.options = replace(one.options, evaluate="recipe")
    third, earlier = conclude()
    assert [e["evaluation"] for e in earlier] == [first, second], "under other attacks"
    one.trials[1]["state"] = "failed"
    one.options = replace(one.options, evaluate="full")
    assert conclude()[0] == first
    assert [e["evaluation"] for e in one.record["earlier_evaluations"]] == [second, third]
    assert len(tested) == 5


# -- whose sweep it is -----------------------------------------------------------------------------------------------------


def test_a_sweep_that_was_taken_over_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    one = opened(tmp_path, BLOCKS, [])
    one.lease = lease.Lease(one.storage).acquire()
    one.save()
    other = {"host": "elsewhere", "pid": 7, "token": "other"}
    deadline = time.monotonic() + 30
    while one.lease.held:
        assert time.monotonic() < deadline, "not noticed"
        one.storage.write_json(lease.FILE, other)
        time.sleep(0.02)
    with pytest.raises(UserError, match="taken over by process 7 on elsewhere"):
        one.save()
    one.lease.release()


def test_a_second_command_is_refused_before_it_joins_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = command("lambda_blocks", tmp_path)
    options, rest = parse_sweep(asked[1:])
    name, space = load_space(options)
    address = sweep_directory.sweep_address(parse("sweep", rest), name, space, 0)
    held = lease.Lease(Storage(tmp_path) / address).acquire()
    assert main(asked) == 1
    held.release()
    assert f"is being worked on by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


# -- the report ------------------------------------------------------------------------------------------------------------


def test_the_report_of_a_sweep_names_front_choice_and_what_cannot_be_told_apart(tmp_path: Path) -> None:
    points = replace(BLOCKS, trials=6).points(0)
    trials = [entry(i + 1, p, "finished", 0.1 * i) for i, p in enumerate(points[:4])]
    trials += [entry(5, points[4], "stopped", 0.1), {**entry(6, points[5], "diverged"), "reason": "at step 1"}]
    record = opened(tmp_path, replace(BLOCKS, trials=6), trials).record
    record |= {
        "front": [4],
        "choice": {"trial": 4, "parameters": points[3], "clean": 0.9, "robust": 0.3, "rule": summary.rule(0.01)},
        "references": {"control": {"clean": 0.95, "robust": 0.05}, "no_defense": {"state": "failed", "reason": "x"}},
    }
    names = build(record, Storage(str(tmp_path)))
    assert names == ["pareto.png", "parallel.png", "heat-map.png", "trials.csv", "table.md", "report.html"]
    assert all((tmp_path / "report" / n).stat().st_size > 1000 for n in names if n.endswith(".png"))
    html = (tmp_path / "report/report.html").read_text()
    for part in (
        "trial 4",
        "within 1 point of the best",
        "control: clean 95.0 %, robust 5.0 %",
        "--from",
        "chosen",
        "torch 2.",
    ):
        assert part in html
    # 30 of 100 (21.9 to 39.6) and 20 of 100 (13.3 to 28.9) overlap; 10 of 100 does not
    assert summary.indistinct(record) == [3]
    assert len((tmp_path / "report/trials.csv").read_text().splitlines()) == 7
    text = (tmp_path / "report/table.md").read_text()
    assert text == summary.markdown(record)
    for part in (
        "| 6 |",
        "white-box pgd:eps=0.1,steps=10 on 100",
        "control: clean 95.0 %",
        f"`{record['command']}`",
        "torch 2.",
    ):
        assert part in text


@pytest.mark.parametrize("domain", [Choice([0.1, 0.2]), LogUniform(0.01, 1.0), IntRange(1, 4)])
def test_plots_of_one_parameter(tmp_path: Path, domain: Any) -> None:
    name = "shared_blocks" if isinstance(domain, IntRange) else "lam"
    space = Space(parameters={name: domain}, trials=2)
    record = opened(tmp_path, space, [entry(i + 1, p, "finished", 0.2) for i, p in enumerate(space.points(0))]).record
    record |= {"front": [1], "choice": {"trial": 1, "parameters": {}, "clean": 0.9, "robust": 0.2, "rule": ""}}
    assert build(record, Storage(str(tmp_path))) == [
        "pareto.png",
        "parallel.png",
        "trials.csv",
        "table.md",
        "report.html",
    ]


# -- the objective ---------------------------------------------------------------------------------------------------------


def test_robust_accuracy_is_that_of_a_direct_attack_and_does_not_depend_on_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    import torch

    from components.attacks.registry import run_attack
    from components.attacks.spec import AttackSpec
    from components.network import build_net
    from components.random_streams import stream_seed
    from pipeline.data import shards
    from pipeline.data.splits import draw_order
    from pipeline.sweep.trials import objective

    generator = np.random.default_rng(0)
    columns = {
        "image": generator.integers(0, 256, (230, 1, 28, 28), dtype=np.uint8),
        "label": generator.integers(0, 2, 230).astype(np.int32),
    }
    fake = SimpleNamespace(num_rows=230, iter_shards=lambda names: iter([columns]))
    monkeypatch.setattr(shards, "load", lambda root, address: fake)
    net = build_net(TrainConfig(width=4, defense="none"), replace(SHAPES, num_classes=2)).eval()
    asked = replace(OBJECTIVE, images=115, attack="pgd:eps=0.01,steps=2")
    root = Storage(str(tmp_path))
    whole = objective.RobustAccuracyMeter(asked, root, 0, 1, torch.device("cpu"))
    assert whole.rows == draw_order(np.arange(230), 0)[:115].tolist(), "a split may be sorted by class"
    accuracy = whole.robust_accuracy(net.train())
    assert net.training, "the mode is as it was"
    images = torch.from_numpy(columns["image"][whole.rows]).float() / 255
    labels = torch.from_numpy(columns["label"][whole.rows]).long()

    def right_under(attack: str) -> int:
        """The attack itself, with early leaving as between model and judge, chunk by chunk from the chunks' own random streams."""
        spec, found = AttackSpec.parse(attack), 0
        for chunk, (x, y) in enumerate(zip(images.split(objective.CHUNK), labels.split(objective.CHUNK), strict=True)):
            generator = torch.Generator().manual_seed(stream_seed(0, chunk))
            examples = run_attack(spec, net, x, y, stop_on_success=spec.can_stop_on_success, generator=generator)
            found += int((net(examples).argmax(1) == y).sum())
        return found

    net.eval()
    with torch.no_grad():
        clean = int((net(images).argmax(1) == labels).sum())
    assert accuracy == right_under(asked.attack) / 115
    strong = replace(asked, attack="pgd:eps=0.1,steps=5")
    left = right_under(strong.attack)
    assert 0 < left < clean
    assert objective.RobustAccuracyMeter(strong, root, 0, 1, torch.device("cpu")).robust_accuracy(net) == left / 115
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: sums.append(int(value)))
    for rank in range(2):
        objective.RobustAccuracyMeter(asked, root, rank, 2, torch.device("cpu")).robust_accuracy(net)
    assert sum(sums) / 115 == pytest.approx(accuracy)


# -- whole sweeps ----------------------------------------------------------------------------------------------------------

GRID = """SPACE = Space(parameters={"lr": Choice([0.05, 1e30]), "shared_blocks": Choice([1, 4])}, search="grid", trials=0,
    attack="pgd:eps=0.1,steps=2", images=20)"""
SMALL = [
    *("--data.train-limit", "300", "--data.test-limit", "10", "--train.epochs", "6", "--evaluation.test-images", "10"),
    *("--scaling.cpus-per-worker", "1", "--max-concurrent", "1"),
]


def command(space: str, storage: Path, *more: str) -> list[str]:
    return ["sweep", "mnist-smoke", "--space", space, "--storage", str(storage), *SMALL, *more]


def start(arguments: list[str], address: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.Popen(
        [*MAIN, *arguments], cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(found: Any, process: subprocess.Popen[str], seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)
    return value


def processes(*titles: str) -> list[psutil.Process]:
    """Of this test's cluster alone: they descend from this process."""
    found = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [p] if any(title in " ".join(p.cmdline()) for title in titles) else []
    return found


def record_of(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("sweeps/*/sweep.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(f"sqlite:///{tmp_path}/server.db", tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A grid of four trials, two of which diverge; killed on the way: the driver, then a training worker and a trial's process."""
    storage = tmp_path_factory.mktemp("swept")
    space = write_space(storage / "grid.py", GRID)
    process = start(command(space, storage, "--no-evaluate"), ray_cluster)
    wait_for(lambda: list(storage.glob("models/defended-*/history/epoch-00001.json")), process)
    process.kill()
    process.wait()
    begun = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/history/*.json")}
    process = start(command(space, storage, "--no-evaluate", "--resume"), ray_cluster)
    wait_for(lambda: list(storage.glob("models/defended-*/history/epoch-00003.json")), process)
    workers, trials = processes("RayTrainWorker"), processes("run_trial", "ImplicitFunc")
    assert workers
    assert trials
    workers[0].kill()
    trials[0].kill()
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    assert "continuing" in out
    kept = [f for f, time_ns in begun.items() if f.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(begun) - 2, "but for the epoch after each checkpoint nothing is trained again"
    return storage, space, out


@pytest.mark.cluster
def test_killed_on_the_way_every_trial_ends_with_its_state(swept: tuple[Path, str, str]) -> None:
    storage, _, printed = swept
    record = record_of(storage)
    assert [t["state"] for t in record["trials"]] == ["finished", "finished", "diverged", "diverged"]
    for trial in record["trials"][:2]:
        assert [e["epoch"] for e in trial["epochs"]] == list(range(1, 7))
    assert all("not finite at step" in t["reason"] for t in record["trials"][2:])
    assert record["choice"]["trial"] in (1, 2)
    assert set(record["references"]) == {"no_defense", "control", "defend"}
    assert all("robust" in r for r in record["references"].values())
    for part in ("4 trials, grid search", "shared_blocks: 1, 4", "at once: 1 model,", "trial 3/4", "choice: trial"):
        assert part in printed


@pytest.mark.cluster
def test_one_pyramid_set_serves_all_trials(swept: tuple[Path, str, str]) -> None:
    storage, _, _ = swept
    made = record_of(storage)["data"]["splits"]
    assert set(made) == {"train/lowpass", "validation", "test"}
    assert {f"pyramids/{d.name}" for d in (storage / "pyramids").iterdir()} == set(made.values())
    read = {json.loads(f.read_text())["pyramids"]["train"] for f in storage.glob("models/*/model.json")}
    arithmetic = {json.loads(f.read_text())["arithmetic"] for f in storage.glob("models/*/model.json")}
    assert arithmetic == {"float32"}
    assert read == {made["train/lowpass"]}
    # computed again they would lie at the same addresses, but be younger than what was trained on them
    trained = min(f.stat().st_mtime_ns for f in storage.glob("models/*/history/*.json"))
    assert all(f.stat().st_mtime_ns < trained for f in storage.glob("pyramids/*/*"))


@pytest.mark.cluster
def test_mlflow_has_the_sweep_and_its_trials(swept: tuple[Path, str, str]) -> None:
    from mlflow import MlflowClient

    storage, _, _ = swept
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db", f"sqlite:///{storage}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "defendpp"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["kind"] == "sweep"]
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(r.data.tags["state"] for r in trials) == ["diverged", "diverged", "finished", "finished"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/diverged"] == 2
    done = [r for r in trials if r.data.tags["state"] == "finished"]
    assert {"train/loss", "validation/accuracy", "validation/robust", "clean/validation"} <= set(done[0].data.metrics)
    assert len(client.get_metric_history(done[0].info.run_id, "validation/robust")) == 6
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"best.json", "sweep.json", "report"}
    version = client.get_model_version_by_alias("mnist-smoke-grid", "best")
    assert version.run_id in {r.info.run_id for r in done}


@pytest.mark.cluster
def test_the_same_command_again_trains_nothing_then_tests_the_choice_even_if_the_tracking_server_dies_for_good(
    swept: tuple[Path, str, str],
    ray_cluster: str,
    server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage, space, _ = swept
    kept = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/**/*") if f.is_file()}
    before = record_of(storage)
    evaluate = sweep_run._evaluate

    def without_server(one: sweep_directory.Sweep) -> None:
        server.kill()
        evaluate(one)

    monkeypatch.setattr(sweep_run, "_evaluate", without_server)
    monkeypatch.setattr(tracker.Tracker.conclude, "__defaults__", (1.0,))
    assert main(command(space, storage, "--resume", "--evaluate", "recipe", "--tracking-uri", server.uri)) == 0
    assert "operations not published" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    after = record_of(storage)
    assert after["trials"] == before["trials"]
    assert after["finished"]
    evaluated = json.loads((storage / after["evaluation"] / "run.json").read_text())
    assert set(evaluated["models"]) == {"no_defense", "control", "best"}
    assert evaluated["finished"]
    best = after["trials"][after["choice"]["trial"] - 1]
    assert evaluated["models"]["best"]["path"] == best["models"][0]["path"]
    attacked = {e["attack"].partition(":")[0] for e in evaluated["evaluations"]}
    assert attacked == {"none", "noise", "fgsm", "bim", "ddn"}


LARGE = """SPACE = Space(parameters={"width": Choice([4, 8]), "lr": LogUniform(0.01, 0.1)}, search="tpe", trials=4,
    model="no_defense", attack="fgsm:eps=0.01", images=20)"""


def large(directory: Path) -> list[str]:
    """Return a TPE sweep of two seeds, over networks of which the larger one fails."""
    more = ("--train.arch", "own_network:make_by_width", "--train.epochs", "2", "--seeds", "2", "--no-evaluate")
    return command(write_space(directory / "large.py", LARGE), directory, *more)


@pytest.mark.cluster
def test_a_network_that_fails_in_a_tpe_sweep_of_two_seeds_fails_only_its_trial(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(large(tmp_path)) == 0
    record = record_of(tmp_path)
    by_width = {t["parameters"]["width"]: t for t in record["trials"]}
    assert len(record["trials"]) == 4
    assert set(by_width) == {4, 8}
    for trial in record["trials"]:
        if trial["parameters"]["width"] == 8:
            assert trial["state"] == "failed"
            assert trial["reason"].startswith("OutOfMemoryError: CUDA out of memory")
        else:
            assert trial["state"] == "finished"
            assert [len(e["each"]) for e in trial["epochs"]] == [2, 2]
    assert by_width[4]["state"] == "finished"
    assert record["choice"]["parameters"]["width"] == 4
    assert record["finished"]
    assert "error" not in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.drill
def test_a_storage_that_fails_ends_a_sweep_that_can_be_resumed(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("in the way")
    assert main(large(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1
    assert "could not be written" in printed.err
    assert "Traceback" not in printed.err
    record = record_of(tmp_path)
    assert {t["state"] for t in record["trials"]} <= {"pending", "running"}, "no trial's fault"
    assert record["choice"] is None

    (tmp_path / "models").unlink()
    assert main([*large(tmp_path), "--resume"]) == 0
    assert record_of(tmp_path)["finished"]
    assert "error" not in capsys.readouterr().err


EARLY = """SPACE = Space(parameters={"lr": Choice([0.05, 1e-9])}, search="grid", trials=0,
    asha=Asha(grace_epochs=2, reduction=2), attack="fgsm:eps=0.001", images=100)"""


def early(directory: Path) -> list[str]:
    """Return a sweep that stops its second trial: two workers per model, which must agree on when to stop."""
    # enough steps for the better of the two to be better
    many = ("--data.train-limit", "640", "--train.batch-size", "16", "--train.epochs", "4", "--scaling.workers", "2")
    return command(write_space(directory / "early.py", EARLY), directory, *many, "--no-evaluate")


def assert_second_stopped(storage: Path) -> dict[str, Any]:
    """Check the record of :func:`early` and return it."""
    record = record_of(storage)
    assert [t["state"] for t in record["trials"]] == ["finished", "stopped"]
    assert [e["epoch"] for e in record["trials"][1]["epochs"]] == [1, 2]
    assert "epoch 2" in record["trials"][1]["reason"]
    assert record["choice"]["trial"] == 1
    home = storage / record["trials"][1]["models"][0]["path"]
    assert not (home / "model.json").exists()
    trained = {f.name for f in home.glob("history/*.json")}
    assert trained < {f"epoch-{i:05d}.json" for i in range(4)}, "its workers left it"
    return record


@pytest.mark.cluster
def test_the_worse_of_two_trials_is_stopped(ray_cluster: str, tmp_path: Path) -> None:
    assert main(early(tmp_path)) == 0
    assert_second_stopped(tmp_path)


@pytest.mark.cluster
@pytest.mark.drill
def test_a_tracking_server_killed_during_a_sweep_gets_everything(
    ray_cluster: str, tmp_path: Path, server: MlflowServer
) -> None:
    from mlflow import MlflowClient

    process = start([*early(tmp_path), "--tracking-uri", server.uri], ray_cluster)
    wait_for(lambda: list(tmp_path.glob("models/*/history/epoch-00000.json")), process)
    server.kill()
    wait_for(lambda: [t["state"] for t in record_of(tmp_path)["trials"]] == ["finished", "stopped"], process)
    server.start()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    for part in ("cannot be used", "answers again", "all published"):
        assert part in out
    record = assert_second_stopped(tmp_path)

    client = MlflowClient(server.uri, server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "defendpp"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["kind"] == "sweep"]
    assert parent.info.status == "FINISHED"
    trials = {r.data.tags["trial"]: r for r in runs if r.data.tags["kind"] == "trial"}
    assert [trials[number].data.tags["state"] for number in "12"] == ["finished", "stopped"]
    history = client.get_metric_history(trials["1"].info.run_id, "validation/robust")
    assert [m.value for m in history] == [e["robust"] for e in record["trials"][0]["epochs"]]
    assert client.get_model_version_by_alias("mnist-smoke-early", "best")


@pytest.mark.cluster
def test_resume_refuses_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("lambda_blocks", tmp_path, "--resume")) == 1
    assert "there is no sweep at" in capsys.readouterr().err
    assert not list(tmp_path.glob("sweeps/*"))


@pytest.mark.cluster
def test_a_sweep_that_can_never_fit_is_refused_at_once(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command("lambda_blocks", tmp_path, "--scaling.workers", "32")
    assert main(asked) == 1
    assert "scaling.workers" in capsys.readouterr().err
    assert not list(tmp_path.glob("pyramids/*"))
