"""Runs of recipes from Python: the stages of the command line, with their results as objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from components.config import Experiment
from components.errors import ConfigError
from components.fields import from_dict, hints_of, to_dict
from pipeline import run as pipeline_run
from pipeline.api.run_result import RunResult, TrainResult
from pipeline.recipes.registry import RECIPES
from pipeline.runtime.storage import Storage, split_uri
from pipeline.training import exports


def train(recipe: str | Experiment, **overrides: Any) -> TrainResult:
    """Train the models of a recipe with Ray, on the cluster of $RAY_ADDRESS or a local one.

    What is already computed on the storage is taken from there, as by the command line.

    Args:
        recipe: a name of :func:`recipes`, or an experiment.
        overrides: fields to replace. Two underscores stand for the dot of the command line:
            ``train__epochs=1`` is ``--train.epochs 1``.

    Raises:
        UserError: of the kind that fits; the message names what, where and what to do.
    """
    experiment = experiment_of(recipe, overrides)
    pipeline_run.execute("pyramids", experiment)
    directory = pipeline_run.execute("train", experiment)
    return TrainResult(directory, Storage(experiment.storage), archs_of(experiment))


def run(recipe: str | Experiment, **overrides: Any) -> RunResult:
    """Run all stages of a recipe: images, training, attacks and report.

    Args, Raises: as :func:`train`.
    """
    experiment = experiment_of(recipe, overrides)
    directory = pipeline_run.execute("run", experiment)
    return RunResult(directory, Storage(experiment.storage), archs_of(experiment))


def load_run(directory: str | os.PathLike[str], *, trusted: exports.Trusted = ()) -> RunResult:
    """Read a run, finished or not.

    Args:
        directory: path or URI of ``runs/<recipe>-<hash>`` on a storage.
        trusted: MODULE:FUNCTION of networks of your own, which loading ``models`` may import.

    Raises:
        DataError: there is no run.
        StorageError: its record cannot be read.
    """
    run_directory, root = below(directory)
    return RunResult(run_directory, root, trusted)


def recipes() -> dict[str, str]:
    """Return each recipe's name and what it shows."""
    return {name: recipe.make().description for name, recipe in RECIPES.items()}


def below(directory: str | os.PathLike[str]) -> tuple[Storage, Storage]:
    """Return the directory of a run or sweep, and the storage two levels above it."""
    runs, name = split_uri(os.fspath(directory).rstrip("/"))
    return runs / name, runs.parent


def experiment_of(recipe: str | Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a recipe with some fields replaced.

    Args:
        overrides: field -> value; in a field's name, ``__`` and ``.`` lead into a group of fields.

    Raises:
        ConfigError: the recipe or a field is unknown, or a value is impossible.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ConfigError.unknown("recipe", recipe, RECIPES, "defendpp.recipes()")
        experiment = RECIPES[recipe].make()
    elif isinstance(recipe, Experiment):
        experiment = recipe
    else:
        raise ConfigError.of("recipe", recipe, "the name of a recipe, or an Experiment")
    values = to_dict(experiment)
    for name, value in overrides.items():
        *groups, field = name.replace("__", ".").split(".")
        config, kind = values, Experiment
        for group in groups:
            kind = _field_type(kind, group)
            if not is_dataclass(kind):
                raise ConfigError.of("the override", name, f"a field: {group} is no group of fields")
            config = config[group]
        _field_type(kind, field)
        config[field] = _plain(value)
    return from_dict(Experiment, values)


def _field_type(config: Any, name: str) -> Any:
    hints = hints_of(config)
    if name not in hints:
        raise ConfigError.unknown(f"field of {config.__name__}:", name, hints)
    return hints[name]


def _plain(value: Any) -> Any:
    """Return a value as JSON would hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def archs_of(experiment: Experiment) -> list[str]:
    """Return the networks of an experiment, which its caller trusts by running it."""
    return sorted({config.arch for config in experiment.model_configs().values()})
