"""Training jobs: the models of an experiment, and the addresses under which their files lie.

This module imports no torch. A trial of a sweep is a process that only requests models and reports,
and must not cost more than that.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import Shapes, TrainConfig, stored_levels
from components.errors import ConfigError
from components.fields import content_hash, to_dict
from components.models import libraries, own

MODEL_VERSION = 1
"""Part of a model's address.

Raise it when the same config would train to other weights, or when a default changes."""
NOT_FINITE = "not-finite.json"
"""File in a model's directory: the step at which its loss was not finite."""
FAILED_MODEL = "failed.json"
"""File in a model's directory: why it could not be trained."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Model to train, or external model (epochs=0) to export with the weights it has."""

    name: str
    """Its name in the run."""
    config: TrainConfig
    """Canonical config: models that differ only in settings without influence are one."""
    pyramids: dict[str, str]
    """Shard sets to read: "train" and, if there is one, "validation"."""
    weights: str
    """Pretrained weights below the storage's root, or empty."""
    address: str
    """``models/<kind>-<hash>`` below the storage's root."""
    autoencoder: str = ""
    """Auto-encoder of an external model below the storage's root, or empty."""
    why_no_autoencoder: str = ""
    """Reason why an external model has no auto-encoder."""

    def request(self) -> dict[str, Any]:
        """Return what a worker needs to train the model, as plain JSON types."""
        config = to_dict(self.config)
        return {"address": self.address, "config": config, "pyramids": self.pyramids, "weights": self.weights}


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Addresses of the shard sets of a run."""

    train: dict[str, str]
    """Kind of targets -> shard set with such targets; at least one, unless no model is trained."""
    without_levels: str
    """Address of the training images without levels, whether built or not.

    It identifies models that read no levels."""
    validation: str = ""
    """Empty if there is no validation split."""

    def for_model(self, config: TrainConfig) -> tuple[dict[str, str], dict[str, str]]:
        """Return the shard sets that a model reads, and those that are part of its address.

        Raises:
            ConfigError: no shard set has the model's kind of targets.
        """
        if not config.epochs:
            return {}, {}
        if stored_levels(config):
            if config.targets not in self.train:
                raise ConfigError.of(
                    "train.targets", config.targets, f"one of this run's shards: {', '.join(self.train)}"
                )
            train = identity = self.train[config.targets]
        else:
            train, identity = next(iter(self.train.values())), self.without_levels
        validation = {"validation": self.validation} if self.validation else {}
        return {"train": train, **validation}, {"train": identity, **validation}


def make_job(
    name: str, config: TrainConfig, shapes: Shapes, data: TrainingData, workers: int, weights: str, autoencoder: str
) -> TrainingJob:
    """Return the job of a model with a canonical config. Raises ConfigError."""
    pyramids, identity = data.for_model(config)
    start = "+".join(filter(None, (weights, autoencoder)))
    return TrainingJob(
        name=name,
        config=config,
        pyramids=pyramids,
        weights=weights,
        address=model_address(config, shapes, identity, workers, start),
        autoencoder=autoencoder,
    )


def model_address(config: TrainConfig, shapes: Shapes, identity: Mapping[str, str], workers: int, weights: str) -> str:
    """Return ``models/<kind>-<hash>``, named by everything that the weights follow from.

    Runs and tables therefore share equal models. The number of workers is part of the hash, since
    batch norm is per worker; so is the source of a network of the user's own. Raises as
    :func:`source_hash`.
    """
    plain_shapes = to_dict(shapes)
    if config.defense != "defend++":
        del plain_shapes["sizes"]
    # Without the settings at their defaults, a new setting does not rename the models there are.
    defaults = to_dict(TrainConfig())
    settings = {k: v for k, v in to_dict(config).items() if v != defaults[k]}
    parts: list[Any] = [MODEL_VERSION, settings, plain_shapes, dict(identity), workers, weights]
    if config.pretrained and (explicit_name := libraries.explicit(config.arch, True)) != config.arch:
        parts.append(explicit_name)  # Earlier versions built this network as without weights.
    if source := source_hash(config.arch):
        parts.append(source)
    # The parts below stand for changes of one defense, which leave the others' models as they are.
    if config.defense == "comdefend":
        parts.append("penalty on the bits")
    if config.defense == "adversarial" and workers > 1 and "validation" not in identity:
        parts.append("batch norm statistics shared after every epoch")
    if config.defense == "adversarial" and config.adversarial_attack == "ddn":
        parts.append("l2_norms")  # DDN used to lose the direction of gradients below 1e-19.
    if config.may_fold_examples:
        parts.append("examples searched for on a folded copy")  # Rounding differs.
    return f"models/{config.kind}-{content_hash(*parts)}"


def source_hash(arch: str) -> str:
    """Return the SHA-256 of the module's file in ``MODULE:FUNCTION``, without importing it.

    It is empty for a network of this project or of a library.

    Raises:
        ConfigError: there is no such module, or it has no file.
    """
    if not own.is_own(arch):
        return ""
    module = arch.partition(":")[0]
    try:
        with own.importing(arch):  # Finding a module imports the packages above it.
            spec = importlib.util.find_spec(module)
    except ConfigError as e:
        cause = e.__cause__
        absent = isinstance(cause, ModuleNotFoundError) and module.startswith(cause.name or "?")
        # find_spec raises it for a module without a spec.
        if not absent and not isinstance(cause, ValueError):
            raise
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError.of(
            "train.arch",
            arch,
            f"a function of a module that is a file on the Python path; {module!r} is none. "
            f"{own.where_found(module)}".rstrip(),
        )
    loader: Any = spec.loader  # The loader of a zip archive reads out of the archive.
    return hashlib.sha256(loader.get_data(spec.origin)).hexdigest()
