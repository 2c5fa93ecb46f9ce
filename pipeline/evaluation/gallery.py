"""What the report draws and run.json does not hold: a few images of every kind (gallery.npz) and, where a recipe asks for
figures of the paper, what those are made of (figures.npz). Kept with the records, so that the report needs no model.

figures.npz, each part only if ``Experiment.figures`` names its figure and the run has what it is made of; names are joined by
two underscores, MODEL is a model's name in the run, texts are arrays without dimensions:

    fig2__level_<m>, fig2__band_<m>                         float32 [n,C,w,w]: levels I^m of n test images, low-pass whatever the
                                                            models' targets are, and their Laplacian bands P^m (the last is the
                                                            last level itself)
    fig2__level_spectrum_<m>, fig2__band_spectrum_<m>       float32 [n,C,w,w]: orthonormal DCT-II of each
    fig6__attack                                            text: the attack spec
    fig6__clean, fig6__label                                float32 [n,C,W,W], int [n]
    fig6__adversarial__MODEL, fig6__prediction__MODEL       white-box examples of that attack; what the classifier says of them
    fig6__reconstruction_clean__MODEL,
    fig6__reconstruction_adversarial__MODEL                 float32 [n,C,W,W]: the auto-encoder's level 0, unclipped
    fig8__attack                                            text: the attack spec
    fig8__index__MODEL                                      int64 [N]: every attacked test image
    fig8__d_ra__MODEL, fig8__d_rc__MODEL, fig8__d_ac__MODEL float64 [N]: L2 distances ([0,1] pixel units) between the
                                                            reconstruction of the attacked image and that image, between it and
                                                            the clean image, between attacked and clean image
    fig8__r__MODEL                                          float64 [N]: R = d_rc / d_ra; inf or nan where d_ra is 0
    fig8__from__MODEL                                       text: hash of all that the model's distances follow from

MODEL is any model with an auto-encoder; for fig6 and in gallery.npz only the first replicate of each. The attack of fig6 and
fig8 is the first FGSM of ``evaluation.attacks``, white-box.
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
from pipeline.data.shards import ShardSet
from pipeline.evaluation import figure_data
from pipeline.evaluation.chunks import read_chunks, read_examples
from pipeline.evaluation.figure_data import (
    SPECTRA,
    Arrays,
    Progress,
    _earlier,
    _fgsm,
    fig2_arrays,
    fig6_arrays,
    fig8_arrays,
)
from pipeline.evaluation.plan import Model
from pipeline.runtime.storage import Storage
from pipeline.training import exports

IMAGES = 8


def make(
    test: ShardSet,
    models: Sequence[Model],
    evaluations: Sequence[dict[str, Any]],
    experiment: Experiment,
    run: Storage,
    root: Storage,
    *,
    progress: Progress | None = None,
) -> None:
    """Write gallery.npz (docs/records.md) and, where ``experiment.figures`` asks for it, figures.npz (above).

    Args:
        progress: called with (chunks done, chunks in all, note) while fig8 is computed.

    Raises:
        DataError: a shard, examples or weights are missing or corrupt. StorageError: something could not be written.
    """
    n = min(IMAGES, test.num_rows, experiment.evaluation.chunk_size, experiment.evaluation.test_images or IMAGES)
    rows = test.read_rows(0, n, ["image", "label"])
    clean = torch.from_numpy(rows["image"]).float() / 255
    bases = experiment.base_names()
    first = set(first_replicates([m.name for m in models], bases))
    shown = [m for m in models if m.name in first]
    with_autoencoder = [m for m in models if (root / m.path).exists("autoencoder.safetensors")]
    _write(
        run, "gallery.npz", _gallery(clean, rows["label"], shown, set(with_autoencoder), evaluations, experiment, root)
    )

    arrays: Arrays = {}
    asked = experiment.figures
    if "fig2" in asked:
        arrays |= fig2_arrays(clean[:SPECTRA], level_sizes(experiment.data.image_size, experiment.pyramids.levels))
    fgsm = _fgsm(evaluations, experiment)
    if "fig6" in asked and fgsm:
        subjects = [m for m in shown if m in with_autoencoder and m.name in fgsm]
        arrays |= fig6_arrays(clean, rows["label"], subjects, fgsm, root)
    if "fig8" in asked and fgsm:
        subjects = [m for m in with_autoencoder if m.name in fgsm]
        arrays |= fig8_arrays(test, subjects, fgsm, experiment, root, _earlier(run), progress)
    if arrays:
        _write(run, figure_data.FIGURES_FILE, arrays)


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
    kinds = dict.fromkeys(c.targets for c in experiment.model_configs().values() if c.defense == "defend++")
    targets = next(iter(kinds), "lowpass")  # of several kinds, the first stands for all: they differ little to the eye
    for m, level in enumerate(target_levels(clean, sizes, targets)):
        arrays[f"level_{m}"] = level.numpy()
    for model in shown:
        if model in with_autoencoder:
            with torch.no_grad():
                outputs = exports.load_autoencoder(root.join(model.path), sha256=model.autoencoder)(clean)
            for m, output in enumerate(outputs):
                arrays[f"reconstruction_{m}__{model.name}"] = output.numpy()
    names = {m.name for m in shown}
    for e in evaluations:
        if e["threat_model"] == "white_box" and e["examples"] and e["model"] in names:
            key = f"{e['model']}__{e['attack']}"  # the whole spec: a run may have one attack at several eps
            arrays[f"adversarial__{key}"] = read_examples(root / e["examples"], 0)[: len(clean)]
            arrays[f"prediction__{key}"] = read_chunks(root / e["path"], 1)["adversarial_prediction"][: len(clean)]
    return arrays
