"""Settings of a run, as frozen keyword-only dataclasses that are validated when made.

Section numbers in this package are those of Liu et al., "Defending Adversarial Examples via DNN
Bottleneck Reinforcement", ACM MM 2020."""

from components.config.data import (
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    MAX_LEVELS,
    MIN_LEVEL_SIZE,
    DataConfig,
    PyramidConfig,
    Shapes,
    level_sizes,
)
from components.config.experiment import FIGURES, PRINTED_IN, SEED_STRIDE, EvaluationConfig, Experiment, ScalingConfig
from components.config.train import ENCODER_BLOCKS, MAX_WIDTH, TrainConfig, stored_levels

__all__ = [
    "ENCODER_BLOCKS",
    "FIGURES",
    "MAX_CLASSES",
    "MAX_IMAGE_SIZE",
    "MAX_LEVELS",
    "MAX_WIDTH",
    "MIN_LEVEL_SIZE",
    "PRINTED_IN",
    "SEED_STRIDE",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "PyramidConfig",
    "ScalingConfig",
    "Shapes",
    "TrainConfig",
    "level_sizes",
    "stored_levels",
]
