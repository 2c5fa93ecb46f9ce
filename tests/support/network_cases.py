"""Cases of networks that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from mobilenet import OWN
from torch import Tensor, nn

from components.models.classifiers import ARCHITECTURES, build_classifier
from components.models.decoder_plan import UnitShape
from components.models.defend import unit_shapes

ALL = (*ARCHITECTURES, OWN)
DECODERS = ("pyramid", "hourglass", "hourglass_concat", "hourglass_add")
BLOCKS = {"resnet18": 4, "resnet50": 4, "vgg16": 5, "vgg16_bn": 5, OWN: 5}


def small(arch: str, size: int = 32, channels: int = 3, width: int = 4, seed: int = 0, **kwargs: Any) -> nn.Module:
    return build_classifier(arch, num_classes=10, channels=channels, image_size=size, width=width, seed=seed, **kwargs)


def images(n: int = 3, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def unsettle(net: nn.Module) -> None:
    """Give each batch norm statistic a different value, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, b in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(torch.rand(b.shape, generator=generator))


def shapes(arch: str, size: int, width: int = 64, channels: int = 3) -> list[UnitShape]:
    with torch.device("meta"):
        return unit_shapes(small(arch, size, channels, width), channels, size)
