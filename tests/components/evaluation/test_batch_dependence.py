"""Outputs that depend on the batch are flagged, and honest ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from flagged_networks import (
    Batch,
    Then,
    clean_probe,
    fired,
    flags_of,
    noisy,
    quantised,
    same,
)
from small_cnn import digits
from torch import Tensor, nn

from components.errors import ConfigError
from components.evaluation.flags import Flag, flags
from components.evaluation.probe import batch_dependence, checked_outputs
from components.models.adapter_check import check_output


class Normed(nn.Module):
    """Two blocks with a norm of one's choice between convolutions, and dropout before the head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 5, 2), norm(8), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8 * 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(x))
        return logits


class NormInTrainMode(Normed):
    """A wrapper whose forward pass puts batch norm back into training mode."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        return super().forward(x)


class Attending(nn.Module):
    """A transformer over the rows of an image; over the images of a batch where ``batch_first`` is wrong."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(28, 4, 32, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x.squeeze(1)).mean(dim=1))
        return logits


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    """An untrained network whose batch norms have statistics of data, if they keep any, in eval mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().train()
        model(digits("train", 64)[0])
    return model.eval()


def inner() -> nn.Module:
    return Normed(nn.BatchNorm2d)


BATCH_DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "batch norm without running statistics": lambda: Normed(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "batch norm in train mode": lambda: NormInTrainMode(nn.BatchNorm2d),
    "mean of the batch subtracted": lambda: Then(inner(), lambda x: x - x.mean(dim=0), same),
    "logits averaged over the batch": lambda: Then(inner(), same, lambda z: 0.9 * z + 0.1 * z.mean(dim=0)),
    "standardised over the batch": lambda: Then(inner(), lambda x: x / x.std(), same),
    "neighbour mixed in": lambda: Then(inner(), lambda x: 0.8 * x + 0.2 * x.roll(1, dims=0), same),
    "only batches defended": lambda: Then(inner(), lambda x: x if len(x) == 1 else (4 * x).round() / 4, same),
    "attention over the batch": lambda: Attending(batch_first=False),
}


BATCH_INDEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "batch norm": inner,
    "group norm": lambda: Normed(lambda c: nn.GroupNorm(2, c)),
    "instance norm": lambda: Normed(nn.InstanceNorm2d),
    "transformer": Attending,
    "views of one image averaged": lambda: Then(inner(), lambda x: (x + x.flip(3)) / 2, same),
    "quantised": lambda: quantised(inner()),
    "constant": lambda: Then(inner(), same, lambda z: 0 * z),
    "small logits": lambda: Then(inner(), same, lambda z: 1e-12 * z),
}


def dependence_of(model: nn.Module, x: Tensor, at_once: int = 64) -> Flag:
    """The flag alone: a whole probe attacks, which is beside the point here."""
    (first, again) = (checked_outputs(model, x, at_once) for _ in range(2))
    noise = float((first - again).abs().max())
    measured = batch_dependence(model, x, first, noise, at_once)
    json.dumps(measured, allow_nan=False)
    return next(f for f in flags(clean_probe(batch_dependence=measured), []) if f.name == "batch_dependent_output")


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize("name", BATCH_DEPENDENT)
def test_an_output_that_depends_on_its_neighbours(name: str, images: int, test_images: Batch) -> None:
    if name == "neighbour mixed in" and images == 1:
        images = 3
    flag = dependence_of(fresh(BATCH_DEPENDENT[name]), test_images[0][:images])
    assert flag.fired
    assert "eval mode" in flag.remedy
    assert f"of {images} images depend" in flag.measured


@pytest.mark.parametrize(("images", "at_once"), [(1, 64), (48, 64), (9, 2)])
@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_an_output_of_the_image_alone(name: str, images: int, at_once: int, test_images: Batch) -> None:
    assert not dependence_of(fresh(BATCH_INDEPENDENT[name]), test_images[0][:images], at_once).fired


@pytest.mark.parametrize(
    "norm", [lambda c: nn.BatchNorm1d(c, track_running_stats=False), lambda c: nn.LayerNorm(c)], ids=["batch", "layer"]
)
def test_a_network_that_takes_no_single_image_is_refused_when_it_is_built(norm: Callable[[int], nn.Module]) -> None:
    """PyTorch has no statistics of one value per channel: every attack that is left with one image would fail."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), norm(3))
    if isinstance(net[2], nn.LayerNorm):
        check_output(net, 1, 2, 3)
        return
    with pytest.raises(ConfigError, match="one at a time, though it does on several: put every batch norm into eval"):
        check_output(net, 1, 2, 3)


def test_only_the_batch_flag_fires_where_only_the_batch_is_wrong(honest: nn.Module, test_images: Batch) -> None:
    model = Then(honest, same, lambda z: z + 0.3 * (z - z.mean(dim=0)))
    assert fired(flags_of(model, test_images)) == {"batch_dependent_output"}


def test_noise_is_no_dependence_on_the_batch_but_may_come_with_it(test_images: Batch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not dependence_of(noisy(fresh(inner)), test_images[0]).fired
        assert not dependence_of(
            Then(fresh(inner), same, lambda z: z + 1e-3 * torch.randn_like(z)), test_images[0]
        ).fired
        both = Then(fresh(inner), lambda x: x - x.mean(dim=0), lambda z: z + 1e-3 * torch.randn_like(z))
        assert dependence_of(both, test_images[0]).fired
