"""Images that the report shows: gallery.npz (docs/records.md) and the figures of the paper.

They are written after the attacks, so that the report needs no model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.config import Experiment, level_sizes
from components.config.roles import first_replicates
from components.dct import target_levels
from components.threat_models import WHITE_BOX
from pipeline.data.shards import ShardSet
from pipeline.evaluation import figure_data
from pipeline.evaluation.attack_progress import Progress
from pipeline.evaluation.attack_tasks import TestSet
from pipeline.evaluation.chunks import read_chunks, read_examples
from pipeline.evaluation.figure_data import Arrays
from pipeline.evaluation.in_memory import as_images
from pipeline.evaluation.plan import Model
from pipeline.runtime.storage import Storage
from pipeline.training import exports

IMAGES = 8


def make(
    test: TestSet,
    models: Sequence[Model],
    evaluations: Sequence[dict[str, Any]],
    experiment: Experiment,
    run: Storage,
    root: Storage,
    progress: Progress,
) -> None:
    """Write gallery.npz and, if ``experiment.figures`` names any, figures.npz.

    Raises:
        DataError: a shard, examples or weights are missing or corrupt.
        StorageError: a file cannot be written.
    """
    n = min(IMAGES, test.num_rows, experiment.evaluation.chunk_size, experiment.evaluation.test_images or IMAGES)
    rows = test.read_rows(0, n, ["image", "label"])
    clean = as_images(rows["image"])
    first = set(first_replicates([m.name for m in models], experiment.base_names()))
    shown = [m for m in models if m.name in first]
    with_autoencoder = [m for m in models if (root / m.path).exists("autoencoder.safetensors")]
    gallery = _gallery(clean, rows["label"], shown, set(with_autoencoder), evaluations, experiment, root)
    _write(run, "gallery.npz", gallery)

    figures: Arrays = {}
    if "fig2" in experiment.figures:
        sizes = level_sizes(experiment.data.image_size, experiment.pyramids.levels)
        figures |= figure_data.fig2_arrays(clean[: figure_data.SPECTRA], sizes)
    fgsm = figure_data.fgsm_evaluations(evaluations, experiment)
    if "fig6" in experiment.figures and fgsm:
        subjects = [m for m in shown if m in with_autoencoder and m.name in fgsm]
        figures |= figure_data.fig6_arrays(clean, rows["label"], subjects, fgsm, root)
    if "fig8" in experiment.figures and fgsm and isinstance(test, ShardSet):
        subjects = [m for m in with_autoencoder if m.name in fgsm]
        earlier = figure_data.read_earlier_figures(run)
        figures |= figure_data.fig8_arrays(test, subjects, fgsm, experiment, root, earlier, progress)
    if figures:
        _write(run, figure_data.FIGURES_FILE, figures)


def _write(run: Storage, name: str, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    run.write_bytes(name, buffer.getvalue())


def _gallery(
    clean: Tensor,
    label: np.ndarray,
    shown: Sequence[Model],
    with_autoencoder: set[Model],
    evaluations: Sequence[dict[str, Any]],
    experiment: Experiment,
    root: Storage,
) -> Arrays:
    arrays: Arrays = {"clean": clean.numpy(), "label": label}
    sizes = level_sizes(experiment.data.image_size, experiment.pyramids.levels)
    # Of several kinds of targets, the first stands for all: they hardly look different.
    targets = [c.targets for c in experiment.model_configs().values() if c.defense == "defend++"]
    for m, level in enumerate(target_levels(clean, sizes, targets[0] if targets else "lowpass")):
        arrays[f"level_{m}"] = level.numpy()
    for model in shown:
        if model in with_autoencoder:
            with torch.no_grad():
                outputs = exports.load_autoencoder(root.join(model.path), sha256=model.autoencoder)(clean)
            for m, output in enumerate(outputs):
                arrays[f"reconstruction_{m}__{model.name}"] = output.numpy()
    names = {m.name for m in shown}
    for e in evaluations:
        if e["threat_model"] == WHITE_BOX and e["examples"] and e["model"] in names:
            # The whole spec, since a run may have one attack at several eps.
            key = f"{e['model']}__{e['attack']}"
            arrays[f"adversarial__{key}"] = read_examples(root / e["examples"], 0)[: len(clean)]
            arrays[f"prediction__{key}"] = read_chunks(root / e["path"], 1)["adversarial_prediction"][: len(clean)]
    return arrays
