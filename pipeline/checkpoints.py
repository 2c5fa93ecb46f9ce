"""Training checkpoints (all that an exact continuation needs) and exported networks (weights alone, as safetensors)."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import nn

from components.config import TrainConfig, from_dict, to_dict
from components.errors import DataError
from components.models import libraries
from components.models.comdefend import ComDefend, Reformed
from components.models.defend import AutoEncoder, DefendNet
from pipeline.jobs import source_hash
from pipeline.storage import Storage
from pipeline.train_step import Shapes, build_net, classifier_of

SCHEMA = 1
"""Version of checkpoints and exports. Raise it when either changes in a way that old files cannot be read."""
KEPT = 2
"""Newest checkpoints that are kept: should the last one be damaged, the one before is still there."""


def save_checkpoint(
    storage: Storage,
    *,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: TrainConfig,
    shapes: Shapes,
) -> str:
    """Write the state after ``epoch`` epochs below a directory, whole or not at all, and delete all but the newest two.

    Random streams need no state: they follow from the step. Returns the name of the file.
    """
    state = {
        "schema": SCHEMA,
        "epoch": epoch,
        "config": to_dict(config),
        "shapes": to_dict(shapes),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = f"epoch-{epoch:05d}.pt"
    storage.write_bytes(name, buffer.getvalue())
    for old in list_checkpoints(storage)[:-KEPT]:
        storage.delete(old)
    return name


def list_checkpoints(storage: Storage) -> list[str]:
    """Names of the checkpoints below a directory, oldest first."""
    return [name for name in storage.list() if name.startswith("epoch-") and name.endswith(".pt")]


@dataclass(frozen=True)
class Found:
    """The checkpoint from which training goes on."""

    path: str
    """Empty where training starts from the beginning."""
    data: bytes
    damaged: tuple[str, ...]
    """Paths of newer checkpoints, which cannot be read."""


def newest_whole(storage: Storage) -> Found:
    """Return the newest checkpoint below a directory that is not damaged. The damaged ones are left for inspection, until
    their epoch is trained again.

    Raises:
        StorageError: the storage cannot be read.
    """
    damaged = []
    for name in reversed(list_checkpoints(storage)):
        data, path = storage.read_bytes(name), f"{storage.uri}/{name}"
        if _is_whole(data):
            return Found(path, data, tuple(damaged))
        damaged.append(path)
    return Found("", b"", tuple(damaged))


def _is_whole(data: bytes) -> bool:
    """Whether all checksums of a checkpoint's zip archive are right. (torch.load does not compare them.)"""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return False


def load_checkpoint(
    found: Found, *, net: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, shapes: Shapes
) -> int:
    """Load a checkpoint into network and optimizer and return how many epochs are done.

    Raises:
        DataError: a corrupt file, another schema version, or a checkpoint of another model.
    """
    path = found.path
    try:
        state = torch.load(io.BytesIO(found.data), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises whatever the unpickler met
        raise DataError(f"checkpoint {path} is corrupt ({type(e).__name__}: {e}); delete it to use an older one") from e
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != SCHEMA:
        raise DataError(f"checkpoint {path} has schema {schema}, this version reads {SCHEMA}")
    for part, mine in (("config", to_dict(config)), ("shapes", to_dict(shapes))):
        different = {k: (state[part].get(k), v) for k, v in mine.items() if state[part].get(k) != v}
        if different:
            told = "; ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in different.items())
            raise DataError(f"checkpoint {path} is of another model: {told}")
    net.load_state_dict(state["net"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


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
    said = {"schema": SCHEMA, "config": to_dict(config), "shapes": to_dict(shapes)}
    if source := source_hash(config.arch):
        said["source"] = source  # the same weights in another forward() are another network
    # one key alone: safetensors writes several in an order that changes from process to process, and the file's checksum,
    # which names all that is computed from it, would change with it
    metadata = {"defendpp": json.dumps(said)}
    parts = parts_of(net)
    for name, module in parts.items():
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        storage.write_bytes(f"{name}.safetensors", safetensors_save(tensors, metadata))
    return [f"{name}.safetensors" for name in parts]


def _read(path: str | os.PathLike[str], name: str) -> tuple[dict[str, torch.Tensor], TrainConfig, Shapes, str]:
    text = os.fspath(path)
    if not text.endswith(".safetensors"):
        text = f"{text.rstrip('/')}/{name}.safetensors"
    if "://" not in text:
        text = str(Path(text).expanduser().absolute())
    parent, _, base = text.rpartition("/")
    data = Storage(parent).read_bytes(base)
    try:
        found = described(data)
        tensors = safetensors_load(data)
    except DataError as e:
        raise DataError(f"{text} {e}") from e
    except Exception as e:  # the format's own errors are of several kinds
        raise DataError(
            f"{text} is not a whole safetensors file ({type(e).__name__}: {e}); train or copy it again"
        ) from e
    if found is None:
        raise DataError(f"{text} was not exported by this project: its metadata does not say which network it is")
    return tensors, *found, text


def described(data: bytes) -> tuple[TrainConfig, Shapes] | None:
    """Which network a safetensors file is of, as its metadata says; None if this project did not write it.

    Raises:
        DataError: it is of another schema. ValueError: it is no safetensors file.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get("defendpp")
    if text is None:
        return None
    said = json.loads(text)
    if said["schema"] != SCHEMA:
        raise DataError(f"has schema {said['schema']}, this version reads {SCHEMA}")
    return from_dict(TrainConfig, said["config"]), from_dict(Shapes, said["shapes"])


def _load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        raise DataError(f"{where} holds the weights of another architecture: {e}") from None


def load_classifier(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """The exported classifier: images [N, C, W, W] in [0,1] to logits, in eval mode, ready for any library's attacks.

    Args:
        path: classifier.safetensors, or the model's directory; local or a URI.

    Raises:
        StorageError: it cannot be read. DataError: it is corrupt or of another architecture.
    """
    tensors, config, shapes, where = _read(path, "classifier")
    module = build_net(dataclasses.replace(config, defense="none"), shapes)
    # an export of an earlier version may hold heads that are not built any more
    _load_strictly(module, libraries.tensors_for(config.arch, tensors), where)
    return module.to(device).eval()


def load_autoencoder(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> AutoEncoder:
    """The exported auto-encoder in eval mode: images in [0,1] to reconstructed levels, level 0 first.

    Raises as :func:`load_classifier`; a model without an auto-encoder has no such file.
    """
    tensors, config, shapes, where = _read(path, "autoencoder")
    net = build_net(config, shapes)
    if not isinstance(net, DefendNet):
        raise DataError(f"{where} says that it has no auto-encoder")
    _load_strictly(net.autoencoder, tensors, where)
    return net.autoencoder.to(device).eval()


def load_reformer(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> ComDefend:
    """The exported reformer in eval mode: images in [0,1] to reformed images. Raises as :func:`load_classifier`."""
    tensors, config, shapes, where = _read(path, "reformer")
    module = build_net(config, shapes)
    if not isinstance(module, ComDefend):
        raise DataError(f"{where} says that it is no reformer")
    _load_strictly(module, tensors, where)
    return module.to(device).eval()


def load_reformed(
    reformer: str | os.PathLike[str], classifier: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> Reformed:
    """A reformer with a classifier behind it, in eval mode: images in [0,1] to logits. Raises as :func:`load_classifier`."""
    return Reformed(load_reformer(reformer, device), load_classifier(classifier, device)).eval()
