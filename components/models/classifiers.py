"""The classifiers of the paper (sec. 4.1): images in [0,1] to logits, with torchvision's own parameter names.

The defense never changes them (sec. 1, 3.1). It sees a network as *encoder blocks* followed by a *head*; the functions at
the end of this file name those parts without adding a key to the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.errors import ConfigError

SMALL_IMAGE = 64
"""Below so many pixels the stem is 3x3, stride 1, without max-pool; from there on it is torchvision's own."""


class Normalize(nn.Module):
    """(x - mean) / std per channel. Buffers are not persistent: the keys of the network stay torchvision's.

    Args:
        mean, std: one value per channel, for images in [0,1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions beside an identity (or, where the shape changes, a 1x1 convolution)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet18(nn.Module):
    """ResNet-18 with a choice of stem, channels and width. Keys, initialisation and arithmetic are torchvision's, so that a
    ``state_dict`` goes both ways (tests/test_models.py).

    Written out here because importing torchvision takes each Ray worker six seconds of CPU, and its network neither has
    another stem nor another width.

    Args:
        num_classes: number of logits.
        channels: image channels, 1 or 3.
        width: channels of the first stage (64 is the standard network).
        small: 3x3 stride-1 stem without max-pool, for images under 64x64.
        mean, std: per-channel normalisation inside the network; empty: none.
    """

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
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.normalize = Normalize(mean, std) if mean else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0,1]."""
        for block in encoder_blocks(self):
            x = block(x)
        return apply_head(self, x)


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))


def build_classifier(
    arch: str,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    width: int = 64,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
) -> ResNet18:
    """An untrained classifier whose initial weights follow from ``seed`` alone.

    Raises:
        ConfigError: unknown architecture.
    """
    if arch != "resnet18":
        raise ConfigError.of("train.arch", arch, "resnet18")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18(num_classes, channels, width, small=image_size < SMALL_IMAGE, mean=mean, std=std)


def encoder_blocks(classifier: ResNet18) -> list[nn.Module]:
    """The encoder blocks E_0.. of sec. 4.1 as modules over the classifier's own layers (same storage, nothing copied).

    stem + layer1, layer2, layer3, layer4. Block i maps the output of block i-1, the first one the images.
    """
    c = classifier
    stem: list[nn.Module] = [] if c.normalize is None else [c.normalize]
    return [nn.Sequential(*stem, c.conv1, c.bn1, c.relu, c.maxpool, c.layer1), c.layer2, c.layer3, c.layer4]


def apply_head(classifier: ResNet18, latent: Tensor) -> Tensor:
    """Logits [N, num_classes] from the output of the last encoder block."""
    logits: Tensor = classifier.fc(torch.flatten(classifier.avgpool(latent), 1))
    return logits
