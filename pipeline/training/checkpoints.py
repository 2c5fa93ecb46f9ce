"""Training checkpoints: saved, listed and loaded."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import torch
from torch import nn

from components.config import TrainConfig
from components.config.data import Shapes
from components.errors import DataError
from components.fields import to_dict
from pipeline.runtime.storage import Storage
from pipeline.training.exports import SCHEMA

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
    """Write the state after ``epoch`` epochs below a directory, whole or not at all, and delete all but it and the one before.

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
    names = list_checkpoints(storage)
    newest = names.index(name)
    # those of later epochs are damaged: training would not have gone back otherwise
    for other in (*names[: max(0, newest + 1 - KEPT)], *names[newest + 1 :]):
        storage.delete(other)
    return name


def list_checkpoints(storage: Storage) -> list[str]:
    """Names of the checkpoints below a directory, oldest first."""
    return [name for name in storage.list() if name.startswith("epoch-") and name.endswith(".pt")]


@dataclass(frozen=True)
class StoredCheckpoint:
    """The checkpoint from which training goes on."""

    path: str
    """Empty where training starts from the beginning."""
    data: bytes
    damaged: tuple[str, ...]
    """Paths of newer checkpoints, which cannot be read."""


def newest_whole(storage: Storage) -> StoredCheckpoint:
    """Return the newest checkpoint below a directory that is not damaged. The damaged ones are left for inspection until
    the next checkpoint is written.

    Raises:
        StorageError: the storage cannot be read.
    """
    damaged = []
    for name in reversed(list_checkpoints(storage)):
        data, path = storage.read_bytes(name), f"{storage.uri}/{name}"
        if _is_whole(data):
            return StoredCheckpoint(path, data, tuple(damaged))
        damaged.append(path)
    return StoredCheckpoint("", b"", tuple(damaged))


def _is_whole(data: bytes) -> bool:
    """Tell whether all checksums of a checkpoint's zip archive are right. (torch.load does not compare them.)"""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises half a dozen kinds, depending on which byte is wrong
        return False


def load_checkpoint(
    checkpoint: StoredCheckpoint,
    *,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    shapes: Shapes,
) -> int:
    """Load a checkpoint into network and optimizer and return how many epochs are done.

    Raises:
        DataError: a corrupt file, another schema version, or a checkpoint of another model.
    """
    path = checkpoint.path
    try:
        state = torch.load(io.BytesIO(checkpoint.data), map_location="cpu", weights_only=True)
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
