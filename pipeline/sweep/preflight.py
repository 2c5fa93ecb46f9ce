"""Checks of a sweep before anything is trained."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace

from components.attacks.spec import AttackSpec
from components.config import Experiment, TrainConfig
from components.errors import ConfigError
from components.fields import MAX_NAME_BYTES
from components.search_space import Point, Space, ends
from pipeline.sweep.trials.plan import trial_config


def varied_model(experiment: Experiment, space: Space) -> tuple[str, TrainConfig]:
    """Name and config (of its first replicate) of the recipe's model that the trials are variants of.

    Raises:
        ConfigError: the recipe has no such model, it cannot be swept, or the space's attack does not fit the images.
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


DRAWS = 100
"""Of a search whose points are not known beforehand, so many stand for them."""
MAX_COMBINATIONS = 256
NAMES_TARGETS = ("defense", "targets", "augment", "epochs")
"""Fields by which a model needs one kind of pyramids or another."""


def preflight_experiment(experiment: Experiment, space: Space, base: TrainConfig, seed: int = 0) -> Experiment:
    """An experiment with a model for each trial (of TPE, whose points are not known: draws, and every combination of the ends of what
    is no real number), to check before anything is trained. Of trials that differ in real numbers alone there is one.

    Args:
        seed: of the search.

    Raises:
        ConfigError: a trial, or a value, that is not possible: names the parameters' values and what to do.
    """
    points = space.points(seed) or replace(space, search="random", trials=DRAWS).points(seed)
    for point in points:
        try:
            trial_config(experiment, base, point)
        except ConfigError as e:
            raise _refused(point, e) from None
    for name, domain in space.parameters.items():  # an end of a range is never drawn, but TPE may take it
        for value in ends(domain):
            _some_possible(experiment, base, [{**point, name: value} for point in points], {name: value})
    if space.search == "tpe":
        discrete = {name: ends(d) for name, d in space.parameters.items() if not isinstance(ends(d)[0], float)}
        if math.prod(len(values) for values in discrete.values()) > MAX_COMBINATIONS:
            discrete = {name: values for name, values in discrete.items() if name in NAMES_TARGETS}
        for values in itertools.product(*discrete.values()):
            point = {**points[0], **dict(zip(discrete, values, strict=True))}
            with contextlib.suppress(ConfigError):  # were it frequent, a draw had shown it; it is recorded as failed
                trial_config(experiment, base, point)
                points.append(point)
    models: dict[TrainConfig, str] = {_but_for_reals(base): "base"}
    for number, point in enumerate(points, 1):
        models.setdefault(_but_for_reals(trial_config(experiment, base, point)), _as_model(number, point))
    evaluation = replace(experiment.evaluation, threat_models=("white_box",), transfer_source="")
    return replace(
        experiment, train=base, models=tuple(models.values()), seeds=1, evaluation=evaluation, figures=(), paper=""
    )


def _some_possible(experiment: Experiment, base: TrainConfig, points: Sequence[Point], value: Point) -> None:
    for point in points:
        try:
            trial_config(experiment, base, point)
            return
        except ConfigError as e:
            error = e
    raise _refused(value, error)


def _refused(point: Point, error: ConfigError) -> ConfigError:
    said = " ".join(f"{name}={value}" for name, value in point.items())
    return ConfigError(
        f"a trial of the space with {said} cannot be run: {error}. Take that out of the space, or change the setting"
    )


def _but_for_reals(config: TrainConfig) -> TrainConfig:
    """Equal for models that differ in the seed or in real numbers alone, which build the same network of the same size."""
    reals = {f.name: f.default for f in fields(TrainConfig) if isinstance(f.default, float)}
    momentum = float(config.momentum > 0)  # without, there is no buffer for it
    return replace(config.canonical(), **{**reals, "momentum": momentum / 2, "seed": 0})


def _as_model(number: int, point: Point) -> str:
    """A model's text, whose name says what a person must know where it does not fit a GPU."""
    said = re.sub("[^a-zA-Z0-9_+.-]", "-", "".join(f"_{name}-{value}" for name, value in point.items()))
    return f"trial-{number}{said}"[:MAX_NAME_BYTES] + ":" + ",".join(f"{name}={value}" for name, value in point.items())
