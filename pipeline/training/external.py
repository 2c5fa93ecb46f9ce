"""Auto-encoder beside an external classifier: one that was trained elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor

from components.config import Shapes, TrainConfig
from components.errors import DataError, UserError
from components.models import zoo
from components.models.defend import DefendNet
from components.network import build_net
from pipeline.data import hub
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained

AUTOENCODER = "autoencoder.safetensors"
_BESIDE = f"the {AUTOENCODER} beside it"


def copy_autoencoder(
    config: TrainConfig, shapes: Shapes, weights: Mapping[str, Tensor], root: Storage, tracking_uri: str
) -> tuple[str, str]:
    """Copy the auto-encoder beside an external classifier, whose config and weights are given.

    Returns:
        Its address below the storage's root and "", or "" and the reason why there is none.

    Raises:
        StorageError: the storage cannot be read or written.
    """
    data, reason = autoencoder_beside(config.pretrained, tracking_uri)
    if data is not None:
        reason = mismatch(config, shapes, weights, data)
    if data is None or reason:
        return "", reason
    return pretrained.store(root, data), ""


def autoencoder_beside(classifier: str, tracking_uri: str) -> tuple[bytes | None, str]:
    """Read the auto-encoder's file beside a classifier. Return its bytes, or None and why not."""
    if classifier.startswith(("torchvision:", zoo.PREFIX)):
        return None, f"the weights of {classifier.partition(':')[0]} come without an auto-encoder"
    if classifier.startswith((pretrained.MLFLOW, hub.PREFIX)):
        # read_file resolves the name of a registered model to a run and a path, and a branch of the
        # Hub to a commit.
        path, _, _ = pretrained.read_file(classifier, tracking_uri)
        try:
            return pretrained.read_file(f"{path.rpartition('/')[0]}/{AUTOENCODER}", tracking_uri)[1], ""
        except UserError as e:
            return None, str(e)
    directory, _, _ = pretrained.locate(classifier)
    if not directory.exists(AUTOENCODER):
        return None, f"there is no {AUTOENCODER} in {directory.uri}, where the classifier lies"
    return directory.read_bytes(AUTOENCODER), ""


def mismatch(config: TrainConfig, shapes: Shapes, weights: Mapping[str, Tensor], data: bytes) -> str:
    """Return why a file is not the auto-encoder of this very classifier; empty if it is."""
    other = f"{_BESIDE} is not of this classifier"
    try:
        described, tensors = exports.described(data), safetensors_load(data)
    except Exception as e:  # The format has errors of several types.
        return f"{_BESIDE} cannot be read ({type(e).__name__}: {e})"
    if described is None:
        return f"{_BESIDE} was not exported by this project"
    file_config, file_shapes = described
    for ours, of_file, names in (
        (config, file_config, ("arch", "width", "normalize_mean", "normalize_std")),
        (shapes, file_shapes, ("image_size", "channels", "num_classes")),
    ):
        for name in names:
            if getattr(ours, name) != getattr(of_file, name):
                return f"{other}: its {name} is {getattr(of_file, name)!r}, here it is {getattr(ours, name)!r}"
    try:
        exports.check_source(data, file_config.arch, _BESIDE)
    except DataError as e:
        return str(e)
    net = build_net(replace(file_config, replace_head=False), file_shapes, weights)
    if not isinstance(net, DefendNet):
        return f"{other}: it was exported without one"
    before = {name: tensor.clone() for name, tensor in net.classifier.state_dict().items()}
    try:
        net.autoencoder.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        return f"{other}: {e}"
    # The auto-encoder's shared blocks overwrite those of the classifier.
    if not all(torch.equal(before[name], tensor) for name, tensor in net.classifier.state_dict().items()):
        return f"{other}: their shared blocks differ"
    return ""
