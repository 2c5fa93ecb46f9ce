"""Fixtures of these tests."""

from __future__ import annotations

import pytest
import torch
from attacked_models import convnet, predict, seeded
from small_cnn import digits, trained_cnn
from torch import Tensor, nn


@pytest.fixture(scope="module")
def mnist() -> tuple[Tensor, Tensor, nn.Module]:
    """Give 100 test images, their labels, and a small CNN trained for two epochs on 2,000 other images."""
    model = trained_cnn(2)
    x, y = digits("test", 150)
    right = predict(model, x) == y
    assert right.double().mean() > 0.85
    return x[right][:100], y[right][:100], model


@pytest.fixture(scope="module")
def blobs() -> tuple[Tensor, Tensor, list[nn.Module]]:
    """Give 400 noisy images of 4 classes, their labels, and two small networks trained on similar images."""
    prototypes = torch.rand(4, 1, 8, 8, generator=seeded(0))
    labels = torch.arange(1200) % 4
    images = (0.25 + 0.5 * prototypes[labels] + 0.12 * torch.randn(1200, 1, 8, 8, generator=seeded(1))).clamp(0, 1)
    models = []
    for seed in (0, 1):
        model = convnet(seed).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(4):
                for rows in torch.randperm(800).split(50):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                    optimizer.step()
        model.zero_grad(set_to_none=True)
        models.append(model.eval())
    x, y = images[800:], labels[800:]
    for model in models:
        assert (predict(model, x) == y).double().mean() > 0.95
    return x, y, models
