"""A training config and networks that are small enough for a step in milliseconds."""

from __future__ import annotations

from typing import Any

from components.config import Shapes, TrainConfig
from components.models.defend import DefendNet
from components.network import build_net

SHAPES = Shapes(image_size=14, channels=1, num_classes=10, sizes=(14, 7))


def tiny(**changes: Any) -> TrainConfig:
    """Return a config of four channels and four images a batch, with ``changes``."""
    return TrainConfig(**{"width": 4, "batch_size": 4, "lr": 0.05, "epochs": 2, "shared_blocks": 2, **changes})


def defended(config: TrainConfig) -> DefendNet:
    """Build the defended network of a config, in training mode."""
    net = build_net(config, SHAPES)
    assert isinstance(net, DefendNet)
    return net.train()
