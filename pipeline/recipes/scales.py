"""The scales of the paper's recipes, from a smoke test to the paper's own hyper-parameters."""

from __future__ import annotations

from dataclasses import replace

from components.config import DataConfig, EvaluationConfig, Experiment, PyramidConfig, ScalingConfig, TrainConfig
from pipeline.recipes.mnist import mnist, mnist_slim
from pipeline.recipes.suites import SHORT_AUTOATTACK, attacks

SCALES = {
    "smoke": "a minute or two on 2 cores, always on the bundled sample; its numbers mean nothing",
    "slim": "a small network and few epochs, on a CPU: hours",
    "fast": "about the paper's clean accuracy in a tenth of its epochs, for one GPU",
    "paper": "the paper's own hyper-parameters (sec. 4.1) and, where it has none, ours (docs/method.md), for one GPU",
}
AUTOATTACK = {"smoke": "steps=2,queries=5", "slim": SHORT_AUTOATTACK, "fast": SHORT_AUTOATTACK, "paper": "steps=100"}
"""Scale -> settings of AutoAttack, which stands beside the attacks of sec. 4.1."""
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def smoke(name: str, scale: str) -> Experiment:
    """Return a tiny experiment on the bundled sample."""
    return Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(source="sample:mnist", train_limit=300, test_limit=20),
        pyramids=PyramidConfig(rows_per_shard=200),
        train=TrainConfig(
            width=4, epochs=1, batch_size=64, lr=0.05, clip_norm=1.0, reconstruction_weight=10.0, adversarial_steps=2
        ),
        evaluation=EvaluationConfig(
            attacks=attacks(0.2, steps=2, ddn_steps=3, autoattack=AUTOATTACK["smoke"]),
            test_images=8,
            chunk_size=8,
            reliability_images=0,
        ),
        # Starting a Ray Train run costs more than training all models of this size.
        scaling=ScalingConfig(parallel_models=1),
    )


def mnist_scale(name: str, scale: str) -> Experiment:
    """Return MNIST at a scale: joint training, all four blocks shared (sec. 4.2)."""
    base = smoke(name, scale)
    if scale == "smoke":
        return base
    if scale == "slim":
        return replace(mnist_slim(), name=base.name, scale=scale, description="", seeds=3)
    if scale == "fast":
        fast = mnist()
        evaluation = replace(
            fast.evaluation, attacks=(*fast.evaluation.attacks, f"autoattack:eps=0.2,{AUTOATTACK[scale]}")
        )
        return replace(fast, name=base.name, scale=scale, description="", evaluation=evaluation)
    return replace(
        mnist(),
        name=base.name,
        scale=scale,
        description="",
        data=DataConfig(source="torchvision:mnist", download=True, validation_fraction=0.0),
        train=TrainConfig(
            epochs=250, lr=0.01, lr_schedule="step", batch_size=256, reconstruction_weight=10.0, adversarial_steps=40
        ),
        evaluation=EvaluationConfig(
            attacks=attacks(0.2, steps=100, ddn_steps=100, autoattack=AUTOATTACK[scale]), chunk_size=250
        ),
    )


_COLOUR_STEPS = {"smoke": (2, 3), "slim": (40, 60), "fast": (100, 100), "paper": (100, 100)}
"""Scale -> steps of BIM and of DDN on colour images."""


def _colour_attacks(eps: float, scale: str) -> tuple[str, ...]:
    steps, ddn_steps = _COLOUR_STEPS[scale]
    return attacks(eps, steps=steps, ddn_steps=ddn_steps, channels=3, autoattack=AUTOATTACK[scale])


def _scheduled(train: TrainConfig, scale: str, *, fast_lr: float) -> TrainConfig:
    """Return the training at a scale: the paper's, or one cycle in a tenth of its epochs or less."""
    if scale == "paper":
        return replace(train, lr=0.1, lr_schedule="step")
    one_cycle = replace(
        train,
        epochs=30,
        autoencoder_epochs=1,
        classifier_epochs=1,
        lr=fast_lr,
        clip_norm=1.0,
        precision="bfloat16",
        channels_last=True,
    )
    if scale == "fast":
        return one_cycle
    return replace(one_cycle, width=16, batch_size=128, lr=0.1, cycles=1)


def cifar10(name: str, scale: str) -> Experiment:
    """Return CIFAR-10 at a scale: alternating training, three shared blocks (sec. 3.4, 4.2)."""
    if scale == "smoke":
        base = smoke(name, scale)
        return replace(
            base,
            data=replace(base.data, image_size=32, channels=3, resize="crop"),
            train=replace(
                base.train,
                shared_blocks=3,
                augment="crop_flip",
                schedule="alternating",
                epochs=3,
                cycles=1,
                autoencoder_epochs=1,
                classifier_epochs=1,
                adversarial_eps=0.05,
            ),
            evaluation=replace(base.evaluation, attacks=_colour_attacks(0.05, scale)),
        )
    train = TrainConfig(
        shared_blocks=3,
        augment="crop_flip",
        schedule="alternating",
        epochs=300,
        batch_size=256,
        reconstruction_weight=10.0,
        normalize_mean=CIFAR10_MEAN,
        normalize_std=CIFAR10_STD,
        adversarial_eps=0.05,
    )
    train = _scheduled(train, scale, fast_lr=0.2)
    experiment = Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(
            source="torchvision:cifar10",
            download=True,
            image_size=32,
            channels=3,
            validation_fraction=0.0 if scale == "paper" else 0.1,
        ),
        train=train,
        evaluation=EvaluationConfig(
            attacks=_colour_attacks(0.05, scale),
            test_images=1000 if scale == "fast" else 0,
            chunk_size=250,
        ),
        scaling=ScalingConfig(gpu=True, gpus_per_attack=0.5),
    )
    return _on_cpu(experiment, epochs=8) if scale == "slim" else experiment


def imagenet(name: str, scale: str) -> Experiment:
    """Return ImageNet-like images at 224x224, trained from pretrained weights.

    The paper does not name them, but its clean accuracy from 10,000 training images implies them.
    Scale ``slim`` is for ten classes such as Imagenette's, at 96x96, trained from scratch.
    """
    if scale == "smoke":
        base = cifar10(name, scale)
        return replace(
            base,
            # At 64 pixels networks have the stem and levels of 224, for a tenth of the cost.
            data=replace(base.data, image_size=64, train_limit=64, test_limit=8),
            train=replace(base.train, augment="flip", batch_size=16),
            evaluation=replace(base.evaluation, attacks=attacks(0.01, steps=2, ddn_steps=3, channels=3), chunk_size=4),
        )
    train = TrainConfig(
        shared_blocks=3,
        augment="flip",
        schedule="alternating",
        epochs=300,
        reconstruction_weight=10.0,
        pretrained="torchvision:IMAGENET1K_V1",
        normalize_mean=IMAGENET_MEAN,
        normalize_std=IMAGENET_STD,
        adversarial_eps=0.01,
    )
    train = _scheduled(train, scale, fast_lr=0.02)
    experiment = Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(
            source="folder:/data/imagenet",
            image_size=224,
            channels=3,
            num_classes=1000,
            allow_empty_classes=True,  # The 1,000 test images of NIPS 2017 lack some classes.
            resize="crop",
            train_limit=10_000,
            validation_fraction=0.0 if scale == "paper" else 0.1,
        ),
        train=train,
        evaluation=EvaluationConfig(attacks=_colour_attacks(0.01, scale), test_images=1000, chunk_size=50),
        scaling=ScalingConfig(gpu=True, gpus_per_attack=0.5),
    )
    if scale != "slim":
        return experiment
    return _on_cpu(
        replace(
            experiment,
            data=replace(experiment.data, image_size=96, num_classes=10, allow_empty_classes=False, train_limit=0),
            train=replace(experiment.train, pretrained=""),
        ),
        epochs=60,
    )


def _on_cpu(experiment: Experiment, *, epochs: int) -> Experiment:
    """Return the experiment at scale ``slim``: two models at once on two cores, two seeds."""
    return replace(
        experiment,
        seeds=2,
        train=replace(experiment.train, epochs=epochs),
        evaluation=replace(experiment.evaluation, test_images=500, chunk_size=50, reliability_images=16),
        scaling=ScalingConfig(workers=1),
    )
