"""Images of the bundled sample, and a small network that a test can train in a moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.config import DataConfig
from pipeline.data.sources.open import open_source


def digits(split: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, float32 [rows,1,28,28] in [0,1], and their labels."""
    images, labels = open_source(DataConfig(), split).read(np.arange(rows))
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def trained_cnn(epochs: int, craft: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: x) -> nn.Module:
    """Train a CNN of two convolutions on 2,000 images.

    Args:
        craft: function of the model, images and labels that returns the images to train on.
    """
    x, y = digits("train", 2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()
        )
        model.append(nn.Linear(16 * 5 * 5, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(50):
                inputs = craft(model, x[rows], y[rows])
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), y[rows]).backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()
