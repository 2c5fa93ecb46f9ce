"""A trained classifier that a user names by its directory, or by a run and its name there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.config import Shapes
from components.errors import DataError, UserError
from components.fields import from_dict
from pipeline.data import shards
from pipeline.records import RunRecord
from pipeline.runtime.storage import Storage, split_uri
from pipeline.training import exports

CLASSIFIER, REFORMER = "classifier.safetensors", "reformer.safetensors"


@dataclass(frozen=True)
class StoredClassifier:
    """A network from images in [0,1] to logits, and what it was found with."""

    name: str
    network: nn.Module
    """In eval mode. A reformer has its classifier behind it."""
    shapes: Shapes
    file: bytes | None
    """Its file of weights. None for a reformer and its classifier, which are two files."""
    images: Tensor
    """Real images, float32 [n,C,W,W] in [0,1]. Empty if the storage has none of them."""


def load(place: str, real_images: int) -> StoredClassifier:
    """Load the classifier of MODEL_DIR or of RUN/MODEL.

    Args:
        place: absolute path or URI of ``models/<kind>-<hash>``, or of ``runs/<name>-<hash>`` with
            the name of one of its models behind it.
        real_images: largest number of images to read.

    Raises:
        DataError: there is no such model, or its file is damaged or of a module that is not
            trusted (:func:`exports.trust`).
        StorageError: a file cannot be read.
    """
    above, name = split_uri(place.rstrip("/"))
    if (above / name).exists("model.json"):
        root = above.parent
        model = (above / name).read_json("model.json")
        if REFORMER in model["files"]:
            raise DataError(
                f"{place} is a reformer, whose classifier is another model: name both by RUN/MODEL, where RUN is the "
                "directory of a run that has them"
            )
        return _loaded(name, root, f"{above.root.rpartition('/')[2]}/{name}", None, model["pyramids"], real_images)
    if not above.exists("run.json"):
        raise UserError(
            f"{place} is no model: give the directory of one (STORAGE/models/KIND-HASH), or a run's and the name of "
            "its model (STORAGE/runs/NAME-HASH/MODEL)"
        )
    record = RunRecord.from_json(above.read_json("run.json"), f"{above.uri}/run.json")
    if name not in record.models:
        raise DataError(f"{above.uri} has no model {name!r}; it has {', '.join(record.models) or 'none'}")
    behind = record.experiment.transfer_source_of(name) or ""
    classifier = record.models[behind].path if behind in record.models else None
    splits = record.data.get("splits", {})
    return _loaded(name, above.parent.parent, record.models[name].path, classifier, splits, real_images)


def _loaded(
    name: str, root: Storage, path: str, classifier: str | None, splits: Mapping[str, str], real_images: int
) -> StoredClassifier:
    """Load a model below the root. ``classifier`` stands behind it if it is a reformer."""
    directory = root / path
    model: dict[str, Any] = directory.read_json("model.json")
    shapes = from_dict(Shapes, model["shapes"])
    images = _images(root, splits, shapes, real_images)
    if CLASSIFIER in model["files"]:
        network = exports.load_classifier(directory.full_uri, sha256=model["files"][CLASSIFIER])
        return StoredClassifier(name, network, shapes, directory.read_bytes(CLASSIFIER), images)
    if classifier is None:
        raise DataError(f"{directory.uri} is a reformer, and the run has no trained classifier behind it")
    network = exports.load_reformed(directory.full_uri, root.join(classifier), sha256=(model["files"][REFORMER], ""))
    return StoredClassifier(name, network, shapes, None, images)


def _images(root: Storage, splits: Mapping[str, str], shapes: Shapes, count: int) -> Tensor:
    """Read the first images of a test or validation split that is still on the storage."""
    for split in ("test", "validation"):
        if split in splits and root.exists(f"{splits[split]}/{shards.MANIFEST}"):
            shard_set = shards.load(root, splits[split])
            rows = shard_set.read_rows(0, min(count, shard_set.num_rows), ["image"])
            return torch.from_numpy(rows["image"].copy()).float().div_(255)
    return torch.empty(0, shapes.channels, shapes.image_size, shapes.image_size)
