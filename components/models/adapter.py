"""Adapters, which cut a plain network into encoder blocks and a head without changing it.

Sec. 4.1 takes "its four encoding blocks" of a ResNet-18; sec. 3.3 lets the encoder be cut "to an
appropriate length". An :class:`Adapter` says where, by the names of the network's own submodules.
The functions here build modules *over* the network's layers (same storage, nothing copied) and add
no key to its ``state_dict``.

Three terms are used throughout:

- A *block* is what ``train.shared_blocks`` counts: blocks are shared with the auto-encoder or
  copied as a whole.
- A *unit* is a part of a block whose output the decoder may read (a *tap*). A VGG16 block is its
  convolutions, then its pool.
- The *head* maps the last block's output, the *latent*, to logits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from components.errors import ConfigError

Mirror = Literal["basic", "bottleneck", "plain"]
"""Blocks that a decoder mirrors a unit with: residual blocks of two 3x3 convolutions, bottlenecks
(1x1, 3x3, 1x1), or a chain of 3x3 convolutions with batch norm and ReLU."""

FLATTEN = "flatten"
"""In ``Adapter.head``: ``torch.flatten(x, 1)``."""
GLOBAL_AVERAGE = "global_average"
"""In ``Adapter.head``: the mean over height and width, kept as [N, C, 1, 1]. For networks that have
no module for it."""


NORMALIZATIONS = ("input_normalization", "normalize")
"""Names for the submodule that normalises a network's images if ``train.normalize_mean`` is set.
The second is used, unless the network itself has an attribute of that name, as RobustBench's
networks do."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Cut of a network into encoder blocks and a head.

    Every part of the network must be in exactly one place, in the order in which ``forward``
    applies it.

    Args:
        blocks: encoder blocks, each a tuple of units, each a tuple of dotted submodule names
            applied in order: ``(("conv1", "bn1", "relu"), ("maxpool", "layer1"))`` is one block of
            two units. A unit must end where the next one does not change its output in place (after
            an in-place ReLU, not before it).
        depths: number of residual blocks ("plain": convolutions) that mirror each unit of each
            block. 0: a pool, which is mirrored together with the unit before it.
        head: submodule names applied to the latent; ``"flatten"`` and ``"global_average"`` stand
            for those operations where the network has no module of that name.
        mirror: the kind of decoder block.
        stem: the first unit begins with a convolution that ``depths`` does not count. It is
            mirrored by one more convolution to the image.

    Raises:
        ConfigError: tuples do not fit together, a tuple is empty, or the mirror is unknown.
    """

    blocks: tuple[tuple[tuple[str, ...], ...], ...]
    depths: tuple[tuple[int, ...], ...]
    head: tuple[str, ...]
    mirror: Mirror = "plain"
    stem: bool = False

    def __post_init__(self) -> None:
        if not _is_names(self.head):
            raise ConfigError.of("adapter.head", self.head, "a tuple of submodule names")
        if not isinstance(self.blocks, tuple) or not self.blocks:
            raise ConfigError.of("adapter.blocks", self.blocks, "a tuple of at least one block")
        for i, block in enumerate(self.blocks):
            if not isinstance(block, tuple) or not block or not all(_is_names(unit) for unit in block):
                raise ConfigError.of(
                    f"adapter.blocks[{i}]", block, 'a tuple of units, each a tuple of names, as in (("layer2",),)'
                )
        shape = tuple(len(block) for block in self.blocks)
        if not isinstance(self.depths, tuple) or tuple(len(d) for d in self.depths) != shape:
            raise ConfigError.of("adapter.depths", self.depths, f"one number per unit, {shape} units in the blocks")
        if any(d < 0 for depths in self.depths for d in depths):
            raise ConfigError.of("adapter.depths", self.depths, "0 or more")
        if self.depths[0][0] == 0 and not self.stem:
            raise ConfigError.of(
                "adapter.depths", self.depths, "more than 0 for the first unit: there is none before it to merge with"
            )
        if self.mirror not in get_args(Mirror):
            raise ConfigError.of("adapter.mirror", self.mirror, "one of " + " | ".join(get_args(Mirror)))


def _is_names(unit: object) -> bool:
    return isinstance(unit, tuple) and len(unit) > 0 and all(isinstance(name, str) and name for name in unit)


class Normalize(nn.Module):
    """Normalisation (x - mean) / std per channel.

    The buffers are not persistent, so that the ``state_dict`` of the network keeps its keys.

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


class UnitBlock(nn.Sequential):
    """Encoder block of several units, which are its children.

    A block of one unit is that unit itself.
    """


def units_of(block: nn.Module) -> list[nn.Module]:
    """Return the units of a block of :func:`encoder_blocks`."""
    return list(block) if isinstance(block, UnitBlock) else [block]


def adapter_of(classifier: nn.Module) -> Adapter:
    """Return the adapter that a network carries as its attribute ``adapter``.

    Raises:
        ConfigError: it has no adapter.
    """
    adapter = getattr(classifier, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"{type(classifier).__name__} has no adapter that says what its encoder blocks are: see docs/networks.md"
        )
    return adapter


def encoder_units(classifier: nn.Module) -> list[list[nn.Module]]:
    """Return the units of each encoder block, as modules over the classifier's own layers.

    Each unit maps the output of the previous one. The first one maps images [N, C, H, W] in [0,1];
    normalisation, if the network has it, is part of it.

    Raises:
        ConfigError: the adapter names a submodule that does not exist.
    """
    adapter = adapter_of(classifier)
    normalize = _normalization(classifier)
    blocks: list[list[nn.Module]] = []
    for i, block in enumerate(adapter.blocks):
        units: list[nn.Module] = []
        for unit in block:
            modules = [_submodule(classifier, name, f"adapter.blocks[{i}]") for name in unit]
            if not blocks and not units and normalize is not None:
                modules.insert(0, normalize)
            units.append(modules[0] if len(modules) == 1 else nn.Sequential(*modules))
        blocks.append(units)
    return blocks


def encoder_blocks(classifier: nn.Module) -> list[nn.Module]:
    """Return the encoder blocks E_0.. of sec. 4.1, as modules over the classifier's own layers.

    They share the layers' storage, nothing is copied. ResNet: stem + layer1, layer2, layer3,
    layer4. VGG16: five, one per pooling layer. Block i maps the output of block i-1, the first one
    the images. Raises as :func:`encoder_units`.
    """
    return [units[0] if len(units) == 1 else UnitBlock(*units) for units in encoder_units(classifier)]


def apply_head(classifier: nn.Module, latent: Tensor) -> Tensor:
    """Compute logits [N, num_classes] from the output of the last encoder block.

    Raises:
        ConfigError: the adapter names a submodule that does not exist.
    """
    x = latent
    children = dict(classifier.named_children())
    for name in adapter_of(classifier).head:
        if name == FLATTEN and name not in children:
            x = torch.flatten(x, 1)
        elif name == GLOBAL_AVERAGE and name not in children:
            x = x.mean((2, 3), keepdim=True)
        else:
            x = _submodule(classifier, name, "adapter.head")(x)
    return x


def _submodule(classifier: nn.Module, name: str, where: str) -> nn.Module:
    module = classifier
    path: list[str] = []
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            parent = f"'{'.'.join(path)}'" if path else type(classifier).__name__
            close = difflib.get_close_matches(part, children, n=3)
            hint = f"did you mean {' or '.join(repr('.'.join([*path, c])) for c in close)}? " if close else ""
            raise ConfigError(
                f"{where} is {name!r}; {parent} has no submodule '{part}'. {hint}It has {', '.join(children) or 'none'}"
            )
        module = children[part]
        path.append(part)
    return module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode within the body, and restore the mode of each submodule after it.

    Some submodules may have been frozen on purpose.
    """
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def attach(
    classifier: nn.Module, adapter: Adapter | None, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> None:
    """Give a user's own network its adapter, if it has one, and its normalisation.

    The ``state_dict`` keeps its keys. Normalisation is a submodule without persistent buffers and a
    forward pre-hook that runs it. So the network takes images in [0,1] like every other, on any
    device and in a deep copy.

    Raises:
        ConfigError: there is an adapter to add, but the network has an attribute ``adapter`` of its
            own. Or the network is an ``nn.Sequential``, which would run the added normalisation as
            its last layer.
    """
    name = type(classifier).__name__
    carried = getattr(classifier, "adapter", None)
    if adapter is not None and carried is not None and not isinstance(carried, Adapter):
        raise ConfigError(f"{name} has an attribute named 'adapter', which Defend++ needs: rename it")
    if adapter is not None:
        classifier.adapter = adapter  # type: ignore[assignment]  # a plain attribute, not a submodule
    if not mean:
        return
    if isinstance(classifier, nn.Sequential):
        raise ConfigError(
            f"{name} is an nn.Sequential: wrap it in a module of your own, or train without normalisation"
        )
    normalize = Normalize(mean, std)
    parameter = next(classifier.parameters(), None)
    free = next((n for n in reversed(NORMALIZATIONS) if not hasattr(classifier, n)), None)
    if free is None:
        raise ConfigError(
            f"{name} has attributes named {' and '.join(NORMALIZATIONS)}: rename one, Defend++ adds its own"
        )
    classifier.add_module(free, normalize if parameter is None else normalize.to(parameter.device))
    classifier.register_forward_pre_hook(_normalized)


def _normalized(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The normalisation is looked up in the module, so that a deep copy normalises with its own
    # buffers.
    normalize = _normalization(module)
    assert normalize is not None  # It was attached together with this hook.
    return (normalize(args[0]), *args[1:])


def _normalization(module: nn.Module) -> Normalize | None:
    candidates = (getattr(module, name, None) for name in NORMALIZATIONS)
    return next((c for c in candidates if isinstance(c, Normalize)), None)
