"""Finished models: exported files, and the model.json that is written after them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from components.config import Shapes, TrainConfig
from components.errors import DataError
from components.fields import to_dict
from components.network import build_net
from components.precision import describe
from pipeline.runtime.storage import Storage
from pipeline.training import checkpoints, exports, pretrained
from pipeline.training.assignment import ATTEMPT
from pipeline.training.external import AUTOENCODER
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingJob
from pipeline.training.loop import TrainingLoop


def export_trained(loop: TrainingLoop, home: Storage, request: Mapping[str, Any]) -> None:
    """Export a trained model, and delete what only its training needed."""
    history = [home.read_json(f"history/{name}") for name in home.list("history")][: loop.config.epochs]
    seconds = sum(epoch["seconds"] for epoch in history)
    rate = sum(epoch["images_per_second"] * epoch["seconds"] for epoch in history) / seconds
    measured = {
        "workers": loop.world,
        "validation": history[-1]["validation"],
        "seconds": seconds,
        "images_per_second": rate,
        "arithmetic": describe(loop.device.type, loop.config.precision),
    }
    exports.export(home, loop.trained_net, loop.config, loop.shapes)
    _write_model(home, exports.parts_of(loop.trained_net), loop.config, loop.shapes, request, measured)
    # Checkpoints are three times as large as the model.
    for name in checkpoints.list_checkpoints(home / "checkpoints"):
        home.delete(f"checkpoints/{name}")
    for name in ("live.json", ATTEMPT, FAILED_MODEL, NOT_FINITE):
        home.delete(name)


def export_external(job: TrainingJob, shapes: Shapes, root: Storage) -> None:
    """Export an external model (``epochs=0``) as it is, with its auto-encoder if it has one."""
    home = root / job.address
    net = build_net(job.config, shapes, pretrained.load(root, job.weights))
    exports.export(home, net, job.config, shapes)
    parts = exports.parts_of(net)
    if job.autoencoder:
        home.write_bytes(AUTOENCODER, root.read_bytes(job.autoencoder))
        parts["autoencoder"] = exports.load_autoencoder(home.full_uri, trusted=job.config.arch)
    measured = {"workers": 1, "validation": {}, "seconds": 0.0, "images_per_second": 0.0}
    _write_model(home, parts, job.config, shapes, job.request(), measured)


def _write_model(
    home: Storage,
    parts: Mapping[str, nn.Module],
    config: TrainConfig,
    shapes: Shapes,
    request: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> None:
    files = [f"{name}.safetensors" for name in parts]
    home.write_json(
        "model.json",
        {
            "schema": exports.SCHEMA,
            "train": to_dict(config),
            "shapes": to_dict(shapes),
            "pyramids": request["pyramids"],
            "weights": request["weights"],
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            **measured,
            "files": {file: hashlib.sha256(home.read_bytes(file)).hexdigest() for file in files},
        },
    )


def read_finished(home: Storage, address: str) -> dict[str, Any]:
    """Return a finished model's model.json with "path" = ``address``.

    Raises:
        DataError: an exported file was changed since.
    """
    model: dict[str, Any] = home.read_json("model.json")
    for file, digest in model["files"].items():
        if hashlib.sha256(home.read_bytes(file)).hexdigest() != digest:
            raise DataError(f"{home.uri}/{file} is not what was exported; delete {home.uri} to train the model again")
    return {**model, "path": address}
