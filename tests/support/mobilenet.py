"""A network of a user's own, with an adapter: torchvision's MobileNetV2."""

from __future__ import annotations

import torchvision
from torch import nn

from components.models.adapter import Adapter

MOBILENET = Adapter(
    blocks=(
        (("features.0", "features.1"),),
        (("features.2", "features.3"),),
        (tuple(f"features.{i}" for i in range(4, 7)),),
        (tuple(f"features.{i}" for i in range(7, 14)),),
        (tuple(f"features.{i}" for i in range(14, 18)),),
    ),
    depths=((2,), (2,), (3,), (7,), (4,)),
    # features.18 widens 320 channels to 1280 for the classification: left to the head, or the decoder would mirror 1280
    head=("features.18", "global_average", "flatten", "classifier"),
)


def mobilenet(*, num_classes: int, channels: int, image_size: int, width: int) -> tuple[nn.Module, Adapter]:
    net = torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width / 64)
    if channels != 3:
        first = net.features[0][0]
        net.features[0][0] = nn.Conv2d(channels, first.out_channels, 3, 2, padding=1, bias=False)
    return net, MOBILENET


OWN = "mobilenet:mobilenet"
