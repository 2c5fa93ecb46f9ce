"""Exported networks: write, verify and load them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor, nn

from components.config import Shapes, TrainConfig
from components.errors import ConfigError, DataError
from components.fields import from_dict, to_dict
from components.models import libraries, own
from components.models.adapter_check import refuse_in_place
from components.models.comdefend import ComDefend, Reformed
from components.models.defend import AutoEncoder, DefendNet
from components.models.weights import load_strictly
from components.network import build_net, classifier_of
from pipeline.runtime.storage import Storage, split_uri
from pipeline.training import weights_file
from pipeline.training.jobs import source_hash

SCHEMA = 1
"""Version of checkpoints and exports. Raise it when old files of either can no longer be read."""
CHECK_IMAGES = 4
"""Images of :func:`check_export`'s pass in training mode. Batch norm needs more than one."""
File = str | os.PathLike[str]
"""A file of weights, or the model's directory that holds it; a path or a URI."""
Device = str | torch.device
Trusted = str | Collection[str]
"""MODULE:FUNCTION, one or several, that may be imported if a file names it."""
_trusted: set[str] = set()


def trust(archs: Iterable[str]) -> None:
    """Let this process import these MODULE:FUNCTION networks for files that name them."""
    _trusted.update(archs)


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the exported parts of a network: classifier and any autoencoder, or reformer."""
    if isinstance(net, ComDefend):
        return {"reformer": net}
    parts = {"classifier": classifier_of(net)}
    if isinstance(net, DefendNet):
        parts["autoencoder"] = net.autoencoder
    return parts


def export(storage: Storage, net: nn.Module, config: TrainConfig, shapes: Shapes) -> None:
    """Write one file for each of :func:`parts_of`, e.g. classifier.safetensors.

    A file's metadata says how to build its network, so that it can be loaded alone.
    """
    for part, _, data in _exported(net, config, shapes):
        storage.write_bytes(f"{part}.safetensors", data)


def _exported(net: nn.Module, config: TrainConfig, shapes: Shapes) -> Iterator[tuple[str, nn.Module, bytes]]:
    """Yield name, module and file of each part. They come one at a time, since all may be a GB."""
    description = {"schema": SCHEMA, "config": to_dict(config), "shapes": to_dict(shapes)}
    if source := source_hash(config.arch):
        description["source"] = source  # The same weights in another forward() are another network.
    # safetensors writes several keys in an order that changes from process to process. With a
    # single key the file's checksum, which names everything computed from it, stays the same.
    metadata = {"defendpp": json.dumps(description)}
    for name, part in parts_of(net).items():
        yield name, part, weights_file.to_bytes(part.state_dict(), metadata)


def check_export(net: nn.Module, config: TrainConfig, shapes: Shapes) -> list[str]:
    """Export a network in memory, load every part again, and compare the outputs.

    A network that will be trained makes one pass in training mode first, which may change its
    buffers. What that pass changes must be part of the network's state.

    Returns:
        The names of the parts.

    Raises:
        ConfigError: a part cannot be exported or loaded again, or has other outputs then.
    """
    name = type(classifier_of(net)).__name__
    size = (shapes.channels, shapes.image_size, shapes.image_size)
    images = torch.rand(CHECK_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if config.epochs:
                inputs = images.clone()
                _train_mode_pass(net, inputs)
                refuse_in_place(classifier_of(net), inputs, images)
            for part, before, data in _exported(net, config, shapes):
                after = _rebuilt(part, safetensors_load(data), config, shapes, f"the export of {name}")
                first, loaded, second = (_outputs(module, images[:1]) for module in (before, after, before))
                # A network with a random stream of its own differs from itself.
                if not _alike(first, loaded) and _alike(first, second):
                    raise ConfigError(
                        f"{name}, exported and loaded again, gives other outputs (its {part}): register every tensor "
                        "that it computes with as a parameter or a persistent buffer, and draw fixed ones from torch's "
                        "stream"
                    )
    except (ConfigError, DataError) as e:
        raise ConfigError(f"train.arch is {config.arch!r}; {e}") from e
    return list(parts_of(net))


def _train_mode_pass(net: nn.Module, images: Tensor) -> None:
    net.train()
    try:
        classifier_of(net)(images)
    except Exception as e:  # A user's own code may raise errors of any type.
        raise ConfigError(f"{type(net).__name__} does not run in training mode ({type(e).__name__}: {e})") from e


def _outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    outputs = module.eval()(images)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) for x, y in zip(a, b, strict=True))


def _read(path: File, name: str, trusted: Trusted, sha256: str) -> tuple[dict[str, Tensor], TrainConfig, Shapes, str]:
    storage, base = split_uri(path)
    if not base.endswith(".safetensors"):
        base = f"{base}/{name}.safetensors".lstrip("/")
    data, text = storage.read_bytes(base), (storage / base).uri
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"{text} does not hold the weights that its records name: it was replaced or damaged since. "
            "Run the same command again to evaluate the weights there are"
        )
    try:
        description = described(data)
        tensors = safetensors_load(data)
    except DataError as e:
        raise DataError(f"{text} {e}") from e
    except Exception as e:  # The format has errors of several types.
        reason = weights_file.why_no_weights(data, text) or f"{type(e).__name__}: {e}; copy it again"
        raise DataError(f"{text} is not a whole safetensors file ({reason}), or train the model again") from e
    if description is None:
        raise DataError(f"{text} was not exported by this project: its metadata does not say which network it is")
    config, shapes = description
    if own.is_own(config.arch) and config.arch not in _trusted.union(
        [trusted] if isinstance(trusted, str) else trusted
    ):
        raise DataError(
            f"{text} says that {config.arch} builds its network. A file does not decide which code is imported: "
            f"if you trust that module, pass trusted={config.arch!r}"
        )
    check_source(data, config.arch, text)
    return tensors, config, shapes, text


def described(data: bytes) -> tuple[TrainConfig, Shapes] | None:
    """Return config and shapes of a safetensors file's network; None for foreign files.

    Raises:
        DataError: the file has another schema.
        ValueError: it is no safetensors file.
    """
    metadata = _metadata(data)
    if metadata is None:
        return None
    if metadata.get("schema") != SCHEMA:
        raise DataError(f"has schema {metadata.get('schema')}, this version reads {SCHEMA}")
    try:
        return from_dict(TrainConfig, metadata["config"]), from_dict(Shapes, metadata["shapes"])
    except (KeyError, TypeError, AttributeError, ConfigError) as e:
        raise DataError(f"says in its metadata what this version does not know ({e})") from e


def check_source(data: bytes, arch: str, where: str) -> None:
    """Check that the module of MODULE:FUNCTION is the one that an exported file was made with.

    A file that names no source is not checked.

    Raises:
        DataError: the module has been edited since, or is another one.
    """
    source = (_metadata(data) or {}).get("source")
    if own.is_own(arch) and source and source != source_hash(arch):
        raise DataError(
            f"{where}: these weights were made by another version of {arch}, and may compute something else in this "
            "one. Restore the module's file as it was. If its network is the same, take the tensors alone: "
            f"torch.save(safetensors.torch.load_file({where!r}), 'weights.pth')"
        )


def _metadata(data: bytes) -> dict[str, Any] | None:
    """Return this project's metadata of a safetensors file, or None. Raise ValueError."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    text = metadata.get("defendpp") if isinstance(metadata, dict) else None
    value = json.loads(text) if isinstance(text, str) else None
    return value if isinstance(value, dict) else None


def _rebuilt(part: str, tensors: dict[str, Tensor], config: TrainConfig, shapes: Shapes, where: str) -> nn.Module:
    """Build one of :func:`parts_of` from a file's description and weights, in eval mode."""
    # Only an auto-encoder needs the network that it was trained with.
    net = build_net(config if part != "classifier" else dataclasses.replace(config, defense="none"), shapes)
    module = parts_of(net).get(part)
    if module is None:
        raise DataError(f"{where} says that it has no {'auto-encoder' if part == 'autoencoder' else part}")
    # An export of an earlier version may hold heads that are no longer built.
    load_strictly(module, libraries.tensors_for(config.arch, tensors) if part == "classifier" else tensors, where)
    return module.eval()


def load_classifier(path: File, device: Device = "cpu", *, trusted: Trusted = (), sha256: str = "") -> nn.Module:
    """Load an exported classifier in eval mode, ready for any library's attacks.

    Args:
        sha256: checksum that the file must have; empty for any.

    Returns:
        The network: images [N, C, W, W] in [0,1] to logits.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: the network's module cannot be imported.
        DataError: the file is corrupt, of another architecture, of a module that is not trusted, or
            of another version of that module.
    """
    return _rebuilt("classifier", *_read(path, "classifier", trusted, sha256)).to(device)


def load_autoencoder(path: File, device: Device = "cpu", *, trusted: Trusted = (), sha256: str = "") -> AutoEncoder:
    """Load an exported auto-encoder in eval mode: images in [0,1] to levels, level 0 first.

    Args, Raises: as :func:`load_classifier`. A model without an auto-encoder has no such file.
    """
    autoencoder = _rebuilt("autoencoder", *_read(path, "autoencoder", trusted, sha256))
    assert isinstance(autoencoder, AutoEncoder)
    return autoencoder.to(device)


def load_reformed(
    reformer: File,
    classifier: File,
    device: Device = "cpu",
    *,
    trusted: Trusted = (),
    sha256: tuple[str, str] = ("", ""),
) -> Reformed:
    """Load a reformer with a classifier behind it, in eval mode: images in [0,1] to logits.

    Args, Raises: as :func:`load_classifier`.
    """
    front = _rebuilt("reformer", *_read(reformer, "reformer", (), sha256[0]))
    assert isinstance(front, ComDefend)
    behind = load_classifier(classifier, device, trusted=trusted, sha256=sha256[1])
    return Reformed(front.to(device), behind).eval()
