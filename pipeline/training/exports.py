"""Exported networks: written, verified and loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from torch import nn

from components.config import TrainConfig
from components.config.data import Shapes
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
"""Version of checkpoints and exports. Raise it when either changes in a way that old files cannot be read."""
CHECK_IMAGES = 4
"""Images of the pass in training mode before :func:`check_export`: batch norm needs more than one."""
_trusted: set[str] = set()


def trust(archs: Iterable[str]) -> None:
    """Let this process import these MODULE:FUNCTIONs for files that name them: its own experiment asks for them too."""
    _trusted.update(archs)


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """What is exported of a network, by name: classifier, autoencoder (beside a classifier), or reformer."""
    if isinstance(net, ComDefend):
        return {"reformer": net}
    parts = {"classifier": classifier_of(net)}
    if isinstance(net, DefendNet):
        parts["autoencoder"] = net.autoencoder
    return parts


def export(storage: Storage, net: nn.Module, config: TrainConfig, shapes: Shapes) -> list[str]:
    """Write classifier.safetensors (the bare classifier) and, where there is one, autoencoder.safetensors; or
    reformer.safetensors.

    Each file says in its metadata how to build its network, so that it can be loaded alone.
    Returns the names of the files written.
    """
    names = []
    for part, _, data in _exported(net, config, shapes):
        names.append(f"{part}.safetensors")
        storage.write_bytes(names[-1], data)
    return names


def _exported(net: nn.Module, config: TrainConfig, shapes: Shapes) -> Iterator[tuple[str, nn.Module, bytes]]:
    """Yield name, module and file of each part, one after the other: together they may be a GB."""
    said = {"schema": SCHEMA, "config": to_dict(config), "shapes": to_dict(shapes)}
    if source := source_hash(config.arch):
        said["source"] = source  # the same weights in another forward() are another network
    # one key alone: safetensors writes several in an order that changes from process to process, and the file's checksum,
    # which names all that is computed from it, would change with it
    metadata = {"defendpp": json.dumps(said)}
    for name, part in parts_of(net).items():
        yield name, part, weights_file.to_bytes(part.state_dict(), metadata)


def check_export(net: nn.Module, config: TrainConfig, shapes: Shapes) -> list[str]:
    """Export a network in memory, load every part again, and compare what both give for the same images.

    A network that is to be trained makes one pass in training mode first: what that changes must be part of its state.

    Args:
        net: of :func:`build_net`; the pass may change its buffers.

    Returns:
        The names of the parts.

    Raises:
        ConfigError: a part cannot be exported or loaded again, or is another one then.
    """
    name = type(classifier_of(net)).__name__
    size = (shapes.channels, shapes.image_size, shapes.image_size)
    images = torch.rand(CHECK_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if config.epochs:
                given = images.clone()
                _train_mode_pass(net, given)
                refuse_in_place(classifier_of(net), given, images)
            for part, before, data in _exported(net, config, shapes):
                after = _rebuilt(part, safetensors_load(data), config, shapes, f"the export of {name}")
                one, other, again = (_outputs(module, images[:1]) for module in (before, after, before))
                # a network that draws from a stream that is not seeded here cannot be compared
                if not _alike(one, other) and _alike(one, again):
                    raise ConfigError(
                        f"{name}, exported and loaded again, gives other outputs (its {part}): register every tensor that it "
                        "computes with as a parameter or a persistent buffer, and draw fixed ones from torch's stream"
                    )
    except (ConfigError, DataError) as e:
        raise ConfigError(f"train.arch is {config.arch!r}; {e}") from e
    return list(parts_of(net))


def _train_mode_pass(net: nn.Module, images: torch.Tensor) -> None:
    net.train()
    try:
        classifier_of(net)(images)
    except Exception as e:  # a user's own code may raise anything
        raise ConfigError(f"{type(net).__name__} does not run in training mode ({type(e).__name__}: {e})") from e


def _outputs(module: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    outputs = module.eval()(images)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _alike(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) for x, y in zip(a, b, strict=True))


def _read(
    path: str | os.PathLike[str], name: str, trusted: str | Collection[str], sha256: str
) -> tuple[dict[str, torch.Tensor], TrainConfig, Shapes, str]:
    storage, base = split_uri(path)
    if not base.endswith(".safetensors"):
        base = f"{base}/{name}.safetensors".lstrip("/")
    data, text = storage.read_bytes(base), (storage / base).uri
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"{text} does not hold the weights that its records name: it was replaced or damaged since. Run the same command "
            "again to evaluate the weights there are"
        )
    try:
        found = described(data)
        tensors = safetensors_load(data)
    except DataError as e:
        raise DataError(f"{text} {e}") from e
    except Exception as e:  # the format's own errors are of several kinds
        reason = weights_file.why_no_weights(data, text) or f"{type(e).__name__}: {e}; copy it again"
        raise DataError(f"{text} is not a whole safetensors file ({reason}), or train the model again") from e
    if found is None:
        raise DataError(f"{text} was not exported by this project: its metadata does not say which network it is")
    config, shapes = found
    if own.is_own(config.arch) and config.arch not in _trusted.union(
        [trusted] if isinstance(trusted, str) else trusted
    ):
        raise DataError(
            f"{text} says that {config.arch} builds its network. A file does not decide which code is imported: if you trust "
            f"that module, pass trusted={config.arch!r}"
        )
    check_source(data, config.arch, text)
    return tensors, config, shapes, text


def described(data: bytes) -> tuple[TrainConfig, Shapes] | None:
    """Which network a safetensors file is of, as its metadata says; None if this project did not write it.

    Raises:
        DataError: it is of another schema. ValueError: it is no safetensors file.
    """
    said = _metadata(data)
    if said is None:
        return None
    if said.get("schema") != SCHEMA:
        raise DataError(f"has schema {said.get('schema')}, this version reads {SCHEMA}")
    try:
        return from_dict(TrainConfig, said["config"]), from_dict(Shapes, said["shapes"])
    except (KeyError, TypeError, AttributeError, ConfigError) as e:
        raise DataError(f"says in its metadata what this version does not know ({e})") from e


def check_source(data: bytes, arch: str, where: str) -> None:
    """Make sure that the module of MODULE:FUNCTION is the one that an exported file was made with, where the file says it.

    Raises:
        DataError: it has been edited since, or is another module.
    """
    source = (_metadata(data) or {}).get("source")
    if own.is_own(arch) and source and source != source_hash(arch):
        raise DataError(
            f"{where}: these weights were made by another version of {arch}, and may compute something else in this one. Restore "
            f"the module's file as it was. If its network is the same, take the tensors alone: "
            f"torch.save(safetensors.torch.load_file({where!r}), 'weights.pth')"
        )


def _metadata(data: bytes) -> dict[str, Any] | None:
    """Return what this project wrote into a safetensors file; None if it did not write it. Raises ValueError."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    text = metadata.get("defendpp") if isinstance(metadata, dict) else None
    said = json.loads(text) if isinstance(text, str) else None
    return said if isinstance(said, dict) else None


def _rebuilt(part: str, tensors: dict[str, torch.Tensor], config: TrainConfig, shapes: Shapes, where: str) -> nn.Module:
    """Build one of :func:`parts_of` as a file describes it, with the file's weights, in eval mode."""
    # only an auto-encoder needs the network that it was trained with
    net = build_net(config if part != "classifier" else dataclasses.replace(config, defense="none"), shapes)
    module = parts_of(net).get(part)
    if module is None:
        raise DataError(f"{where} says that it has no {'auto-encoder' if part == 'autoencoder' else part}")
    # an export of an earlier version may hold heads that are not built any more
    load_strictly(module, libraries.tensors_for(config.arch, tensors) if part == "classifier" else tensors, where)
    return module.eval()


def load_classifier(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    trusted: str | Collection[str] = (),
    sha256: str = "",
) -> nn.Module:
    """The exported classifier: images [N, C, W, W] in [0,1] to logits, in eval mode, ready for any library's attacks.

    Args:
        path: classifier.safetensors, or the model's directory; local or a URI.
        trusted: MODULE:FUNCTION, one or several, that may be imported if the file says that it builds the network.
        sha256: of the file, where another one is to be refused.

    Raises:
        StorageError: it cannot be read. ConfigError: its module cannot be imported. DataError: it is corrupt, of another
            architecture, of a module that is not trusted, or of another version of that module.
    """
    return _rebuilt("classifier", *_read(path, "classifier", trusted, sha256)).to(device)


def load_autoencoder(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    trusted: str | Collection[str] = (),
    sha256: str = "",
) -> AutoEncoder:
    """The exported auto-encoder in eval mode: images in [0,1] to reconstructed levels, level 0 first.

    Args and errors as of :func:`load_classifier`; a model without an auto-encoder has no such file.
    """
    autoencoder = _rebuilt("autoencoder", *_read(path, "autoencoder", trusted, sha256))
    assert isinstance(autoencoder, AutoEncoder)
    return autoencoder.to(device)


def load_reformer(path: str | os.PathLike[str], device: str | torch.device = "cpu", *, sha256: str = "") -> ComDefend:
    """The exported reformer in eval mode: images in [0,1] to reformed images. Raises as :func:`load_classifier`."""
    reformer = _rebuilt("reformer", *_read(path, "reformer", (), sha256))
    assert isinstance(reformer, ComDefend)
    return reformer.to(device)


def load_reformed(
    reformer: str | os.PathLike[str],
    classifier: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    trusted: str | Collection[str] = (),
    sha256: tuple[str, str] = ("", ""),
) -> Reformed:
    """Load a reformer with a classifier behind it, in eval mode: images in [0,1] to logits. As :func:`load_classifier`."""
    return Reformed(
        load_reformer(reformer, device, sha256=sha256[0]),
        load_classifier(classifier, device, trusted=trusted, sha256=sha256[1]),
    ).eval()
