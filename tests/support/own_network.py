"""A user's network for ``attack --model``, without an adapter and without any code of this project."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and a head. ``forward`` uses operations that have no module."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, stride=2)
        self.second = nn.Conv2d(4, 8, 3, stride=2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Drawing(Net):
    """A randomised defense with noise on images and logits, from torch's global stream."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x + 0.2 * torch.randn_like(x))
        return logits + torch.randn_like(logits)


class Large(Net):
    """A network that reports too little memory when it is trained on more than 8 images at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")
        return super().forward(x)


def make_by_width(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return (Large if width > 4 else Net)(channels, num_classes)


def make(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Net(channels, num_classes)


def make_drawing(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Drawing(channels, num_classes)
