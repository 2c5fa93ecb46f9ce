"""Small models to attack, and norms of what an attack returns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int, pixels: int = 16, seed: int = 0, scale: float = 1) -> nn.Module:
    """Return a linear model with boundaries so close to the grey image that [0,1] does not bind."""
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(classes, pixels, generator=seeded(seed)))
        layer.bias.copy_(-layer.weight.sum(dim=1) * 0.5)
    return nn.Sequential(nn.Flatten(), layer)


def near_grey(n: int, side: int = 4, seed: int = 1) -> Tensor:
    return 0.5 + 0.1 * (torch.rand(n, 1, side, side, generator=seeded(seed)) - 0.5)


def convnet(seed: int, classes: int = 4, channels: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.LazyLinear(classes),
        )
        model(torch.zeros(2, channels, 8, 8))
    return model.eval()


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def norm_of(delta: Tensor, norm: str | None) -> np.ndarray:
    flat = delta.double().flatten(1).numpy()
    return np.abs(flat).max(axis=1) if norm == "linf" else np.sqrt((flat**2).sum(axis=1))


def distances(model: nn.Module, x: Tensor, order: float) -> np.ndarray:
    """Return the exact distance of each sample to the nearest boundary of a linear model.

    Args:
        order: order of the dual norm.
    """
    weight = model[1].weight.detach().double()
    logits = model(x).detach().double()
    own = logits.argmax(dim=1)
    out = []
    for row, y in zip(logits, own, strict=True):
        others = [k for k in range(len(row)) if k != y]
        out.append(
            min(((row[y] - row[k]) / torch.linalg.vector_norm(weight[y] - weight[k], order)).item() for k in others)
        )
    return np.array(out)


class Counting(nn.Module):
    """A network that counts the rows of every pass, with and without gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.with_gradient: list[int] = []
        self.without: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        (self.with_gradient if torch.is_grad_enabled() else self.without).append(len(x))
        return self.inner(x)


# --- memory


class Small(nn.Module):
    """A network on a device whose memory holds ``room`` images."""

    def __init__(self, inner: nn.Module, room: int) -> None:
        super().__init__()
        self.inner, self.room = inner, room

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate {len(x)} images")
        logits: Tensor = self.inner(x)
        return logits


CASCADE_ATTACKS = (
    "pgd:eps=0.1,steps=3,restarts=3",
    "apgd:eps=0.1,steps=6",
    "apgd:eps=0.5,norm=l2,steps=6,restarts=2,loss=dlr",
    "apgd-t:eps=0.1,steps=4,targets=2",
    "apgd-t:eps=0.5,norm=l2,steps=4,targets=2,restarts=2",
    "fab-t:steps=4,targets=2,restarts=2",
    "fab-t:norm=l2,steps=4,targets=2",
    "square:eps=0.1,queries=20",
    "square:eps=0.5,norm=l2,queries=20",
    "autoattack:eps=0.02,steps=3,queries=10",
    "autoattack:eps=0.1,norm=l2,steps=3,queries=10",
    "fgsm:eps=0.1,target=runner_up",
    "apgd:eps=0.1,steps=4,target=random",
)


def broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return predict(model, x) != y


GRADIENT_AND_NOISE = (
    "noise:eps=0.1",
    "noise:eps=0.5,norm=l2",
    "fgsm:eps=0.1",
    "bim:eps=0.1,steps=5",
    "bim:eps=0.5,norm=l2,steps=5",
    "pgd:eps=0.1,steps=5",
    "pgd:eps=0.5,norm=l2,steps=5",
    "cw:steps=5,binary_search_steps=2",
    "ddn:steps=8",
)
