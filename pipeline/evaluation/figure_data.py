"""Arrays that the paper's figures are drawn from, computed while the models are at hand."""

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
from pipeline.data.shards import ShardSet
from pipeline.evaluation.chunks import read_chunks, read_examples
from pipeline.evaluation.plan import Model
from pipeline.runtime import arrays
from pipeline.runtime.storage import Storage
from pipeline.training import exports

SPECTRA = 3
"""Images of fig2."""
DISTANCES_VERSION = 1
"""Part of ``fig8__from``. Raise it when the same models and examples would give other distances."""
BATCH_PIXELS = 1 << 18
"""Pixels that an auto-encoder sees at once: 334 images of 28x28, 5 of 224x224, some hundred MiB of feature maps."""

Arrays = dict[str, np.ndarray]
Progress = Callable[[int, int, str], None]


def fig2_arrays(clean: Tensor, sizes: Sequence[int]) -> Arrays:
    levels = lowpass_pyramid(clean, sizes)
    arrays: Arrays = {}
    for name, images in (("level", levels), ("band", laplacian_bands(levels))):
        for m, one in enumerate(images):
            arrays[f"fig2__{name}_{m}"] = one.numpy()
            arrays[f"fig2__{name}_spectrum_{m}"] = spectrum(one).numpy()
    return arrays


def _fgsm(evaluations: Sequence[dict[str, Any]], experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Model -> its white-box evaluation under the first FGSM of the config; empty without one."""
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    attack = next((str(spec) for spec in specs if spec.short_name == "fgsm"), None)
    return {
        e["model"]: e
        for e in evaluations
        if attack is not None and e["threat_model"] == "white_box" and e["attack"] == attack
    }


def fig6_arrays(
    clean: Tensor,
    label: np.ndarray,
    subjects: Sequence[Model],
    fgsm: Mapping[str, Mapping[str, Any]],
    root: Storage,
) -> Arrays:
    arrays: Arrays = {}
    for model in subjects:
        e = fgsm[model.name]
        adversarial = read_examples(root / e["examples"], 0)[: len(clean)]
        autoencoder = exports.load_autoencoder(root.join(model.path), sha256=model.autoencoder)
        arrays |= {"fig6__attack": np.array(e["attack"]), "fig6__clean": clean.numpy(), "fig6__label": label}
        arrays[f"fig6__adversarial__{model.name}"] = adversarial
        judged = read_chunks(root / e["path"], 1)
        arrays[f"fig6__prediction__{model.name}"] = judged["adversarial_prediction"][: len(clean)]
        arrays[f"fig6__reconstruction_clean__{model.name}"] = reconstruct(autoencoder, clean).numpy()
        attacked = torch.from_numpy(np.array(adversarial))
        arrays[f"fig6__reconstruction_adversarial__{model.name}"] = reconstruct(autoencoder, attacked).numpy()
    return arrays


def _earlier(run: Storage) -> Arrays:
    """figures.npz as an earlier run left it; a damaged one is as good as none, since it is written anew."""
    try:
        return arrays.read_arrays(run, FIGURES_FILE)
    except DataError:
        return {}


def fig8_arrays(
    test: ShardSet,
    subjects: Sequence[Model],
    fgsm: Mapping[str, Mapping[str, Any]],
    experiment: Experiment,
    root: Storage,
    earlier: Mapping[str, np.ndarray],
    progress: Progress | None,
) -> Arrays:
    arrays: Arrays = {}
    device = "cuda" if experiment.scaling.gpus_per_attack and torch.cuda.is_available() else "cpu"
    for model in subjects:
        e = fgsm[model.name]
        said = np.array(content_hash(DISTANCES_VERSION, model.identity, e["examples"], test.address, e["n"]))
        if np.array_equal(earlier.get(f"fig8__from__{model.name}", ""), said):
            names = [f"fig8__{k}__{model.name}" for k in ("index", "d_ra", "d_rc", "d_ac", "r", "from")]
            found = {name: earlier[name] for name in names}
        else:
            autoencoder = exports.load_autoencoder(root.join(model.path), device, sha256=model.autoencoder)
            examples, chunk_size = root / e["examples"], experiment.evaluation.chunk_size
            tell = None if progress is None else functools.partial(_tell, progress, model.name)
            columns = distances(autoencoder, test, examples, e["n"], chunk_size, progress=tell)
            found = {f"fig8__{k}__{model.name}": v for k, v in columns.items()}
            found[f"fig8__from__{model.name}"] = said
        arrays |= {"fig8__attack": np.array(e["attack"]), **found}
    return arrays


def _tell(progress: Progress, model: str, done: int, total: int) -> None:
    progress(done, total, f"chunks reconstructed by {model} (fig8)")


def reconstruct(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """float32 [N,C,W,W] on the CPU: the auto-encoder's level 0 of images in [0,1], batch by batch, in true float32."""
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
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Arrays:
    """Columns of fig8 (above) over the first ``n`` test images; one chunk of images in memory at a time.

    Args:
        autoencoder: images [N,C,W,W] to levels, level 0 first.
        examples: the directory of a set of adversarial examples; its chunks are of ``chunk_size`` images.
        progress: called with (chunks done, chunks in all).

    Raises:
        DataError: a chunk is missing, corrupt, or not of as many images as it should be.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("index", "d_ra", "d_rc", "d_ac")}
    for i, start in enumerate(range(0, n, chunk_size)):
        rows = test.read_rows(start, min(start + chunk_size, n), ["index", "image"])
        # divided as attacks divide it: at a rounding's difference two equal images would not be equal
        clean = torch.from_numpy(rows["image"]).float().div_(255)
        attacked = torch.from_numpy(np.array(read_examples(examples, i)))
        if attacked.shape != clean.shape:
            raise DataError(
                f"{examples.uri}, chunk {i}, holds {len(attacked)} images where {len(clean)} belong; delete {examples.uri} "
                "and run the same command again"
            )
        reconstruction = reconstruct(autoencoder, attacked)
        parts["index"].append(rows["index"])
        parts["d_ra"].append(_distance(reconstruction, attacked))
        parts["d_rc"].append(_distance(reconstruction, clean))
        parts["d_ac"].append(_distance(attacked, clean))
        if progress is not None:
            progress(i + 1, math.ceil(n / chunk_size))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["r"] = columns["d_rc"] / columns["d_ra"]
    return columns


def _distance(a: Tensor, b: Tensor) -> np.ndarray:
    norms: np.ndarray = (a.double() - b.double()).flatten(1).norm(dim=1).numpy()
    return norms


FIGURES_FILE = "figures.npz"
