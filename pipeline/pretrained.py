"""Weights to start from: a local file, any storage, or torchvision's; copied once to the run's storage for its workers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from components.config import ConfigError, TrainConfig
from components.errors import DataError
from components.models import libraries
from pipeline.storage import Storage

MLFLOW = "mlflow:"


def read(config: TrainConfig, tracking_uri: str = "") -> dict[str, Tensor]:
    """The tensors that ``train.pretrained`` names.

    Args:
        tracking_uri: the MLflow that mlflow:... is looked up in.

    Raises:
        StorageError: the file does not exist. DataError: it holds no tensors, or torchvision's cannot be had.
        ConfigError: torchvision has no such weights of this architecture. UserError: MLflow has no such weights.
    """
    where = config.pretrained
    if where.startswith("torchvision:"):
        name = libraries.parse(config.arch)[1] if libraries.is_library(config.arch) else config.arch
        return _torchvision(name, where.partition(":")[2])
    text, data = read_file(where, tracking_uri)
    name = text.rpartition("/")[2]
    try:
        if name.endswith(".safetensors"):
            return dict(safetensors_load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # both formats' own errors are of several kinds
        raise DataError(f"train.pretrained: {text} cannot be read ({type(e).__name__}: {e}); copy it again") from e
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"train.pretrained: {text} holds no dictionary of tensors; give a state_dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_file(where: str, tracking_uri: str = "") -> tuple[str, bytes]:
    """Whole path and bytes of a file that ``train.pretrained`` names by a path, a URI, or as MLflow's. Raises as :func:`read`."""
    if where.startswith(MLFLOW):
        from pipeline import tracking  # MLflow is imported only by who asks for it

        return tracking.download_weights(tracking_uri, where.removeprefix(MLFLOW))
    text = whole_path(where)
    parent, _, name = text.rpartition("/")
    return text, Storage(parent or "/").read_bytes(name)


def whole_path(where: str) -> str:
    """A URI as it is, a path from the root on."""
    return where if "://" in where else str(Path(where).expanduser().absolute())


def _torchvision(arch: str, name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(arch)
    except ValueError:
        raise ConfigError.of(
            "train.pretrained", f"torchvision:{name}", f"a file: torchvision has no architecture {arch}"
        ) from None
    if name not in known.__members__:
        allowed = " or ".join(f"torchvision:{k}" for k in known.__members__)
        raise ConfigError.of("train.pretrained", f"torchvision:{name}", allowed)
    try:
        return dict(known[name].get_state_dict(progress=False, check_hash=True))
    except OSError as e:
        raise DataError(
            f"train.pretrained: torchvision:{name} of {arch} cannot be downloaded ({e}); where there is no internet, give the "
            "path of the .pth file"
        ) from e


def fetch(config: TrainConfig, root: Storage, tracking_uri: str = "") -> str:
    """Copy the weights to ``weights/<sha256>.safetensors`` of the storage, if they are not there, and return that address."""
    data = safetensors_save({k: v.contiguous() for k, v in sorted(read(config, tracking_uri).items())})
    address = f"weights/{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    if not root.exists(address):
        root.write_bytes(address, data)
    return address


def load(root: Storage, address: str) -> dict[str, Tensor]:
    """What :func:`fetch` copied. Raises StorageError or DataError."""
    data = root.read_bytes(address)
    try:
        return dict(safetensors_load(data))
    except Exception as e:
        raise DataError(f"{root.uri}/{address} is corrupt ({e}); delete it and run the same command again") from e
