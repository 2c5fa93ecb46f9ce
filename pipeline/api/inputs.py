"""Checks of what a caller of ``evaluate`` holds in memory: images, labels and networks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.errors import ConfigError, DataError
from components.evaluation.probe import kind_of_output
from components.models.defend import AutoEncoder

Array = Tensor | NDArray[Any]
FIRST_IMAGES = 8
"""Images of the pass that checks a network's output."""


def checked_images(images: Array) -> NDArray[np.float32]:
    """Return images as float32 [N,C,W,W] on the CPU.

    Raises:
        DataError: they have another type or shape, are not finite, or leave [0,1].
    """
    values = _as_array("images", images)
    if values.ndim != 4 or not len(values) or values.shape[1] not in (1, 3) or values.shape[2] != values.shape[3]:
        remedy = ": move the channels with images.transpose(0, 3, 1, 2)" if _is_channels_last(values) else ""
        raise DataError(
            f"images have the shape {list(values.shape)}; they must be [N,C,W,W], square, with C = 1 or 3{remedy}"
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"images are {values.dtype}; they must be floats in [0,1]: divide pixels of 0 to 255 by 255")
    values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{int((~finite).sum())} of {len(values)} images have pixels that are not finite, the first of them is "
            f"image {int(finite.argmin())}: leave them out or mend them"
        )
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        remedy = "divide them by 255" if low >= 0 else "let the network normalise them, and give the images before that"
        raise DataError(f"images reach from {low:.4g} to {high:.4g}; they must be in [0,1]: {remedy}")
    return np.ascontiguousarray(values)


def _is_channels_last(values: NDArray[Any]) -> bool:
    return values.ndim == 4 and values.shape[3] in (1, 3) and values.shape[1] == values.shape[2]


def checked_labels(labels: Array, n: int) -> NDArray[np.int64]:
    """Return labels as int64 [n].

    Raises:
        DataError: they have another type or length, or one is negative.
    """
    values = _as_array("labels", labels)
    if values.ndim == 2 and len(values) == n:
        raise DataError(f"labels have the shape {list(values.shape)}; they must be class numbers [N]: labels.argmax(1)")
    if values.shape != (n,):
        raise DataError(f"labels have the shape {list(values.shape)}; for {n} images it must be [{n}]")
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"labels are {values.dtype}; they must be whole numbers, the classes from 0 on")
    values = values.astype(np.int64)
    if values.min() < 0:
        raise DataError(f"label {int(values.argmin())} is {int(values.min())}; classes count from 0")
    return values


def _as_array(name: str, values: Array) -> NDArray[Any]:
    if isinstance(values, Tensor):
        detached = values.detach().cpu()
        return (detached.float() if detached.dtype == torch.bfloat16 else detached).numpy()
    if isinstance(values, np.ndarray):
        return values
    raise DataError(f"{name} are of type {type(values).__name__}; they must be a torch tensor or a NumPy array")


def checked_network(name: str, network: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64]) -> int:
    """Run a network in eval mode on the first images, and return its number of classes.

    A network whose outputs are probabilities gets a warning: attacks need logits.

    Raises:
        ConfigError: it is no nn.Module, it does not take the images, its output is not [N,K] and
            finite, or K is too small for the labels.
    """
    first = torch.tensor(images[:FIRST_IMAGES], device=device_of(name, network))
    try:
        with torch.no_grad():
            output = network(first)
    except Exception as e:  # A user's own code may raise errors of any type.
        raise ConfigError(
            f"{name} does not take images of float32 {list(first.shape)} in [0,1] ({type(e).__name__}: {e}). Wrap it "
            "in an nn.Module that does"
        ) from e
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(first) or output.shape[1] < 2:
        shown = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{name} returns {shown} for {len(first)} images; it must return logits [{len(first)},K], K >= 2: wrap it "
            "in an nn.Module that does"
        )
    if not output.isfinite().all():
        raise ConfigError(f"{name} returns logits that are not finite: check its weights and its normalisation")
    classes = output.shape[1]
    if labels.max() >= classes:
        raise DataError(
            f"label {int(labels.argmax())} is {int(labels.max())}, but {name} has {classes} classes, 0 to {classes - 1}"
        )
    if kind_of_output(output) == "probabilities":
        warnings.warn(
            f"{name} returns probabilities. Attacks need the logits before the softmax: on probabilities their "
            "gradients vanish, and the network looks more robust than it is.",
            stacklevel=3,
        )
    return classes


def checked_autoencoder(autoencoder: nn.Module, device: torch.device) -> AutoEncoder:
    """Return the auto-encoder of the adaptive attack.

    Raises:
        ConfigError: it is another kind of module, or on another device than the network.
    """
    if not isinstance(autoencoder, AutoEncoder):
        raise ConfigError.of(
            "autoencoder", type(autoencoder).__name__, "an AutoEncoder, such as load_autoencoder returns"
        )
    _check_device("autoencoder", autoencoder, device)
    return autoencoder


def device_of(name: str, network: nn.Module) -> torch.device:
    """Return the device of a network, which is the CPU if it has no parameters.

    Raises:
        ConfigError: it is no network, lies on several devices, or on one that is no CPU or GPU.
    """
    if not isinstance(network, nn.Module):
        raise ConfigError.of(name, network, "an nn.Module that maps images in [0,1] to logits")
    devices = sorted({str(tensor.device) for _, tensor in _tensors(network)})
    if len(devices) > 1:
        raise ConfigError(f"{name} lies on several devices ({', '.join(devices)}): move it to one with .to(device)")
    device = torch.device(devices[0] if devices else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{name} is on {device}, which has no float64: move it with .cpu() or .cuda()")
    return device


def check_same_device(networks: Mapping[str, nn.Module]) -> torch.device:
    """Return the one device of all networks.

    Raises:
        ConfigError: there are several.
    """
    first, *others = networks
    device = device_of(first, networks[first])
    for name in others:
        _check_device(name, networks[name], device)
    return device


def _check_device(name: str, network: nn.Module, device: torch.device) -> None:
    if device_of(name, network) != device:
        raise ConfigError(
            f"{name} is on {device_of(name, network)}, the network under test on {device}: move it with "
            f".to({str(device)!r})"
        )


def state_hash(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(network):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_unchanged(name: str, network: nn.Module, state: str) -> None:
    """Raise ConfigError if the :func:`state_hash` of a network is no longer ``state``."""
    if state_hash(network) != state:
        raise ConfigError(
            f"{name} changed its own parameters or buffers while it was evaluated, so its results belong to no one "
            "network: let it change nothing in eval mode"
        )


def identity_of(name: str, network: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the SHA-256 that stands for a network in addresses: of its tensors and what it computes.

    Two networks of the same weights may differ in ``forward``, so their outputs on a few random
    images are part of it.

    Args:
        shape: [C,W,W] of an image.

    Raises:
        ConfigError: the network changes itself in eval mode. Its results would be found again under
            the address of a network that it no longer is.
    """
    state = state_hash(network)
    devices = sorted({tensor.device.index or 0 for _, tensor in _tensors(network) if tensor.is_cuda})
    images = torch.rand(FIRST_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        output = network(images.to(device_of(name, network)))
    check_unchanged(name, network, state)
    return hashlib.sha256(state.encode() + output.float().cpu().numpy().tobytes()).hexdigest()


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of all parameters and buffers, those too that a state_dict leaves out."""
    yield from network.named_parameters()
    yield from network.named_buffers()
