"""Every setting of a model changes its weights, is refused, or leaves its address unchanged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from made_up_shards import SHAPES, Shards
from torch import Tensor

from components.config import TrainConfig, stored_levels
from components.errors import ConfigError
from pipeline.training.loop import RankData, TrainingLoop

BASE: dict[str, Any] = {"width": 2, "batch_size": 4, "lr": 0.02, "epochs": 3, "shared_blocks": 2}
BASES: dict[str, dict[str, Any]] = {
    "none": {"defense": "none"},
    "defend++": {},
    "defend++, level 0 alone": {"targets": "none"},
    "defend++, alternating": {
        "schedule": "alternating",
        "cycles": 1,
        "autoencoder_epochs": 1,
        "classifier_epochs": 1,
        "noise_location": "latent",
    },
    "adversarial, fgsm": {"defense": "adversarial", "adversarial_epochs": 2},
    "adversarial, pgd": {"defense": "adversarial", "adversarial_attack": "pgd", "adversarial_steps": 2},
    "adversarial, ddn": {"defense": "adversarial", "adversarial_attack": "ddn", "adversarial_steps": 8, "lr": 0.1},
    "adversarial, n-fgsm": {"defense": "adversarial", "adversarial_attack": "n-fgsm", "ema_decay": 0.9},
    "defend++ on examples": {"adversarial_training": True, "adversarial_epochs": 2},
    "defend++ on examples, trades": {
        "adversarial_training": True,
        "adversarial_attack": "pgd",
        "adversarial_steps": 2,
        "adversarial_loss": "trades",
    },
    "comdefend": {"defense": "comdefend", "optimizer": "adam"},
    "step, adam": {"defense": "none", "lr_schedule": "step", "lr_step_epochs": 2, "optimizer": "adam"},
}
OTHER: dict[str, Any] = {
    "arch": "vgg16",
    "width": 3,
    "decoder": "hourglass",
    "targets": "linear",
    "shared_blocks": 1,
    "lam": 1.0,
    "reconstruction_weight": 3.0,
    "reconstruction_reduction": "sum",
    "noise_location": "input",
    "noise_sigma": 0.7,
    "adversarial_training": True,
    "adversarial_attack": "pgd",
    "adversarial_loss": "trades",
    "adversarial_beta": 1.0,
    "adversarial_eps": 0.4,
    "adversarial_steps": 3,
    "adversarial_max_norm": 0.05,
    "adversarial_share": 0.5,
    "adversarial_epochs": 1,
    "reformer_sigma": 5.0,
    "augment": "crop_flip",
    "crop_padding": 2,
    "cycles": 2,
    "autoencoder_epochs": 2,
    "classifier_epochs": 2,
    "batch_size": 2,
    "lr": 0.05,
    "lr_schedule": "step",
    "lr_step_epochs": 1,
    "lr_gamma": 0.5,
    "optimizer": "adam",
    "momentum": 0.5,
    "weight_decay": 0.01,
    "ema_decay": 0.5,
    "clip_norm": 0.01,
    "precision": "bfloat16",
    "normalize": ((0.5,), (0.5,)),
    "seed": 1,
}
"""Field -> another value. Left out: what is read from a file, and what a machine or a record alone goes by."""
NOT_TRIED = {
    "pretrained",
    "replace_head",
    "defense",
    "schedule",
    "epochs",
    "channels_last",
    "checkpoint_every_epochs",
    "normalize_mean",
    "normalize_std",
}


def shards(targets: str) -> Shards:
    """Return four rows in memory with the levels of one kind of targets."""
    data = Shards(4)
    data.columns["level_1"] += targets == "linear"
    return data


def changed(config: TrainConfig, field: str) -> TrainConfig:
    if field == "normalize":
        return dataclasses.replace(config, normalize_mean=OTHER[field][0], normalize_std=OTHER[field][1])
    return dataclasses.replace(config, **{field: OTHER[field]})


def weights(config: TrainConfig) -> list[Tensor]:
    data = RankData(shards(config.targets), 0, 1, torch.device("cpu"), levels=stored_levels(config))
    loop = TrainingLoop(config, SHAPES, data, None)
    for _ in range(config.epochs):
        loop.run_epoch()
    return [p.detach() for p in loop.trained_net.parameters()]


def test_every_field_is_tried() -> None:
    assert {f.name for f in dataclasses.fields(TrainConfig)} == (set(OTHER) - {"normalize"}) | NOT_TRIED


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_setting_that_names_another_model_trains_another(name: str) -> None:
    base = TrainConfig(**{**BASE, **BASES[name]})
    before = weights(base)
    idle = []
    for field in OTHER:
        try:
            config = changed(base, field)
        except ConfigError:
            continue
        if config.canonical() == base.canonical():
            continue
        after = weights(config)
        if len(after) == len(before) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(after, before, strict=True)
        ):
            idle.append(field)
    assert idle == []


@pytest.mark.parametrize("location", ["latent", "input"])
@pytest.mark.parametrize("defense", ["adversarial", "comdefend"])
def test_noise_that_no_phase_would_add_is_refused(defense: str, location: str) -> None:
    with pytest.raises(ConfigError, match=rf"train.noise_location is '{location}'.*defense='{defense}'"):
        TrainConfig(defense=defense, noise_location=location)  # type: ignore[arg-type]


def test_a_share_of_0_is_refused_since_no_example_would_count() -> None:
    with pytest.raises(ConfigError, match="adversarial_share"):
        TrainConfig(defense="adversarial", adversarial_share=0.0)


@pytest.mark.parametrize("name", BASES)
def test_a_setting_that_does_not_name_another_model_trains_the_same(name: str) -> None:
    base = TrainConfig(**{**BASE, **BASES[name]})
    assert all(torch.equal(a, b) for a, b in zip(weights(base), weights(base.canonical()), strict=True))
