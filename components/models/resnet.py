"""ResNet-18 and ResNet-50 for small and large images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from components.models.adapter import Adapter, Normalize


class BasicBlock(nn.Module):
    """Basic block of He et al. 2016: two 3x3 convolutions and a skip.

    The skip is an identity or, if the shape changes, a 1x1 convolution.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """Bottleneck of He et al. 2016: 1x1, 3x3 and 1x1 convolutions, with 4 * ``channels`` outputs.

    The 3x3 convolution has the stride, as in torchvision.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """ResNet with a choice of stem, channels and width.

    Args:
        num_classes: number of logits.
        channels: image channels, 1 or 3.
        width: channels of the first stage (64 is the standard network).
        small: 3x3 stride-1 stem without max-pool, for images under 64x64.
        mean, std: per-channel normalisation inside the network; empty: none.
    """

    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
    depths: ClassVar[tuple[int, int, int, int]]

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        small: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        e = self.block.expansion
        self.layer1 = self._stage(0, width, width, 1)
        self.layer2 = self._stage(1, e * width, 2 * width, 2)
        self.layer3 = self._stage(2, 2 * e * width, 4 * width, 2)
        self.layer4 = self._stage(3, 4 * e * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * e * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.normalize = Normalize(mean, std) if mean else None

        first, *rest = self.depths
        stem = ("conv1", "bn1", "relu")
        self.adapter = Adapter(
            blocks=(
                # The large stem halves the size before the pool does, so there are two maps to tap.
                ((*stem, "maxpool", "layer1"),) if small else (stem, ("maxpool", "layer1")),
                *(((f"layer{i}",),) for i in (2, 3, 4)),
            ),
            depths=((first,) if small else (0, first), *((d,) for d in rest)),
            head=("avgpool", "flatten", "fc"),
            mirror="basic" if self.block is BasicBlock else "bottleneck",
            stem=True,
        )

    def _stage(self, index: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        blocks = [self.block(in_channels, channels, stride)]
        for _ in range(self.depths[index] - 1):
            blocks.append(self.block(self.block.expansion * channels, channels, 1))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W] in [0,1]."""
        if self.normalize is not None:
            x = self.normalize(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class ResNet18(ResNet):
    """ResNet-18, the paper's default network."""

    block = BasicBlock
    depths = (2, 2, 2, 2)


class ResNet50(ResNet):
    """ResNet-50 of sec. 4.5."""

    block = Bottleneck
    depths = (3, 4, 6, 3)
