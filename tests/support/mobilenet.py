"""A user's own network with an adapter: torchvision's MobileNetV2."""

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
    # features.18 widens 320 channels to 1280 for the classification. It belongs to the head, so that the
    # decoder does not mirror 1280 channels.
    head=("features.18", "global_average", "flatten", "classifier"),
)


def mobilenet(*, num_classes: int, channels: int, image_size: int, width: int) -> tuple[nn.Module, Adapter]:
    net = torchvision.models.mobilenet_v2(num_classes=num_classes, width_mult=width / 64)
    if channels != 3:
        first = net.features[0][0]
        net.features[0][0] = nn.Conv2d(channels, first.out_channels, 3, 2, padding=1, bias=False)
    return net, MOBILENET


OWN = "mobilenet:mobilenet"
