"""Every pair of settings of the command line, through training, attacks, export and loading."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mobilenet import OWN
from torch import Tensor

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.config import ENCODER_BLOCKS, TrainConfig, level_sizes
from components.config.data import Shapes
from components.config.train import stored_levels
from components.dct import linear_pyramid, lowpass_pyramid
from components.evaluation.judge import judge, verify_examples
from components.models.comdefend import ComDefend, Reformed
from components.models.defend import DefendNet
from components.network import build_net, classifier_of
from components.training.augment import Batch
from components.training.schedule import phase_at_epoch
from pipeline.runtime.storage import Storage
from pipeline.training import exports
from pipeline.training.loop import RankData, TrainingLoop

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FACTORS: dict[str, tuple[Any, ...]] = {
    "arch": tuple(ENCODER_BLOCKS),
    "decoder": ("pyramid", "hourglass", "hourglass_concat", "hourglass_add"),
    "targets": ("lowpass", "linear", "none"),
    "schedule": ("joint", "alternating"),
    "data": ((28, 1), (32, 3), (64, 3)),
    "shared_blocks": (1, 2, 3, 4),
    "augment": ("none", "flip", "crop_flip"),
    "noise_location": ("none", "latent", "input"),
    "reconstruction_reduction": ("mean", "sum"),
}


def all_pairs(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return rows that cover every pair of values of two factors (greedy and deterministic)."""
    names = list(factors)
    uncovered = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    rows = []
    while uncovered:
        row: dict[str, Any] = {}
        for pair in sorted(uncovered, key=repr)[:1]:
            row |= dict(pair)
        for name in names:
            if name not in row:
                gain = {v: sum(_pair(names, row, name, v, other) in uncovered for other in row) for v in factors[name]}
                row[name] = max(factors[name], key=lambda v: gain[v])
        uncovered -= {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}
        rows.append(row)
    return rows


def _pair(names: list[str], row: dict[str, Any], name: str, value: Any, other: str) -> Any:
    pair = [(name, value), (other, row[other])]
    return tuple(sorted(pair, key=lambda p: names.index(p[0])))


ROWS = all_pairs(FACTORS)
_PLAIN = {name: values[0] for name, values in FACTORS.items()}
BEYOND: tuple[dict[str, Any], ...] = (
    # These are the network of docs/networks.md with some shared blocks and with all of them.
    _PLAIN
    | {"arch": OWN, "decoder": "hourglass_concat", "schedule": "alternating", "data": (32, 3), "shared_blocks": 3},
    _PLAIN | {"arch": OWN, "targets": "linear", "noise_location": "latent", "shared_blocks": 5},
    # This network has a fifth block, which ResNets do not have.
    _PLAIN | {"arch": "vgg16_bn", "decoder": "hourglass_add", "schedule": "alternating", "shared_blocks": 5},
    # This is the image size of the paper's ImageNet.
    _PLAIN | {"decoder": "hourglass", "data": (224, 3), "shared_blocks": 3, "augment": "flip"},
)
"""What no pair reaches."""


def test_all_pairs_meet() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(row[a], row[b]) for row in ROWS}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)
    assert len(ROWS) < 40


class Rows(RankData):
    """Rows in memory, with the levels that the shards of a config would hold."""

    def __init__(self, config: TrainConfig, shapes: Shapes, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size, channels = shapes.image_size, shapes.channels
        self.images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(n) % 10
        pyramid = linear_pyramid if config.targets == "linear" else lowpass_pyramid
        levels = pyramid(self.images.float() / 255, shapes.sizes)[1:] if stored_levels(config) else []
        self.levels: tuple[Tensor, ...] = tuple(x.half() for x in levels)


def shapes_of(size: int, channels: int) -> Shapes:
    return Shapes(image_size=size, channels=channels, num_classes=10, sizes=level_sizes(size))


def trained(config: TrainConfig, shapes: Shapes) -> TrainingLoop:
    """Train for all epochs, and check that every parameter of a phase gets a gradient."""
    loop = TrainingLoop(config, shapes, Rows(config, shapes, 4), Rows(config, shapes, 4))
    for epoch in range(config.epochs):
        record = loop.run_epoch()
        module = loop.module(phase_at_epoch(epoch, config))
        missing = [name for name, p in module.named_parameters() if p.grad is None]
        assert not missing, f"DDP would refuse {missing} in phase {record['phase']}"
        assert all(value == value for step in record["steps"] for value in step.values())
    return loop


def attacked(model: torch.nn.Module, batch: Batch) -> None:
    images, labels = batch.images.float() / 255, batch.labels
    for spec in map(
        AttackSpec.parse, ("fgsm:eps=0.1", "pgd:eps=0.1,steps=2", "cw:steps=2,binary_search_steps=1", "ddn:steps=2")
    ):
        examples = run_attack(spec, model, images, labels, generator=torch.Generator().manual_seed(0))
        verify_examples(images, examples, range(len(images)), spec)
        assert len(judge(model, images, examples, labels)["adversarial_prediction"]) == len(images)


@pytest.mark.parametrize("row", [*ROWS, *BEYOND], ids=lambda r: "-".join(map(str, r.values())).replace(" ", ""))
def test_pair(row: dict[str, Any], tmp_path: Path) -> None:
    size, channels = row["data"]
    phases = {"epochs": 3, "cycles": 1, "autoencoder_epochs": 1, "classifier_epochs": 1}
    settings = {k: v for k, v in row.items() if k != "data"}
    config = TrainConfig(
        width=4,
        batch_size=4,
        lr=1e-3,
        clip_norm=1.0,
        **settings,
        **(phases if row["schedule"] == "alternating" else {"epochs": 1}),
    )
    shapes = shapes_of(size, channels)
    loop = trained(config, shapes)
    assert isinstance(loop.net, DefendNet)
    loop.net.eval()
    images = loop.data.images[:4].float() / 255
    outputs = loop.net.autoencoder(images)
    sizes = shapes.sizes if config.targets != "none" or config.decoder == "pyramid" else shapes.sizes[:1]
    assert [tuple(o.shape) for o in outputs] == [(4, channels, s, s) for s in sizes]

    exports.export(Storage(tmp_path), loop.net, config.canonical(), shapes)
    exported = exports.load_classifier(tmp_path, trusted=config.arch)
    assert torch.equal(exported(images), loop.net.classifier(images))
    reloaded = exports.load_autoencoder(tmp_path, trusted=config.arch)(images)
    assert all(torch.equal(a, b) for a, b in zip(reloaded, outputs, strict=True))
    attacked(exported, loop.data.batch(slice(0, 4)))


@pytest.mark.parametrize("arch", tuple(ENCODER_BLOCKS))
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "ddn"])
def test_adversarial_training_of_every_network(arch: str, attack: str) -> None:
    config = TrainConfig(
        arch=arch,
        shared_blocks=1,
        width=4,
        batch_size=4,
        epochs=2,
        lr=1e-3,
        defense="adversarial",
        adversarial_attack=attack,  # type: ignore[arg-type]
        adversarial_steps=2,
        adversarial_share=0.5 if attack == "fgsm" else 1.0,
        adversarial_max_norm=2.4 if attack == "ddn" else 0.0,
        adversarial_epochs=1,
    )
    loop = trained(config, shapes_of(28, 1))
    assert [phase_at_epoch(e, config) for e in (0, 1)] == ["classifier", "adversarial"]
    attacked(classifier_of(loop.net).eval(), loop.data.batch(slice(0, 4)))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_comdefend(size: int, channels: int, tmp_path: Path) -> None:
    config = TrainConfig(defense="comdefend", width=4, batch_size=4, epochs=1, optimizer="adam", lr=1e-3)
    shapes = shapes_of(size, channels)
    loop = trained(config, shapes)
    assert isinstance(loop.net, ComDefend)
    classifier_config = TrainConfig(defense="none", width=4)
    classifier = build_net(classifier_config, shapes).eval()
    exports.export(Storage(tmp_path / "r"), loop.net, config.canonical(), shapes)
    exports.export(Storage(tmp_path / "c"), classifier, classifier_config, shapes)
    whole = exports.load_reformed(tmp_path / "r", tmp_path / "c")
    images = loop.data.images[:4].float() / 255
    assert torch.equal(whole(images), Reformed(loop.net.eval(), classifier)(images))
    attacked(whole, loop.data.batch(slice(0, 4)))
