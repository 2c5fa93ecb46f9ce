"""Training checkpoints: saved, listed and loaded."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from components.config import Shapes, TrainConfig
from components.errors import DataError
from components.fields import to_dict
from pipeline.runtime.storage import Storage
from pipeline.training.exports import SCHEMA

CHECKPOINTS_KEPT = 2
"""Newest checkpoints that are kept, so that one is left if the last is damaged."""


def save_checkpoint(
    storage: Storage,
    *,
    net: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None = None,
    epoch: int,
    config: TrainConfig,
    shapes: Shapes,
) -> str:
    """Write the state after ``epoch`` epochs, and delete all checkpoints but it and the one before.

    Random streams need no state, since they follow from the step. Return the file's name.
    """
    state = {
        "schema": SCHEMA,
        "epoch": epoch,
        "config": to_dict(config),
        "shapes": to_dict(shapes),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        **({"average": average.state_dict()} if average is not None else {}),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = f"epoch-{epoch:05d}.pt"
    storage.write_bytes(name, buffer.getvalue())
    names = list_checkpoints(storage)
    newest = names.index(name)
    # Checkpoints of later epochs are damaged: training would not have gone back otherwise.
    for other in (*names[: max(0, newest + 1 - CHECKPOINTS_KEPT)], *names[newest + 1 :]):
        storage.delete(other)
    return name


def list_checkpoints(storage: Storage) -> list[str]:
    """Return the names of the checkpoints in a directory, oldest first."""
    return [name for name in storage.list() if name.startswith("epoch-") and name.endswith(".pt")]


@dataclass(frozen=True)
class StoredCheckpoint:
    """Checkpoint from which training continues."""

    path: str
    """Empty if training starts from the beginning."""
    data: bytes
    damaged: tuple[str, ...]
    """Paths of newer checkpoints, which are damaged."""


def newest_whole(storage: Storage) -> StoredCheckpoint:
    """Return the newest checkpoint in a directory that is not damaged.

    Damaged ones are left for inspection until the next checkpoint is written.

    Raises:
        StorageError: the storage cannot be read.
    """
    damaged: list[str] = []
    for name in reversed(list_checkpoints(storage)):
        data, path = storage.read_bytes(name), f"{storage.uri}/{name}"
        if _is_whole(data):
            return StoredCheckpoint(path, data, tuple(damaged))
        damaged.append(path)
    return StoredCheckpoint("", b"", tuple(damaged))


def _is_whole(data: bytes) -> bool:
    """Tell whether all checksums of a zip archive are right. torch.load does not compare them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises errors of many types, depending on which byte is wrong.
        return False


def load_checkpoint(
    checkpoint: StoredCheckpoint,
    *,
    net: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None = None,
    config: TrainConfig,
    shapes: Shapes,
) -> int:
    """Load a checkpoint into network, optimizer and average. Return how many epochs are done.

    Raises:
        DataError: the file is corrupt, has another schema version, or is of another model.
    """
    path = checkpoint.path
    try:
        state = torch.load(io.BytesIO(checkpoint.data), map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises errors of many types.
        raise DataError(f"checkpoint {path} is corrupt ({type(e).__name__}: {e}); delete it to use an older one") from e
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != SCHEMA:
        raise DataError(f"checkpoint {path} has schema {schema}, this version reads {SCHEMA}")
    # A checkpoint of an earlier version lacks the settings that came later.
    stored = {"config": {**to_dict(TrainConfig()), **state["config"]}, "shapes": state["shapes"]}
    for part, expected in (("config", to_dict(config)), ("shapes", to_dict(shapes))):
        different = {k: (stored[part].get(k), v) for k, v in expected.items() if stored[part].get(k) != v}
        if different:
            differences = "; ".join(f"{k} is {a!r} there, {b!r} here" for k, (a, b) in different.items())
            raise DataError(f"checkpoint {path} is of another model: {differences}")
    net.load_state_dict(state["net"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"], strict=True)
    return int(state["epoch"])
