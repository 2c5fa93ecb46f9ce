"""The models that a sweep's trials train, and how they are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

from components.config import SEED_STRIDE, Experiment, Shapes, TrainConfig
from components.errors import ConfigError
from components.fields import content_hash, replace_typed
from components.search_space import Point
from components.threat_models import WHITE_BOX
from pipeline.training.jobs import TrainingData, TrainingJob, make_job

OBJECTIVE_VERSION = 2
"""Part of an objective's name. Raise it when the same settings would measure something else."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The measurement of a model after each epoch, on validation images."""

    attack: str
    """Canonical text of an AttackSpec."""
    images: int
    """How many images are attacked at the most."""
    validation: str
    """Address of the validation images."""

    @property
    def directory(self) -> str:
        """``objectives/<hash>`` in a model's directory, which other objectives may share."""
        return f"objectives/{content_hash(OBJECTIVE_VERSION, self.attack, self.images, self.validation)}"

    def file(self, epoch: int) -> str:
        """Return the file of an epoch, which counts from 0 as in ``history/``."""
        return f"{self.directory}/epoch-{epoch:05d}.json"


def trial_config(experiment: Experiment, base: TrainConfig, point: Point) -> TrainConfig:
    """Return the first model of a trial: the recipe's model ``base`` with the point's values.

    Raises:
        ConfigError: the values do not go together, with one another or with the recipe, or a sweep
            cannot judge the model.
    """
    # Values pass through text, as in an experiment's models: 1 and 1.0 have one address.
    config = replace_typed(base, {name: str(value) for name, value in point.items()}, "space")
    if config.defense == "comdefend":
        raise ConfigError.of("space: defense", config.defense, "that of a classifier: a reformer alone has no accuracy")
    if not config.epochs:
        raise ConfigError.of("space: epochs", 0, "at least 1 in a sweep, which trains")
    evaluation = replace(experiment.evaluation, threat_models=(WHITE_BOX,), transfer_source="")
    # Run the recipe's own checks on this model alone.
    replace(experiment, train=config, models=("trial",), evaluation=evaluation, figures=(), paper="")
    return config


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Settings that all trials of a sweep share. Picklable."""

    root: str
    """URI of the storage."""
    experiment: Experiment
    """The recipe. A trial trains one model for each of its seeds, which are SEED_STRIDE apart."""
    base: TrainConfig
    """Config of the model that is varied."""
    shapes: Shapes
    data: TrainingData
    weights: str
    """Pretrained weights below root, or empty."""
    objective: Objective

    def jobs(self, point: Point) -> list[TrainingJob]:
        """Return the models of a trial, one for each seed.

        Raises:
            ConfigError: the point's values do not go together, with one another or with the recipe.
        """
        first = trial_config(self.experiment, self.base, point)
        workers = self.experiment.scaling.workers
        configs = [replace(first, seed=first.seed + SEED_STRIDE * i).canonical() for i in range(self.experiment.seeds)]
        return [
            make_job(f"s{i}", config, self.shapes, self.data, workers, self.weights, autoencoder="")
            for i, config in enumerate(configs)
        ]
