"""Arrays of the paper's figures, kept in figures.npz so that the report needs no model.

A figure's arrays are there if ``Experiment.figures`` names it and the run has what it shows. Two
underscores join the parts of a name. MODEL is the name of a model with an auto-encoder; fig6 has
only the first replicate of each. A text is an array without dimensions:

    fig2__level_<m>                  float32 [n,C,w,w]: levels I^m of n test images, low-pass
                                     whatever the models' targets are
    fig2__band_<m>                   float32 [n,C,w,w]: their Laplacian bands P^m; the last band is
                                     the last level
    fig2__level_spectrum_<m>,
    fig2__band_spectrum_<m>          float32 [n,C,w,w]: orthonormal DCT-II of each
    fig6__attack                     text: attack spec
    fig6__clean, fig6__label         float32 [n,C,W,W], int [n]
    fig6__adversarial__MODEL         float32 [n,C,W,W]: white-box examples
    fig6__prediction__MODEL          int [n]: class that the classifier predicts for them
    fig6__reconstruction_clean__MODEL,
    fig6__reconstruction_adversarial__MODEL
                                     float32 [n,C,W,W]: level 0 of the auto-encoder, unclipped
    fig8__attack                     text: attack spec
    fig8__index__MODEL               int64 [N]: every attacked test image
    fig8__d_ra__MODEL                float64 [N]: L2 distance, in [0,1] pixel units, between the
                                     reconstruction of the attacked image and the attacked image
    fig8__d_rc__MODEL                float64 [N]: between that reconstruction and the clean image
    fig8__d_ac__MODEL                float64 [N]: between the attacked and the clean image
    fig8__r__MODEL                   float64 [N]: R = d_rc / d_ra; inf or nan if d_ra is 0
    fig8__from__MODEL                text: hash of everything that the distances follow from

The attack of fig6 and fig8 is the first FGSM of ``evaluation.attacks``, white-box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.dct import laplacian_bands, lowpass_pyramid, spectrum
from components.errors import DataError
from components.fields import content_hash
from components.precision import true_float32
from components.threat_models import WHITE_BOX
from pipeline.data.shards import ShardSet
from pipeline.evaluation.attack_progress import Progress
from pipeline.evaluation.chunks import read_chunks, read_examples
from pipeline.evaluation.plan import Model
from pipeline.runtime.storage import Storage, read_arrays
from pipeline.training import exports

FIGURES_FILE = "figures.npz"
SPECTRA = 3
"""Images of fig2."""
DISTANCES_VERSION = 1
"""Part of ``fig8__from``. Raise it when the same models and examples would give other distances."""
BATCH_PIXELS = 1 << 18
"""Pixels per batch of an auto-encoder: 334 images of 28x28 or 5 of 224x224, some 100 MiB."""

Arrays = dict[str, np.ndarray]


def fig2_arrays(clean: Tensor, sizes: Sequence[int]) -> Arrays:
    """Return the low-pass levels of images, their Laplacian bands, and the spectra of both."""
    levels = lowpass_pyramid(clean, sizes)
    figure: Arrays = {}
    for name, pyramid in (("level", levels), ("band", laplacian_bands(levels))):
        for m, images in enumerate(pyramid):
            figure[f"fig2__{name}_{m}"] = images.numpy()
            figure[f"fig2__{name}_spectrum_{m}"] = spectrum(images).numpy()
    return figure


def fgsm_evaluations(evaluations: Sequence[dict[str, Any]], experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return model -> its white-box evaluation under the config's first FGSM; empty without one."""
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    attack = next((str(spec) for spec in specs if spec.short_name == "fgsm"), None)
    return {
        e["model"]: e
        for e in evaluations
        if attack is not None and e["threat_model"] == WHITE_BOX and e["attack"] == attack
    }


def fig6_arrays(
    clean: Tensor,
    label: np.ndarray,
    models: Sequence[Model],
    fgsm: Mapping[str, Mapping[str, Any]],
    root: Storage,
) -> Arrays:
    """Return clean and attacked images and their reconstructions by each model."""
    figure: Arrays = {}
    for model in models:
        e = fgsm[model.name]
        adversarial = read_examples(root / e["examples"], 0)[: len(clean)]
        autoencoder = exports.load_autoencoder(root.join(model.path), sha256=model.autoencoder)
        figure |= {"fig6__attack": np.array(e["attack"]), "fig6__clean": clean.numpy(), "fig6__label": label}
        figure[f"fig6__adversarial__{model.name}"] = adversarial
        judged = read_chunks(root / e["path"], 1)
        figure[f"fig6__prediction__{model.name}"] = judged["adversarial_prediction"][: len(clean)]
        figure[f"fig6__reconstruction_clean__{model.name}"] = reconstruct(autoencoder, clean).numpy()
        attacked = torch.from_numpy(np.array(adversarial))
        figure[f"fig6__reconstruction_adversarial__{model.name}"] = reconstruct(autoencoder, attacked).numpy()
    return figure


def read_earlier_figures(run: Storage) -> Arrays:
    """Read figures.npz of an earlier run. A damaged file counts as none: it is written anew."""
    try:
        return read_arrays(run, FIGURES_FILE)
    except DataError:
        return {}


def fig8_arrays(
    test: ShardSet,
    models: Sequence[Model],
    fgsm: Mapping[str, Mapping[str, Any]],
    experiment: Experiment,
    root: Storage,
    earlier: Mapping[str, np.ndarray],
    progress: Progress,
) -> Arrays:
    """Return the distances of each model's reconstructions, unchanged ones from ``earlier``."""
    figure: Arrays = {}
    device = "cuda" if experiment.scaling.gpus_per_attack and torch.cuda.is_available() else "cpu"
    for model in models:
        e = fgsm[model.name]
        origin = np.array(content_hash(DISTANCES_VERSION, model.identity, e["examples"], test.address, e["n"]))
        if np.array_equal(earlier.get(f"fig8__from__{model.name}", ""), origin):
            names = [f"fig8__{k}__{model.name}" for k in ("index", "d_ra", "d_rc", "d_ac", "r", "from")]
            figure |= {name: earlier[name] for name in names}
        else:
            autoencoder = exports.load_autoencoder(root.join(model.path), device, sha256=model.autoencoder)
            examples, chunk_size = root / e["examples"], experiment.evaluation.chunk_size
            report = functools.partial(_report_chunks, progress, model.name)
            columns = distances(autoencoder, test, examples, e["n"], chunk_size, report)
            figure |= {f"fig8__{k}__{model.name}": v for k, v in columns.items()}
            figure[f"fig8__from__{model.name}"] = origin
        figure["fig8__attack"] = np.array(e["attack"])
    return figure


def _report_chunks(progress: Progress, model: str, done: int, total: int) -> None:
    progress(done, total, f"chunks reconstructed by {model} (fig8)")


def reconstruct(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Reconstruct images batch by batch, in true float32.

    Images in [0,1] and result are float32 [N,C,W,W]. The result is level 0, on the CPU.
    """
    parameter = next(autoencoder.parameters(), None)
    size = max(1, BATCH_PIXELS // (images.shape[-1] * images.shape[-2]))
    parts = []
    with torch.no_grad(), true_float32():
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            parts.append(autoencoder(batch if parameter is None else batch.to(parameter.device))[0].float().cpu())
    return torch.cat(parts)


def distances(
    autoencoder: nn.Module,
    test: ShardSet,
    examples: Storage,
    n: int,
    chunk_size: int,
    progress: Callable[[int, int], None],
) -> Arrays:
    """Compute the columns of fig8 over the first ``n`` test images, chunk by chunk.

    Args:
        autoencoder: images [N,C,W,W] to levels, level 0 first.
        examples: directory of a set of adversarial examples, in chunks of ``chunk_size`` images.
        progress: called with (chunks done, chunks in all).

    Raises:
        DataError: a chunk is missing, corrupt, or has another number of images than it should.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("index", "d_ra", "d_rc", "d_ac")}
    for i, start in enumerate(range(0, n, chunk_size)):
        rows = test.read_rows(start, min(start + chunk_size, n), ["index", "image"])
        # Attacks divide the same way. Otherwise rounding would make two equal images differ.
        clean = torch.from_numpy(rows["image"]).float().div_(255)
        attacked = torch.from_numpy(np.array(read_examples(examples, i)))
        if attacked.shape != clean.shape:
            raise DataError(
                f"{examples.uri}, chunk {i}, holds {len(attacked)} images where {len(clean)} belong; "
                f"delete {examples.uri} and run the same command again"
            )
        reconstruction = reconstruct(autoencoder, attacked)
        parts["index"].append(rows["index"])
        parts["d_ra"].append(_distance(reconstruction, attacked))
        parts["d_rc"].append(_distance(reconstruction, clean))
        parts["d_ac"].append(_distance(attacked, clean))
        progress(i + 1, math.ceil(n / chunk_size))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["r"] = columns["d_rc"] / columns["d_ra"]
    return columns


def _distance(a: Tensor, b: Tensor) -> np.ndarray:
    norms: np.ndarray = (a.double() - b.double()).flatten(1).norm(dim=1).numpy()
    return norms
