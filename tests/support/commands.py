"""The command line, as a user starts it, on a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from repository import ROOT

from pipeline.main import main

MAIN = [sys.executable, str(ROOT / "pipeline" / "main.py")]
SMALL = [
    "mnist-smoke",
    *("--data.train-limit", "400", "--data.test-limit", "20"),
    *("--scaling.workers", "1", "--scaling.cpus-per-worker", "0.5", "--scaling.cpus-per-attack", "2"),
    *("--scaling.parallel-models", "1"),  # Each Ray Train run starts five processes.
]


def command(name: str, storage: Path, *more: str) -> list[str]:
    return [*MAIN, name, *SMALL, "--storage", str(storage), *more]


def run_here(arguments: list[str]) -> None:
    """Run a command in this process, on the session's cluster, which saves a start of Python."""
    assert main(arguments[len(MAIN) :]) == 0


def record_of(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("runs/*/run.json")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def images_trained(storage: Path, model: dict[str, Any]) -> int:
    """Return how many images a model of run.json was trained on, over all of its steps."""
    epochs = [json.loads(file.read_text()) for file in (storage / model["path"] / "history").iterdir()]
    steps = sum(len(epoch["steps"]) for epoch in epochs)
    return steps * int(model["train"]["batch_size"])


def files_below(directory: Path, pattern: str) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.glob(pattern))}
