"""A stranger's network, as a user of ``attack --model`` would have it: no adapter, nothing of this project."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and a head; ``forward`` uses operations that have no module."""

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
    """A randomised defense: noise on every image and on the logits, from torch's global stream."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x + 0.2 * torch.randn_like(x))
        return logits + torch.randn_like(logits)


def make(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Net(channels, num_classes)


def make_drawing(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Drawing(channels, num_classes)
