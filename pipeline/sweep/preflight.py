"""Checks of a sweep before anything is trained."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from components.attacks.spec import AttackSpec
from components.config import Experiment, TrainConfig
from components.errors import ConfigError
from components.fields import MAX_NAME_BYTES
from components.search_space import Point, Space, ends
from components.threat_models import WHITE_BOX
from pipeline.sweep.trials.plan import trial_config

DRAWS = 100
"""How many random draws represent a TPE search, whose points are not known in advance."""
MAX_COMBINATIONS = 256
"""With more combinations of discrete values than this, only those of TARGET_FIELDS are checked."""
TARGET_FIELDS = ("defense", "targets", "augment", "epochs")
"""Fields that decide which kind of pyramids a model reads."""


def varied_model(experiment: Experiment, space: Space) -> tuple[str, TrainConfig]:
    """Return name and config of the recipe's model that the trials vary.

    The config is that of its first replicate.

    Raises:
        ConfigError: there is no such model, it cannot be swept, or the attack does not fit.
    """
    AttackSpec.parse(space.attack).check_fits(experiment.data.channels, experiment.data.image_size)
    models = experiment.first_replicates()
    if space.model and space.model not in models:
        raise ConfigError.unknown("model of the recipe in space.model:", space.model, models)
    defended = [n for n, c in models.items() if c.defense == "defend++"] + [
        n for n, c in models.items() if c.defense != "none"
    ]
    name = space.model or (defended or list(models))[0]
    config = models[name]
    if not config.epochs:
        raise ConfigError.of(f"models[{name}].epochs", 0, "at least 1 in a sweep, which trains")
    if experiment.data.validation_fraction == 0:
        raise ConfigError.of(
            "data.validation_fraction", 0.0, "above 0 in a sweep: it chooses on validation images, never on test images"
        )
    return name, config


def preflight_experiment(experiment: Experiment, space: Space, base: TrainConfig, seed: int = 0) -> Experiment:
    """Build an experiment with one model per trial, to check all of them before training.

    TPE's points are unknown, so it is represented by random draws and by every combination of its
    discrete values (of a range, its ends). Trials that differ only in real numbers build the same
    network and share one model.

    Raises:
        ConfigError: a trial or a value is not possible. The message names it and what to do.
    """
    points = space.points(seed) or replace(space, search="random", trials=DRAWS).points(seed)
    for point in points:
        _check_possible(experiment, base, [point], point)
    for name, domain in space.parameters.items():  # TPE may take the end of a range, which is never drawn.
        for value in ends(domain):
            _check_possible(experiment, base, [{**point, name: value} for point in points], {name: value})
    if space.search == "tpe":
        discrete = {name: ends(d) for name, d in space.parameters.items() if not isinstance(ends(d)[0], float)}
        if math.prod(len(values) for values in discrete.values()) > MAX_COMBINATIONS:
            discrete = {name: values for name, values in discrete.items() if name in TARGET_FIELDS}
        for values in itertools.product(*discrete.values()):
            point = {**points[0], **dict(zip(discrete, values, strict=True))}
            # No draw had a combination this rare. A trial that hits it is recorded as failed.
            with contextlib.suppress(ConfigError):
                trial_config(experiment, base, point)
                points.append(point)
    models: dict[TrainConfig, str] = {_network_of(base): "base"}
    for number, point in enumerate(points, 1):
        models.setdefault(_network_of(trial_config(experiment, base, point)), _model_text(number, point))
    evaluation = replace(experiment.evaluation, threat_models=(WHITE_BOX,), transfer_source="")
    return replace(
        experiment, train=base, models=tuple(models.values()), seeds=1, evaluation=evaluation, figures=(), paper=""
    )


def _check_possible(experiment: Experiment, base: TrainConfig, points: Sequence[Point], common: Point) -> None:
    """Refuse the values that the points have in common, if none of the points is possible."""
    for point in points:
        try:
            trial_config(experiment, base, point)
            return
        except ConfigError as e:
            error = e
    values = " ".join(f"{name}={value}" for name, value in common.items())
    raise ConfigError(
        f"a trial of the space with {values} cannot be run: {error}. Take that out of the space, or change the setting"
    )


def _network_of(config: TrainConfig) -> TrainConfig:
    """Return a config that is equal for models which build the same network of the same size.

    They differ in the seed or in real numbers alone.
    """
    reals: dict[str, Any] = {f.name: f.default for f in fields(TrainConfig) if isinstance(f.default, float)}
    reals["momentum"] = 0.5 if config.momentum else 0.0  # Without momentum the optimizer keeps no buffer for it.
    return replace(config.canonical(), **reals, seed=0)


def _model_text(number: int, point: Point) -> str:
    """Return a trial's model as text. Its name tells the user which point does not fit a GPU."""
    name = re.sub("[^a-zA-Z0-9_+.-]", "-", "".join(f"_{name}-{value}" for name, value in point.items()))
    return f"trial-{number}{name}"[:MAX_NAME_BYTES] + ":" + ",".join(f"{name}={value}" for name, value in point.items())
