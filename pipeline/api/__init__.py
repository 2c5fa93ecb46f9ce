"""The Python API: evaluation of networks in memory, and the stages of a run (docs/python.md)."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from pipeline.runtime import quiet

if TYPE_CHECKING:
    from components.config import Experiment
    from components.errors import UserError
    from pipeline.api.data import load_images
    from pipeline.api.evaluation import evaluate
    from pipeline.api.result import EvaluationResult, Result
    from pipeline.api.run_result import RunResult, TrainResult
    from pipeline.api.runs import load_run, recipes, run, train
    from pipeline.api.sweeps import SweepResult, load_sweep, sweep
    from pipeline.training.exports import load_autoencoder, load_classifier

_MODULES = {
    "Experiment": "components.config",
    "UserError": "components.errors",
    "evaluate": "pipeline.api.evaluation",
    "load_images": "pipeline.api.data",
    **dict.fromkeys(("EvaluationResult", "Result"), "pipeline.api.result"),
    **dict.fromkeys(("RunResult", "TrainResult"), "pipeline.api.run_result"),
    **dict.fromkeys(("load_run", "recipes", "run", "train"), "pipeline.api.runs"),
    **dict.fromkeys(("SweepResult", "load_sweep", "sweep"), "pipeline.api.sweeps"),
    **dict.fromkeys(("load_autoencoder", "load_classifier"), "pipeline.training.exports"),
}
"""Module of each name. Torch, Ray and MLflow take seconds to import, so each is loaded when needed."""

__all__ = [
    "EvaluationResult",
    "Experiment",
    "Result",
    "RunResult",
    "SweepResult",
    "TrainResult",
    "UserError",
    "evaluate",
    "load_autoencoder",
    "load_classifier",
    "load_images",
    "load_run",
    "load_sweep",
    "recipes",
    "run",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet.log_levels({"ray.widgets": logging.WARNING}), warnings.catch_warnings():
        # Imported in a notebook without ipywidgets, Ray and tqdm ask for it.
        warnings.filterwarnings("ignore", "IProgress not found")
        return getattr(importlib.import_module(_MODULES[name]), name)
