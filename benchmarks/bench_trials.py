"""Overhead of a sweep's trials: long-lived Ray Train runs against one Ray Train run per model.

    python benchmarks/bench_trials.py [--trials 5] [--images 600] [--width 8] [--seconds 360]

Both train models of one size, one at a time on one worker. The floor is the time inside their epochs and,
in the sweep, in the attack on validation images. The output is the seconds per model beyond the floor,
and the trials per hour if a trial trains for ``--seconds``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.config import Experiment
from components.config.data import Shapes
from pipeline.data import pyramids
from pipeline.recipes.mnist import mnist_demo
from pipeline.runtime import cluster, provenance
from pipeline.runtime.storage import Storage
from pipeline.sweep import run
from pipeline.sweep.options import SweepOptions
from pipeline.training import train
from pipeline.training.jobs import TrainingData

SPACE = Path(__file__).resolve().parent.parent / "tune_spaces" / "lambda_blocks.py"


def swept(experiment: Experiment, trials: int) -> tuple[int, float, float]:
    """Run a sweep.

    Returns:
        The number of trained models (with the undefended, the control and the recipe's own), the
        seconds, and the seconds of the floor.
    """
    run.execute(experiment, SweepOptions(space=str(SPACE), trials=trials, max_concurrent=1, evaluate="none"))
    root = Storage(experiment.storage)
    (name,) = root.list("sweeps")
    record: dict[str, Any] = root.read_json(f"sweeps/{name}/sweep.json")
    reference_seconds = [root.read_json(f"{r['path']}/model.json")["seconds"] for r in record["references"].values()]
    floor = sum(t["training_seconds"] + t["objective_seconds"] for t in record["trials"]) + sum(reference_seconds)
    return trials + len(reference_seconds), record["stages"]["trials"], floor


def alone(experiment: Experiment, trials: int) -> tuple[int, float, float]:
    """Train ``trials`` models with a Ray Train run each. Return the same as :func:`swept`."""
    root = Storage(experiment.storage)
    shard_sets = {
        split: pyramids.build(experiment.data, experiment.pyramids, root, split) for split in ("train", "validation")
    }
    addresses = {split: shards.address for split, shards in shard_sets.items()}
    data = TrainingData(
        train={experiment.train.targets: addresses["train"]},
        without_levels=addresses["train"],
        validation=addresses["validation"],
    )
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
    evaluation = replace(experiment.evaluation, threat_models=("white_box",))
    floor, begin = 0.0, time.monotonic()
    for seed in range(trials):
        trial = replace(experiment, models=(f"trial:seed={seed}",), evaluation=evaluation)
        floor += train.train(trial, shapes, data, root)["trial"]["seconds"]
    return trials, time.monotonic() - begin, floor


def main() -> None:
    """Train with both and print their overheads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=360.0)
    arguments = parser.parse_args()
    base = mnist_demo()
    experiment = replace(
        base,
        data=replace(base.data, train_limit=arguments.images),
        train=replace(base.train, width=arguments.width, epochs=1, defense="defend++"),
        scaling=replace(base.scaling, workers=1, parallel_models=1),
    )
    cluster.connect()
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, run_trials in (("a sweep's pool", swept), ("a Ray Train run each", alone)):
            measured[name] = run_trials(
                replace(experiment, storage=f"{directory}/{run_trials.__name__}"), arguments.trials
            )
    print(provenance.hardware()["cpu"], provenance.versions())
    print(f"{arguments.images} images, width {arguments.width}, 1 epoch, one model at a time, one repetition")
    for name, (models, seconds, floor) in measured.items():
        beyond = (seconds - floor) / models
        print(
            f"{name}: {models} models in {seconds:.1f} s, {floor:.1f} of them the floor: "
            f"{beyond:.1f} s a model beyond it; {3600 / (arguments.seconds + beyond):.2f} trials per hour and worker "
            f"where training takes {arguments.seconds:.0f} s (floor {3600 / arguments.seconds:.2f})"
        )


if __name__ == "__main__":
    main()
