"""A few images of every kind, kept with the records, so that the report can draw them without any model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from components.attacks.spec import AttackSpec
from components.config import Experiment, level_sizes
from components.dct import linear_pyramid, lowpass_pyramid
from pipeline import checkpoints
from pipeline.attack import Model, read_chunks, read_examples
from pipeline.shards import ShardSet
from pipeline.storage import Storage

IMAGES = 8


def make(
    test: ShardSet,
    models: Sequence[Model],
    evaluations: Sequence[dict[str, Any]],
    experiment: Experiment,
    run: Storage,
    root: Storage,
) -> None:
    """Write gallery.npz (docs/records.md): clean images, target levels, reconstructions, white-box adversarial examples."""
    n = min(IMAGES, test.num_rows, experiment.evaluation.chunk_size, experiment.evaluation.test_images or IMAGES)
    rows = test.read_rows(0, n)
    clean = torch.from_numpy(rows["image"]).float() / 255
    arrays: dict[str, np.ndarray] = {"clean": clean.numpy(), "label": rows["label"]}
    sizes = level_sizes(experiment.data.image_size, experiment.pyramids.levels)
    targets = experiment.pyramids.targets
    levels = (
        [clean] if targets == "none" else (linear_pyramid if targets == "linear" else lowpass_pyramid)(clean, sizes)
    )
    for m, level in enumerate(levels):
        arrays[f"level_{m}"] = level.numpy()
    for model in models:
        if (root / model.path).exists("autoencoder.safetensors"):
            with torch.no_grad():
                outputs = checkpoints.load_autoencoder(f"{root.uri}/{model.path}")(clean)
            for m, output in enumerate(outputs):
                arrays[f"reconstruction_{m}__{model.name}"] = output.numpy()
    for e in evaluations:
        if e["threat_model"] == "white_box" and e["examples"]:
            key = f"{e['model']}__{AttackSpec.parse(e['attack']).short_name}"
            arrays[f"adversarial__{key}"] = read_examples(root / e["examples"], 0)[:n]
            arrays[f"prediction__{key}"] = read_chunks(root / e["path"], 1)["adversarial_prediction"][:n]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    run.write_bytes("gallery.npz", buffer.getvalue())
