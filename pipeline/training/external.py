"""The auto-encoder beside a classifier that was trained elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor

from components.config import TrainConfig
from components.config.data import Shapes
from components.errors import DataError, UserError
from components.models.defend import DefendNet
from components.network import build_net
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained

AUTOENCODER = "autoencoder.safetensors"


def copy_autoencoder(
    config: TrainConfig, shapes: Shapes, weights: Mapping[str, Tensor], root: Storage, tracking_uri: str
) -> tuple[str, str]:
    """Copy the auto-encoder that lies beside a given classifier to ``weights/<hash>.safetensors`` of the storage.

    Args:
        config: of the classifier; its ``pretrained`` says where that lies.
        weights: the classifier's.
        tracking_uri: the MLflow that mlflow:... is looked up in.

    Returns:
        Its address below the storage's root and "", or "" and why there is none.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    data, why = autoencoder_beside(config.pretrained, tracking_uri)
    if data is not None:
        why = why or mismatch(config, shapes, weights, data)
    if data is None or why:
        return "", why
    address = f"weights/{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    if not root.exists(address):
        root.write_bytes(address, data)
    return address, ""


def autoencoder_beside(where: str, tracking_uri: str) -> tuple[bytes | None, str]:
    """The bytes of the auto-encoder's file in the directory, or in the MLflow run, of a classifier's; or why there are none."""
    if where.startswith("torchvision:"):
        return None, "torchvision's weights come without an auto-encoder"
    if where.startswith(pretrained.MLFLOW):
        where, _, _ = pretrained.read_file(where, tracking_uri)  # a model's name as the run and path that it stands for
        try:
            return pretrained.read_file(f"{where.rpartition('/')[0]}/{AUTOENCODER}", tracking_uri)[1], ""
        except UserError as e:
            return None, str(e)
    directory, _, _ = pretrained.locate(where)
    if not directory.exists(AUTOENCODER):
        return None, f"there is no {AUTOENCODER} in {directory.uri}, where the classifier lies"
    return directory.read_bytes(AUTOENCODER), ""


def mismatch(config: TrainConfig, shapes: Shapes, weights: Mapping[str, Tensor], data: bytes) -> str:
    """Why a file is not the auto-encoder of this very classifier; empty if it is."""
    other = f"the {AUTOENCODER} beside it is not of this classifier"
    try:
        found, tensors = exports.described(data), safetensors_load(data)
    except Exception as e:  # the format's own errors are of several kinds
        return f"the {AUTOENCODER} beside it cannot be read ({type(e).__name__}: {e})"
    if found is None:
        return f"the {AUTOENCODER} beside it was not exported by this project"
    its, its_shapes = found
    for mine, theirs, names in (
        (config, its, ("arch", "width", "normalize_mean", "normalize_std")),
        (shapes, its_shapes, ("image_size", "channels", "num_classes")),
    ):
        for name in names:
            if getattr(mine, name) != getattr(theirs, name):
                return f"{other}: its {name} is {getattr(theirs, name)!r}, here it is {getattr(mine, name)!r}"
    try:
        exports.check_source(data, its.arch, f"the {AUTOENCODER} beside it")
    except DataError as e:
        return str(e)
    net = build_net(replace(its, replace_head=False), its_shapes, weights)
    if not isinstance(net, DefendNet):
        return f"{other}: it was exported without one"
    before = {name: tensor.clone() for name, tensor in net.classifier.state_dict().items()}
    try:
        net.autoencoder.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        return f"{other}: {e}"
    # the shared blocks are one set of weights, so loading the auto-encoder's has overwritten the classifier's
    if not all(torch.equal(before[name], tensor) for name, tensor in net.classifier.state_dict().items()):
        return f"{other}: their shared blocks differ"
    return ""
