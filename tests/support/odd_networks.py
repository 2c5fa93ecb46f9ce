"""A user's own networks that keep, save or change tensors unusually. The functions can be named as --arch."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from own_network import Net
from torch import Tensor, nn

from components.models.adapter import Adapter


class Tied(Net):
    """A network with the same layers under two names, as if it kept a list of them."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.layers = nn.ModuleList([self.first, self.second])


class Constants(nn.Module):
    """RobustBench's ImageNormalizer: mean and standard deviation are part of the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.25))
        self.register_buffer("std", torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Wrapped(nn.Module):
    """A wrapper whose keys all begin with ``module.``, like torch's AveragedModel and many others."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class Normalizing(Net):
    """A network with methods and attributes whose names this project once used itself."""

    adapter = "none"

    def normalize(self, x: Tensor) -> Tensor:
        return x - 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.normalize(x))


class InPlace(Net):
    """A network that normalises its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.1307).div_(0.3081))


class InPlaceInTraining(Net):
    """A network that adds noise to its input in place during training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(torch.randn_like(x)) if self.training else x)


class Buffered(Net):
    """A network with one more tensor in its state."""

    def __init__(self, channels: int, num_classes: int, tensor: Tensor) -> None:
        super().__init__(channels, num_classes)
        self.register_buffer("more", tensor)


class Hooked(Net):
    """A network whose ``state_dict`` differs from the weights that it computes with."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.register_state_dict_post_hook(_negated)


def _negated(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state[f"{prefix}head.weight"] = -state[f"{prefix}head.weight"]


class Extra(Net):
    """A network whose state holds an object that is not a tensor."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Drawn(Net):
    """A network with a random projection outside its state, from NumPy's stream, which is not seeded here."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.projection = torch.from_numpy(np.random.default_rng().normal(size=(num_classes, num_classes))).float()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.projection


class Remembering(Net):
    """A network with running statistics that its state does not hold."""

    running: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.register_buffer("running", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running = x.mean().detach() * 10
        return super().forward(x) - self.running * torch.arange(10)


class Returning(Net):
    """A network that returns its logits within another object."""

    def __init__(self, channels: int, num_classes: int, make: Any) -> None:
        super().__init__(channels, num_classes)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(super().forward(x))


class Blocks(nn.Module):
    """A small network with the parts that an adapter names."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 3, 2, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 8, 3, 2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x)).mean((2, 3)))
        return logits


def with_adapter(num_classes: int, channels: int, image_size: int, width: int) -> tuple[nn.Module, Adapter]:
    adapter = Adapter(
        blocks=((("first",),), (("second",),)), depths=((1,), (1,)), head=("global_average", "flatten", "head")
    )
    return Blocks(channels, num_classes), adapter


def tied(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Tied(channels, num_classes)


def robustbench(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    parts = [("normalize", Constants(channels)), ("model", Net(channels, num_classes))]
    return nn.Sequential(OrderedDict(parts))


def wrapped(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Wrapped(Net(channels, num_classes))


def normalizing(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Normalizing(channels, num_classes)


def in_place(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return InPlace(channels, num_classes)


def in_place_in_training(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return InPlaceInTraining(channels, num_classes)


def with_view(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, torch.arange(12.0).view(3, 4).t()[1:])


def with_expanded(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, torch.ones(1).expand(5))


def with_complex(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, torch.ones(3, dtype=torch.complex64))


def with_complex128(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, torch.ones(3, dtype=torch.complex128))


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this type, but existing files hold it.
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def with_quantized(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, quantized())


def with_sparse(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Buffered(channels, num_classes, torch.eye(3).to_sparse())


def hooked(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Hooked(channels, num_classes)


def extra(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Extra(channels, num_classes)


def drawn(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Drawn(channels, num_classes)


def remembering(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Remembering(channels, num_classes)


def a_tuple(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Returning(channels, num_classes, lambda logits: (logits, logits))


def a_dict(num_classes: int, channels: int, image_size: int, width: int) -> nn.Module:
    return Returning(channels, num_classes, lambda logits: {"logits": logits})
