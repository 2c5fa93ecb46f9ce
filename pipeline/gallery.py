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

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks.spec import AttackSpec
from components.config import Experiment, level_sizes
from components.dct import laplacian_bands, lowpass_pyramid, spectrum, target_levels
from components.errors import DataError
from components.fields import content_hash
from components.precision import true_float32
from pipeline import figures, records
from pipeline.attack import Model, read_chunks, read_examples
from pipeline.data.shards import ShardSet
from pipeline.plots import first_replicates
from pipeline.runtime.storage import Storage
from pipeline.training import exports

IMAGES = 8
SPECTRA = 3
"""Images of fig2."""
DISTANCES_VERSION = 1
"""Part of ``fig8__from``. Raise it when the same models and examples would give other distances."""
BATCH_PIXELS = 1 << 18
"""Pixels that an auto-encoder sees at once: 334 images of 28x28, 5 of 224x224, some hundred MiB of feature maps."""

Arrays = dict[str, np.ndarray]
Progress = Callable[[int, int, str], None]


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
    bases = experiment.bases()
    first = set(first_replicates([m.name for m in models], bases))
    shown = [m for m in models if m.name in first]
    with_autoencoder = [m for m in models if (root / m.path).exists("autoencoder.safetensors")]
    _write(
        run, "gallery.npz", _gallery(clean, rows["label"], shown, set(with_autoencoder), evaluations, experiment, root)
    )

    arrays: Arrays = {}
    asked = experiment.figures
    if "fig2" in asked:
        arrays |= _fig2(clean[:SPECTRA], level_sizes(experiment.data.image_size, experiment.pyramids.levels))
    fgsm = _fgsm(evaluations, experiment)
    if "fig6" in asked and fgsm:
        subjects = [m for m in shown if m in with_autoencoder and m.name in fgsm]
        arrays |= _fig6(clean, rows["label"], subjects, fgsm, root)
    if "fig8" in asked and fgsm:
        subjects = [m for m in with_autoencoder if m.name in fgsm]
        arrays |= _fig8(test, subjects, fgsm, experiment, root, _earlier(run), progress)
    if arrays:
        _write(run, figures.FILE, arrays)


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
    kinds = dict.fromkeys(c.targets for c in experiment.variants().values() if c.defense == "defend++")
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


def _fig2(clean: Tensor, sizes: Sequence[int]) -> Arrays:
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


def _fig6(
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
        return records.read_arrays(run, figures.FILE)
    except DataError:
        return {}


def _fig8(
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
