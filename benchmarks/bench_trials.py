"""What a trial of a sweep costs beside its training: a sweep's pool of Ray Train runs against a Ray Train run for each model.

    python benchmarks/bench_trials.py [--trials 5] [--images 600] [--width 8] [--seconds 360]

Both train models of one size, one at a time on one worker; the floor is the time inside their epochs (and, in the sweep, in the attack on
validation images). Prints the seconds per model beyond it, and the trials per hour where a trial trains for ``--seconds``.
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
    """Models that a sweep trained, the undefended, the control and the recipe's own among them; seconds; those of the floor."""
    run.execute(experiment, SweepOptions(space=str(SPACE), trials=trials, max_concurrent=1, evaluate="none"))
    root = Storage(experiment.storage)
    (name,) = root.list("sweeps")
    record: dict[str, Any] = root.read_json(f"sweeps/{name}/sweep.json")
    beside = [root.read_json(f"{r['path']}/model.json")["seconds"] for r in record["references"].values()]
    floor = sum(t["training_seconds"] + t["objective_seconds"] for t in record["trials"]) + sum(beside)
    return trials + len(beside), record["stages"]["trials"], floor


def alone(experiment: Experiment, trials: int) -> tuple[int, float, float]:
    """The same with a Ray Train run for each of ``trials`` models."""
    root = Storage(experiment.storage)
    made = {
        split: pyramids.build(experiment.data, experiment.pyramids, root, split) for split in ("train", "validation")
    }
    found = {split: shards.address for split, shards in made.items()}
    data = TrainingData(
        train={experiment.train.targets: found["train"]}, without_levels=found["train"], validation=found["validation"]
    )
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
    evaluation = replace(experiment.evaluation, threat_models=("white_box",))
    floor, begin = 0.0, time.monotonic()
    for seed in range(trials):
        one = replace(experiment, models=(f"trial:seed={seed}",), evaluation=evaluation)
        floor += train.train(one, shapes, data, root)["trial"]["seconds"]
    return trials, time.monotonic() - begin, floor


def main() -> None:
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
        for name, way in (("a sweep's pool", swept), ("a Ray Train run each", alone)):
            measured[name] = way(replace(experiment, storage=f"{directory}/{way.__name__}"), arguments.trials)
    print(provenance.hardware()["cpu"], provenance.versions())
    print(f"{arguments.images} images, width {arguments.width}, 1 epoch, one model at a time, one repetition")
    for name, (models, seconds, floor) in measured.items():
        beyond = (seconds - floor) / models
        print(
            f"{name}: {models} models in {seconds:.1f} s, {floor:.1f} of them the floor: {beyond:.1f} s a model beyond it; "
            f"{3600 / (arguments.seconds + beyond):.2f} trials per hour and worker where training takes {arguments.seconds:.0f} s "
            f"(floor {3600 / arguments.seconds:.2f})"
        )


if __name__ == "__main__":
    main()
