"""Estimate of what recipes cost on a GPU: FLOPs of training and attacks, hours and money.

    python benchmarks/gpu_plan.py table1-fast table3-fast robust-fast --price 4

FLOPs are counted on the CPU (FlopCounterMode): one training step of each model, one pass of each
network's classifier. It is assumed that no image is broken early, except that AutoAttack needs its
first attack alone on models that are trained on clean images. Reformers, the auto-encoder of the
adaptive attack, and passes that judge examples are left out. Hours follow from the TFLOP/s that one
NVIDIA H200 sustained (benchmarks/README.md, On a GPU): eager training in bfloat16, and attack passes
in float32.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.attacks.spec import AttackSpec
from components.config import DataConfig, Experiment, Shapes, TrainConfig, level_sizes
from components.dct import target_levels
from components.network import build_net, classifier_of
from components.training.augment import Batch, gaussian_noise, targets_of
from components.training.schedule import Phase, phase_at_epoch
from components.training.step import PhaseModule
from pipeline.recipes.registry import RECIPES

TRAINING_TFLOPS, ATTACK_TFLOPS = 70.0, 22.0
"""Sustained by one H200: 0.10 of 692 TFLOP/s in bfloat16, and 0.44 of 51 in float32."""
IMAGES = {"mnist": (54_000, 10_000), "cifar10": (45_000, 10_000), "imagenet": (10_000, 1_000)}
"""Training and test images of a data set; with a validation fraction of 0, a ninth more are trained on."""
BATCH = 2


def shapes_of(data: DataConfig) -> Shapes:
    """Return the shapes that the networks of some data are built for."""
    sizes = level_sizes(data.image_size)
    return Shapes(image_size=data.image_size, channels=data.channels, num_classes=data.num_classes, sizes=sizes)


@functools.cache
def step_flops(config: TrainConfig, phase: Phase, shapes: Shapes) -> float:
    """Count the FLOPs of one training step in a phase, per image."""
    config = replace(config, precision="float32", channels_last=False, pretrained="", batch_size=BATCH)
    net = build_net(config, shapes).train()
    images = torch.zeros(BATCH, shapes.channels, shapes.image_size, shapes.image_size, dtype=torch.uint8)
    levels = tuple(target_levels(images.float() / 255, shapes.sizes, "lowpass")[1:])
    labels = torch.zeros(BATCH, dtype=torch.int64)
    noise = gaussian_noise(config, 0, 0, torch.device("cpu"))
    inputs, module = images.float() / 255, PhaseModule(net, phase, config)
    targets = targets_of(inputs, Batch(images=images, labels=labels, levels=levels), config, shapes.sizes)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(inputs, labels, targets, noise, inputs if module.on_examples else None)
        loss.backward()
    # The counter does not see inside an attack, which takes gradients of its own.
    examples = config.example_passes * pass_flops(config.arch, config.width, shapes) if module.on_examples else 0.0
    return float(counter.get_total_flops()) / BATCH + examples


@functools.cache
def pass_flops(arch: str, width: int, shapes: Shapes) -> float:
    """Count the FLOPs of one pass forward and back to the images, per image."""
    net = classifier_of(build_net(TrainConfig(arch=arch, width=width, defense="none"), shapes)).eval()
    images = torch.zeros(BATCH, shapes.channels, shapes.image_size, shapes.image_size, requires_grad=True)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        net(images).sum().backward()
    return float(counter.get_total_flops()) / BATCH


def training_flops(config: TrainConfig, shapes: Shapes, images: int) -> float:
    """Return the FLOPs of a whole training."""
    config = replace(config, seed=0)  # Replicates cost the same, and are counted once.
    phases = [phase_at_epoch(epoch, config) for epoch in range(config.epochs)]
    return sum(phases.count(phase) * images * step_flops(config, phase, shapes) for phase in dict.fromkeys(phases))


def passes_of(text: str, *, resists: bool) -> float:
    """Return the passes, forward and back, that an attack makes per image at most.

    A forward pass alone is half of one.
    """
    spec = AttackSpec.parse(text)
    steps = spec.steps or 1
    targeted = 9 * steps
    passes = {
        "noise": 0.5,
        "fgsm": 1.0,
        "cw": float(steps * (spec.binary_search_steps or 1)),
        "apgd-t": targeted,
        "fab-t": 2.0 * targeted,
        "square": (spec.queries or 0) / 2,
        "autoattack": steps + (3.0 * targeted + (spec.queries or 0) / 2 if resists else 0),
    }
    return float(passes.get(spec.name, steps * (spec.restarts or 1)))


def attack_flops(experiment: Experiment, shapes: Shapes, images: int) -> float:
    """Return the FLOPs of all attacks: each on every model, whose examples other models are shown."""
    total = 0.0
    for config in experiment.model_configs().values():
        resists = config.on_examples or config.defense == "comdefend"
        passes = sum(passes_of(attack, resists=resists) for attack in experiment.evaluation.attacks)
        total += passes * images * pass_flops(config.arch, config.width, shapes)
    return total


def plan(name: str, seeds: int, price: float) -> tuple[str, ...]:
    """Return the row of a recipe."""
    experiment: Experiment = RECIPES[name].make()
    experiment = replace(experiment, seeds=seeds or experiment.seeds)
    data = experiment.data
    dataset = {1: "mnist", 3: "cifar10"}[data.channels] if data.image_size <= 32 else "imagenet"
    train, test = IMAGES[dataset]
    train = min(train if data.validation_fraction else round(train / 0.9), data.train_limit or sys.maxsize)
    test = min(test, experiment.evaluation.test_images or sys.maxsize)
    shapes = shapes_of(data)
    training = sum(training_flops(config, shapes, train) for config in experiment.model_configs().values())
    attacks = attack_flops(experiment, shapes, test)
    hours = (training / TRAINING_TFLOPS + attacks / ATTACK_TFLOPS) / 1e12 / 3600
    models = len(experiment.model_configs())
    petaflops = (f"{training / 1e15:,.0f}", f"{attacks / 1e15:,.0f}")
    return (f"`{name}`", str(experiment.seeds), str(models), *petaflops, f"{hours:.1f}", f"{price * hours:.0f}")


def main(arguments: list[str] | None = None) -> None:
    """Print the plan as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, default=0, help="instead of the recipe's")
    parser.add_argument("--price", type=float, default=4.0, help="of an hour of the GPU, in dollars")
    args: Any = parser.parse_args(arguments)
    print("| recipe | seeds | models | PFLOP of training | PFLOP of attacks, at most | hours | dollars |")
    print("| --- " * 7 + "|")
    for name in args.recipes:
        print(f"| {' | '.join(plan(name, args.seeds, args.price))} |", flush=True)


if __name__ == "__main__":
    main()
