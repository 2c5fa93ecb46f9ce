"""Pretrained weights: read from a file, a hub or a library, and copied for the workers."""

from __future__ import annotations

import hashlib

from safetensors.torch import load as safetensors_load
from torch import Tensor

from components.config import TrainConfig
from components.errors import ConfigError, DataError
from components.models import libraries, zoo
from components.models.weights import Weights
from pipeline.data import hub
from pipeline.runtime.storage import Storage, split_uri
from pipeline.training import weights_file

MLFLOW = "mlflow:"


def read(config: TrainConfig, tracking_uri: str = "") -> Weights:
    """Return the tensors that ``train.pretrained`` names.

    Raises:
        StorageError: the file does not exist.
        DataError: the file holds no tensors, or a hub's or library's weights cannot be downloaded.
        ConfigError: a library has no such weights, of this architecture, or is not installed.
        UserError: MLflow has no such weights.
    """
    where = config.pretrained
    if where.startswith("torchvision:"):
        name = libraries.parse(config.arch)[1] if libraries.is_library(config.arch) else config.arch
        return _torchvision(name, where.partition(":")[2])
    if where.startswith(zoo.PREFIX):
        weights = Weights(zoo.load(where).state_dict())
        weights.where = where
        return weights
    text, data, key = read_file(where, tracking_uri)
    return weights_file.read(data, text, key)


def read_file(where: str, tracking_uri: str = "", setting: str = "train.pretrained") -> tuple[str, bytes, str]:
    """Read a file that a setting names by a path, a URI, an mlflow:... or hf:... address.

    Args:
        setting: the field or option that holds ``where``, for messages.

    Returns:
        Its full path (for the Hugging Face Hub its address with the commit), its bytes, and the key
        of the network in it (FILE#KEY), or "".
    """
    if where.startswith(MLFLOW):
        from pipeline.tracking import weights  # Importing MLflow takes seconds.

        file, key = _split_key(where)
        return *weights.download_weights(tracking_uri, file.removeprefix(MLFLOW)), key
    if where.startswith(hub.PREFIX):
        file, key = _split_key(where)
        address, data = hub.download(file, setting)
        return str(address), data, key
    storage, name, key = locate(where)
    return storage.join(name), storage.read_bytes(name), key


def locate(where: str) -> tuple[Storage, str, str]:
    """Split FILE or FILE#KEY into the file's directory, its name, and the key.

    A file whose own name has the # is taken whole.

    Raises:
        ConfigError: a URI has a password or key, or an unknown protocol.
        StorageError: the storage cannot be read.
    """
    storage, name = split_uri(where)
    file, key = _split_key(where)
    if file == where or ("#" in name and storage.exists(name)):
        return storage, name, ""
    return *split_uri(file), key


def _split_key(where: str) -> tuple[str, str]:
    file, sign, key = where.rpartition("#")
    return (file, key) if sign and "/" not in key else (where, "")


def _torchvision(arch: str, name: str) -> Weights:
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
        weights = Weights(known[name].get_state_dict(progress=False, check_hash=True))
    except OSError as e:
        raise DataError(
            f"train.pretrained: torchvision:{name} of {arch} cannot be downloaded ({e}); "
            "where there is no internet, give the path of the .pth file"
        ) from e
    weights.where = f"torchvision:{name}"
    return weights


def fetch(config: TrainConfig, root: Storage, tracking_uri: str = "") -> str:
    """Copy the weights to the storage, and return their address. Raises as :func:`read`."""
    return store(root, weights_file.to_bytes(dict(sorted(read(config, tracking_uri).items()))))


def store(root: Storage, data: bytes) -> str:
    """Write a file to ``weights/<sha256>.safetensors``, unless it is there. Return that address."""
    address = f"weights/{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    if not root.exists(address):
        root.write_bytes(address, data)
    return address


def load(root: Storage, address: str) -> dict[str, Tensor]:
    """Return the tensors that :func:`fetch` copied.

    Raises:
        StorageError: the file cannot be read.
        DataError: the file is not the one that its name says.
    """
    data = root.read_bytes(address)
    if not hashlib.sha256(data).hexdigest().startswith(address.rpartition("/")[2].partition(".")[0]):
        raise DataError(f"{root.uri}/{address} is not what its name says; delete it and run the same command again")
    return dict(safetensors_load(data))
