"""Recipes on MNIST that belong to no table of the paper."""

from __future__ import annotations

from dataclasses import replace

from components.config import DataConfig, EvaluationConfig, Experiment, PyramidConfig, ScalingConfig, TrainConfig
from pipeline.recipes.suites import SHORT_AUTOATTACK, attacks


def mnist_demo() -> Experiment:
    """Return the main job on the bundled sample: undefended, control and Defend++ under attack."""
    return Experiment(
        name="mnist-demo",
        description="Defend++ against an undefended network and its control, on the bundled MNIST sample",
        data=DataConfig(source="sample:mnist"),
        train=TrainConfig(width=16, epochs=3, batch_size=64, lr=0.05, clip_norm=1.0, reconstruction_weight=10.0),
        evaluation=EvaluationConfig(
            attacks=(
                "noise:eps=0.2",
                "fgsm:eps=0.2",
                "bim:eps=0.2,steps=20",
                "pgd:eps=0.2,steps=20",
                "cw:steps=20,binary_search_steps=5",
                "ddn:steps=40",
            ),
            test_images=200,
            chunk_size=50,
            reliability_images=8,
        ),
        scaling=ScalingConfig(workers=2),
    )


def mnist_smoke() -> Experiment:
    """Return every stage on a few images, to test a machine. Its numbers mean nothing."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist-smoke",
        description="Every stage on a few images, to see that a machine works; the numbers mean nothing",
        data=replace(base.data, train_limit=600, test_limit=60),
        pyramids=PyramidConfig(rows_per_shard=200),
        train=replace(base.train, width=4, epochs=2),
        evaluation=EvaluationConfig(
            attacks=("noise:eps=0.2", "fgsm:eps=0.2", "bim:eps=0.2,steps=5", "ddn:steps=10"),
            test_images=20,
            chunk_size=10,
            reliability_images=8,
        ),
        scaling=ScalingConfig(workers=1),
    )


def mnist_slim() -> Experiment:
    """Return the prototype's setting: 10,000 training images, width 16."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist-slim",
        description="10,000 images of full MNIST, width 16, 300 attacked images",
        data=DataConfig(source="torchvision:mnist", download=True, train_limit=10_000),
        train=replace(base.train, epochs=4, batch_size=128, lr=0.1),
        # These are the prototype's steps. The paper's 100 would cost half as much again for the same
        # result.
        evaluation=EvaluationConfig(
            attacks=attacks(0.2, steps=40, ddn_steps=60, autoattack=SHORT_AUTOATTACK),
            test_images=300,
            reliability_images=16,
        ),
        # Two models train at once on two cores, as in the tables, which share these models.
        scaling=ScalingConfig(workers=1),
    )


def mnist() -> Experiment:
    """Return full MNIST at the paper's width in a tenth of its epochs (one-cycle), for one GPU."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist",
        description="Full MNIST, ResNet-18 at width 64, one-cycle over 25 epochs, for one GPU",
        data=DataConfig(source="torchvision:mnist", download=True),
        train=TrainConfig(
            epochs=25, reconstruction_weight=10.0, clip_norm=1.0, precision="bfloat16", channels_last=True
        ),
        evaluation=EvaluationConfig(test_images=1000, chunk_size=250),
        scaling=ScalingConfig(workers=1, gpu=True, gpus_per_attack=0.5),
    )
