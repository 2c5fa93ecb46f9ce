"""VGG16 with and without batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from components.models.adapter import Adapter, Normalize


class VGG16(nn.Module):
    """VGG16 (Simonyan, Zisserman 2015): 13 convolutions in five blocks, each before a pool.

    Pools round up (``ceil_mode``), so that 28x28 pixels pass all five (14, 7, 4, 2, 1). Sizes that
    divide are not changed by this.

    Args:
        num_classes, channels, width, mean, std: as for ResNet.
        small: the head is a global average and one linear layer. Otherwise it is torchvision's:
            three linear layers with 64 * width hidden channels and dropout, over a 7x7 average
            pool.
        batch_norm: torchvision's vgg16_bn.
    """

    convolutions: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        small: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        blocks = []
        size = channels
        for i, convolutions in enumerate(self.convolutions):
            out = width * min(2**i, 8)
            begin = len(layers)
            for _ in range(convolutions):
                norm = [nn.BatchNorm2d(out)] if batch_norm else []
                layers += [nn.Conv2d(size, out, 3, padding=1), *norm, nn.ReLU(inplace=True)]
                size = out
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            names = tuple(f"features.{n}" for n in range(begin, len(layers)))
            blocks.append((names[:-1], names[-1:]))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1) if small else (7, 7))
        self.classifier: nn.Module
        if small:
            self.classifier = nn.Linear(size, num_classes)
        else:
            hidden = 64 * width
            self.classifier = nn.Sequential(
                nn.Linear(size * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        self.normalize = Normalize(mean, std) if mean else None
        self.adapter = Adapter(
            blocks=tuple(blocks),
            depths=tuple((n, 0) for n in self.convolutions),
            head=("avgpool", "flatten", "classifier"),
            mirror="plain",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W] in [0,1]."""
        if self.normalize is not None:
            x = self.normalize(x)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def vgg16_bn(
    num_classes: int, channels: int, width: int, small: bool, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """Build a VGG16 with batch normalisation."""
    return VGG16(num_classes, channels, width, small, mean, std, batch_norm=True)
