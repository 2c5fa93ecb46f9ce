"""Checks that an adapter describes its network, and that the network can be trained and attacked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from components.errors import ConfigError
from components.models.adapter import apply_head, encoder_units, evaluating


def check_adapter(classifier: nn.Module, channels: int, image_size: int, num_classes: int | None = None) -> None:
    """Check that blocks and head are the whole network: head(blocks(x)) must be classifier(x).

    The logits, and the order in which layers with weights run, are compared in eval mode on random
    images. The check uses a copy with perturbed weights and batch norm statistics that keep the
    signal alive, since in a fresh network a skipped block may do nothing yet (branches or heads
    that start at zero, maps that fade). Neither the network itself nor any random stream is
    changed.

    Args:
        channels, image_size: shape of the images.
        num_classes: required number of logits; None: any.

    Raises:
        ConfigError: a name does not exist, a block is skipped or out of order, a unit's output is
            changed in place by the next one, or the network does not run on such images or has
            another number of logits.
    """
    name = type(classifier).__name__
    net = copy.deepcopy(classifier).eval()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, channels, image_size, image_size, generator=generator).to(device)
    what = f"images of {channels}x{image_size}x{image_size}"
    called: list[str] = []
    for inner, module in net.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda m, args, inner=inner: called.append(inner))
    with torch.no_grad():
        _enliven(net, generator)
        _run(net, images.clone(), f"{name} does not run on {what}")  # This pass sets the statistics.
        net.eval()
        _logits(net, images[:1], num_classes)
        called.clear()
        expected = _logits(net, images, num_classes)
        in_forward = called.copy()
        called.clear()
        x = images
        outputs: list[tuple[str, Tensor, Tensor]] = [("images", x, x.clone())]
        for i, units in enumerate(encoder_units(net)):
            for j, unit in enumerate(units):
                x = _run(unit, x, f"adapter.blocks[{i}]: unit {j} of {name} does not take what comes before it")
                outputs.append((f"adapter.blocks[{i}], unit {j}", x, x.clone()))
        logits = _run(lambda latent: apply_head(net, latent), x, f"adapter.head of {name} does not take the latent")
    for where, tensor, clone in outputs:
        if not torch.equal(tensor, clone):
            raise ConfigError(
                f"{where}: what follows changes this output of {name} in place, so a decoder would not read what the "
                f"unit gave. Let the unit end after the in-place operation (a ReLU, most often)"
            )
    wrong = f"the adapter of {name} is not the whole network: a submodule is skipped, named twice or out of order"
    if called != in_forward:
        at = next((i for i, (a, b) in enumerate(zip(called, in_forward, strict=False)) if a != b), None)
        at = min(len(called), len(in_forward)) if at is None else at
        ran, should = (repr(names[at]) if at < len(names) else "the end" for names in (called, in_forward))
        raise ConfigError(f"{wrong}; in the network itself {should} comes where {ran} comes in the adapter")
    scale = float(expected.abs().max())
    if logits.shape != expected.shape or not float((logits - expected).abs().max()) <= 1e-5 * scale:
        raise ConfigError(
            f"{wrong}: its head after its blocks gives other logits than the network itself. Operations without a "
            f"weight, such as a ReLU or a pool, count: what forward() does without a submodule cannot be named"
        )


def check_output(classifier: nn.Module, channels: int, image_size: int, num_classes: int | None = None) -> None:
    """Check that a network without an adapter gives logits [N, num_classes] for such images.

    It must run on two images at a time and on one.

    Raises:
        ConfigError: it does not.
    """
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    images = torch.rand(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), evaluating(classifier):
        for n in (2, 1):
            _logits(classifier, images[:n], num_classes)


def _logits(net: nn.Module, images: Tensor, num_classes: int | None) -> Tensor:
    name, what = type(net).__name__, f"images of {images.shape[1]}x{images.shape[2]}x{images.shape[3]}"
    otherwise = f"{name} does not run on {what}"
    if len(images) == 1:
        otherwise += (
            ", one at a time, though it does on several: put every batch norm into eval mode, with running statistics"
        )
    network_inputs = images.clone()
    logits = _run(net, network_inputs, otherwise)
    refuse_in_place(net, network_inputs, images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ConfigError(
            f"{name} does not give logits [N, classes] for {what}, but {_described(logits)}: return the logits alone"
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ConfigError(
            f"{name} gives {logits.shape[1]} logits, but data.num_classes is {num_classes}: set "
            f"--data.num-classes {logits.shape[1]}, or build the network with num_classes outputs"
        )
    return logits


def refuse_in_place(net: nn.Module, network_inputs: Tensor, images: Tensor) -> None:
    """Check that a forward pass left its images unchanged.

    Attacks go on with these images and need their gradient.

    Args:
        network_inputs: the copy of ``images`` that the network ran on.

    Raises:
        ConfigError: the pass changed them.
    """
    if not torch.equal(network_inputs, images):
        raise ConfigError(
            f"{type(net).__name__} changes its images in place, which an attack goes on with: write x = (x - mean) "
            "/ std in place of x.sub_(mean).div_(std), or begin forward() with x = x.clone()"
        )


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    if isinstance(output, dict):
        return f"a dict with {', '.join(map(str, list(output)[:3]))}"
    return f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")


def _enliven(net: nn.Module, generator: torch.Generator) -> None:
    """Perturb every weight, and prepare batch norm for statistics of the next forward pass.

    The next forward pass replaces the running statistics by those of its own images.
    """
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=generator).to(p) * (0.05 * p.square().mean().sqrt() + 0.01))
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = 1.0


def _run(module: Any, x: Any, otherwise: str) -> Any:
    """Return module(x); an error of the user's network is reported after the text ``otherwise``."""
    try:
        return module(x)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(f"{otherwise} ({type(e).__name__}: {e})") from e
