"""Trained models as MLflow's logged models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from components.errors import UserError
from pipeline.data import shards
from pipeline.records import Record, RunRecord
from pipeline.reporting.tracked.names import code_tags, flatten, model_tags
from pipeline.runtime.storage import Storage
from pipeline.tracking.logged_models import LoggedNetwork, weights_digest
from pipeline.training import exports

if TYPE_CHECKING:
    from torch import nn


def network_of_run(root: Storage, record: RunRecord, name: str) -> LoggedNetwork:
    """Return a trained model of a run, as :func:`network`.

    Raises:
        StorageError: a ``model.json`` cannot be read.
    """
    classifier = record.models.get(record.experiment.transfer_source_of(name) or "")
    return network(
        root,
        record,
        f"{name} of {record.name}",
        record.models[name].path,
        behind=classifier.path if classifier else "",
        config=record.model_config(name),
        tags=model_tags(record, name),
    )


def network(
    root: Storage,
    record: Record,
    name: str,
    path: str,
    *,
    config: Mapping[str, Any],
    tags: Mapping[str, Any],
    behind: str = "",
) -> LoggedNetwork:
    """Return a trained model as MLflow's logged model. Of a reformer, it has the classifier behind it.

    Args:
        path: address of the model below ``root``.
        config: its training config.
        behind: address of the classifier, if the model is a reformer.

    Raises:
        StorageError: a ``model.json`` cannot be read.
    """
    files = root.read_json(f"{path}/model.json")["files"]
    if "reformer.safetensors" in files:
        parts = {path: files["reformer.safetensors"]}
        parts[behind] = root.read_json(f"{behind}/model.json")["files"]["classifier.safetensors"]
    else:
        parts = {path: files["classifier.safetensors"]}
    return LoggedNetwork(
        name=name,
        weights=weights_digest(*parts.values()),
        load=partial(_load, root, record, parts, str(config["arch"])),
        params=flatten(config),
        tags={**code_tags(record), **tags},
        metadata={"path": f"{root.uri}/{path}", "sha256": parts[path]},
    )


def _load(root: Storage, record: Record, parts: Mapping[str, str], arch: str) -> tuple[nn.Module, np.ndarray]:
    """Return a classifier, or a reformer with the classifier behind it, and an example of its input."""
    files, checksums = [root.join(path) for path in parts], list(parts.values())
    example = example_input(root, record)
    if len(files) == 1:
        return exports.load_classifier(files[0], trusted=arch, sha256=checksums[0]), example
    both = checksums[0], checksums[1]
    return exports.load_reformed(files[0], files[1], trusted=arch, sha256=both), example


def example_input(root: Storage, record: Record) -> np.ndarray:
    """Return an image of the test or validation split, float32 [1,C,W,W] in [0,1].

    It is black if the shards are no longer on the storage.
    """
    addresses = record.data.get("splits") or {}
    try:
        address = addresses.get("test") or addresses["validation"]
        image: np.ndarray = shards.load(root, address).read_rows(0, 1, ["image"])["image"].astype(np.float32) / 255
        return image
    except (UserError, KeyError, OSError):
        data = record.experiment.data
        return np.zeros((1, data.channels, data.image_size, data.image_size), np.float32)
