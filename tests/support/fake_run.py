"""A small but complete run directory (docs/records.md) with made-up numbers, to test readers of records.

`python tests/support/fake_run.py DIR` writes it and its report to look at.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.attacks.spec import AttackSpec
from components.config import Experiment, Shapes, TrainConfig
from components.evaluation.metrics import summarize
from components.fields import to_dict
from components.network import build_net
from pipeline.runtime.storage import Storage
from pipeline.training import exports

MODELS = ("no_defense", "control", "defend")
ATTACKS = ("noise:eps=0.2", "fgsm:eps=0.2", "bim:eps=0.2,steps=40", "ddn:steps=60")
STEPS_PER_EPOCH, EPOCHS, N, CHUNK = 12, 4, 300, 100
BEGIN = 1_780_000_000.0
"""Start of the run, 2026-05-28T20:26:40Z."""

# Accuracy by model, threat model and attack. The numbers come from the prototype's table in the project's notes.
RIGHT = {
    ("no_defense", "random", "noise"): 0.94,
    ("control", "random", "noise"): 0.95,
    ("defend", "random", "noise"): 0.97,
    ("no_defense", "white_box", "fgsm"): 0.273,
    ("control", "white_box", "fgsm"): 0.467,
    ("defend", "white_box", "fgsm"): 0.477,
    ("no_defense", "white_box", "bim"): 0.0,
    ("control", "white_box", "bim"): 0.0,
    ("defend", "white_box", "bim"): 0.003,
    ("control", "transfer", "fgsm"): 0.763,
    ("defend", "transfer", "fgsm"): 0.89,
    ("control", "transfer", "bim"): 0.697,
    ("defend", "transfer", "bim"): 0.893,
    ("no_defense", "white_box", "ddn"): 0.0,
    ("control", "white_box", "ddn"): 0.0,
    ("defend", "white_box", "ddn"): 0.0,
    ("control", "transfer", "ddn"): 0.98,
    ("defend", "transfer", "ddn"): 0.987,
}


def experiment() -> Experiment:
    return Experiment(
        name="fake-mnist",
        description="Defend++ against undefended networks on MNIST; made-up numbers for tests.",
        models=("no_defense:defense=none,seed=0", "control:defense=none,seed=1", "defend:defense=defend++,seed=1"),
    )


def write(root: Storage, *, evaluations: bool = True, gallery: bool = True, finished: bool = True) -> Storage:
    """Write the run below ``root`` and return its directory. The same arguments give the same bytes."""
    rng = np.random.default_rng(0)
    config = experiment()
    run = root / "runs/fake-mnist-0123456789abcdef"
    record: dict[str, Any] = {
        "schema": 1,
        "name": config.name,
        "experiment": to_dict(config),
        "created": "2026-05-28T20:26:40+00:00",
        "finished": "2026-05-28T20:41:02+00:00" if finished else None,
        "command": "python pipeline/main.py fake-mnist --storage /data/defendpp",
        "git": {"revision": "e44c8eb0c2a44d3f8f0c4f8e5b1a0d2c3e4f5a6b", "dirty": False},
        "source": "5ac5be3c7d0f9a12",
        "versions": {"python": "3.11.9", "torch": "2.14.1", "ray": "2.60.0", "mlflow": "3.17.2"},
        "hardware": {"host": "box", "cpu": "Example CPU @ 2.60GHz", "cpus": 2, "memory_gib": 16.0, "gpus": []},
        "data": {
            "source": "sample:mnist",
            "hash": "00112233445566778899aabbccddeeff",
            "rows": {"train": 9000, "validation": 1000, "test": N},
            "splits": {s: f"pyramids/{s}0123456789abcd" for s in ("train", "validation", "test")},
            "levels": [28, 14, 7],
        },
        "models": {name: _model(root, rng, config, name, i) for i, name in enumerate(MODELS)},
        "evaluations": [],
        "stages": {"pyramids": 4.2, "train": 412.5, "attack": 431.0, "report": 6.8},
    }
    if evaluations:
        labels = rng.integers(0, 10, N).astype(np.int32)
        record["evaluations"] = [_evaluation(root, rng, labels, m, t, a) for m, t, a in _plan()]
    if gallery:
        run.write_bytes("gallery.npz", _gallery(rng))
    run.write_json("run.json", record)
    return run


def write_with_figures(root: Storage, **parts: bool) -> Storage:
    """Write the run as :func:`write`, with every figure of the paper requested."""
    run = write(root, **parts)
    record = run.read_json("run.json")
    record["experiment"]["figures"] = ["fig2", "fig5", "fig6", "fig7", "fig8"]
    run.write_json("run.json", record)
    return run


def _plan() -> list[tuple[str, str, str]]:
    out = []
    for model in MODELS:
        out.append((model, "clean", "none"))
        out.append((model, "random", str(AttackSpec.parse(ATTACKS[0]))))
        for threat in ("white_box", "transfer"):
            if not (threat == "transfer" and model == "no_defense"):
                out += [(model, threat, str(AttackSpec.parse(attack))) for attack in ATTACKS[1:]]
    return out


def _model(root: Storage, rng: np.random.Generator, config: Experiment, name: str, order: int) -> dict[str, Any]:
    home = root / f"models/{name}-fedcba9876543210"
    train = to_dict(config.model_configs()[name])
    defended = train["defense"] != "none"
    begin = BEGIN + 10 + order * 140
    for epoch in range(EPOCHS):
        phase = (
            ("joint" if epoch == EPOCHS - 1 else ("autoencoder", "classifier")[epoch % 2]) if defended else "classifier"
        )
        steps = []
        for i in range(STEPS_PER_EPOCH):
            step = epoch * STEPS_PER_EPOCH + i
            decay = float(np.exp(-step / 15) * rng.uniform(0.85, 1.15))
            losses: dict[str, Any] = {"loss_cls": 0.06 + 2.2 * decay}
            if defended:
                losses |= {
                    "loss_rec": 0.01 + 0.1 * decay,
                    "rec_0": 0.008 + 0.09 * decay,
                    "rec_1": 0.2 * decay,
                    "rec_2": 0.1 * decay,
                }
            losses["loss"] = losses["loss_cls"] + losses.get("loss_rec", 0.0)
            at = begin + step * 2.5
            steps.append({"step": step, "time": at, "lr": 0.1 * (1 - step / 48), "images_per_second": 120.5, **losses})
        validation = {"accuracy": 0.98 - 0.5 * 0.3 ** (epoch + 1) - 0.001 * order}
        if defended:
            validation["reconstruction"] = 0.02 * 0.5**epoch
        epoch_record = {"epoch": epoch, "phase": phase, "seconds": 30.0, "images_per_second": 120.5}
        home.write_json(f"history/epoch-{epoch:05d}.json", {**epoch_record, "steps": steps, "validation": validation})
    rng.normal(size=(4, 1, 3, 3))  # The golden records follow from the draws after this one.
    weights = _exported_classifier(order)
    home.write_bytes("classifier.safetensors", weights)
    if defended:
        home.write_bytes("autoencoder.safetensors", weights)
    parameters = {"classifier": 700_778, **({"autoencoder": 812_345} if defended else {})}
    measured = {"validation": validation, "seconds": 30.0 * EPOCHS, "images_per_second": 120.5}
    files = {name: hashlib.sha256(home.read_bytes(name)).hexdigest() for name in home.list("") if "safetensors" in name}
    home.write_json("model.json", {"schema": 1, "train": train, "parameters": parameters, "files": files, **measured})
    return {
        "path": home.uri.removeprefix(root.uri + "/"),
        "train": train,
        "parameters": parameters,
        "clean_validation": validation["accuracy"],
        "reconstruction_validation": validation.get("reconstruction"),
        "seconds": 30.0 * EPOCHS,
        "images_per_second": 120.5,
        "autoencoder": defended,
    }


@functools.cache
def _exported_classifier(seed: int) -> bytes:
    """Return the file of a small network, so that what loads a model can load it."""
    config = TrainConfig(defense="none", width=2)
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(seed)
        exports.export(Storage(directory), build_net(config, shapes), config, shapes)
        return Storage(directory).read_bytes("classifier.safetensors")


def _evaluation(
    root: Storage, rng: np.random.Generator, labels: np.ndarray, model: str, threat: str, attack: str
) -> dict[str, Any]:
    short = attack.partition(":")[0]
    clean_right = rng.random(N) < 0.983
    right = clean_right if threat == "clean" else clean_right & (rng.random(N) < RIGHT[model, threat, short] / 0.983)
    other = ((labels + rng.integers(1, 10, N)) % 10).astype(np.int32)
    fixed_size = 0.0 if threat == "clean" else 0.2
    l2 = rng.gamma(9.0, 0.135, N) if short == "ddn" else np.full(N, fixed_size * 24)
    columns = {
        "index": np.arange(N),
        "label": labels,
        "clean_prediction": np.where(clean_right, labels, other),
        "adversarial_prediction": np.where(right, labels, other),
        "rounded_prediction": np.where(right, labels, other),
        "l2": l2,
        "linf": l2 / 5 if short == "ddn" else np.full(N, fixed_size),
    }
    path = f"judged/{model}-{threat}-{short}"
    for i, start in enumerate(range(0, N, CHUNK)):
        out = io.BytesIO()
        pq.write_table(pa.table({k: v[start : start + CHUNK] for k, v in columns.items()}), out)
        (root / path).write_bytes(f"chunk-{i:05d}.parquet", out.getvalue())
    seconds = {"none": 0.0, "noise": 0.4, "fgsm": 2.1, "bim": 61.5, "ddn": 95.0}[short]
    spec = None if attack == "none" else AttackSpec.parse(attack)
    return {
        "model": model,
        "source": {"white_box": model, "transfer": "no_defense"}.get(threat),
        "threat_model": threat,
        "attack": attack,
        "path": path,
        "examples": None if attack == "none" else f"examples/{model}-{threat}-{short}",
        "n": N,
        "metrics": summarize(columns, spec, seconds, budgets={"l2": (1.5,), "linf": (0.3,)}),
    }


def _gallery(rng: np.random.Generator) -> bytes:
    n = 8
    y, x = np.mgrid[0:28, 0:28]
    clean = np.stack([np.exp(-(((x - 10 - i) / 5) ** 2) - ((y - 14) / (4 + i)) ** 2) for i in range(n)])[:, None]
    clean = clean.astype(np.float32)
    label = np.arange(n)
    arrays: dict[str, np.ndarray] = {"clean": clean, "label": label}
    for level, size in ((1, 14), (2, 7)):
        arrays[f"level_{level}"] = clean.reshape(n, 1, size, 28 // size, size, 28 // size).mean((3, 5))
    for level, target in enumerate((clean, arrays["level_1"], arrays["level_2"])):
        arrays[f"reconstruction_{level}__defend"] = target + rng.normal(0, 0.05, target.shape).astype(np.float32)
    for model in MODELS:
        for attack in ATTACKS[1:]:
            key = f"{model}__{AttackSpec.parse(attack)}"
            noise = 0.2 * np.sign(rng.normal(size=clean.shape))
            arrays[f"adversarial__{key}"] = np.clip(clean + noise, 0, 1).astype(np.float32)
            arrays[f"prediction__{key}"] = np.where(rng.random(n) < 0.3, label, (label + 3) % 10)
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


if __name__ == "__main__":
    from pipeline.reporting import report

    storage = Storage(str(Path(sys.argv[1]).resolve()))
    run = write_with_figures(storage)
    print(f"{run.uri}/{report.build(run, storage)['html']}")
