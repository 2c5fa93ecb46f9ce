"""Models of timm on the Hugging Face Hub, whose config.json names the network of the weights."""

from __future__ import annotations

import json

from components.config import Shapes, TrainConfig, level_sizes
from components.errors import ConfigError, DataError
from pipeline.data import hub


def described(weights: str) -> tuple[TrainConfig, Shapes] | None:
    """Return config and shapes of a network that timm saved, or None for other repositories.

    Args:
        weights: address of the file of weights, with its commit. config.json is beside it.

    Raises:
        ConfigError: config.json describes images that this project does not take.
    """
    try:
        _, content = hub.download(f"{weights.rpartition('/')[0]}/config.json", "--model")
        config = json.loads(content)
        arch, values = config["architecture"], config.get("pretrained_cfg", config)
        channels, height, width = map(int, values["input_size"])
        classes = int(config.get("num_classes", values.get("num_classes")))
        mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
    except (DataError, ValueError, KeyError, TypeError):  # Not every repository has such a file.
        return None
    if height != width:
        raise ConfigError(f"{weights} is for images of {height}x{width} pixels; this project takes square ones")
    return (
        TrainConfig(arch=f"timm:{arch}", normalize_mean=mean, normalize_std=std),
        Shapes(image_size=height, channels=channels, num_classes=classes, sizes=level_sizes(height)),
    )
