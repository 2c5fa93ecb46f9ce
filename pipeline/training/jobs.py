"""What is to be trained, and where it will lie: addresses, a sweep's plan, and the queue between its trials and its workers.

No torch here: a trial of a sweep is a process that only asks and reports, and must not cost more than that.
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

CODE_VERSION = 1
"""Part of a model's address. Raise it when the same config would train to other weights, or a default changes."""
NOT_FINITE = "not-finite.json"
"""In a model's directory: the step at which its loss was not finite."""
FAILED_MODEL = "failed.json"
"""In a model's directory: why it could not be trained."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One model to train."""

    name: str
    """Its name in the run."""
    config: TrainConfig
    """Canonical: models that differ only in settings without influence are one."""
    pyramids: dict[str, str]
    """Shard sets to read: "train" and, if there is one, "validation"."""
    weights: str
    """Pretrained weights below the storage's root, or empty."""
    address: str
    """``models/<kind>-<hash>`` below the storage's root."""
    autoencoder: str = ""
    """Of a model that is given, not trained: its auto-encoder below the storage's root, or empty."""
    without: str = ""
    """Why a model that is given has no auto-encoder."""

    def request(self) -> dict[str, Any]:
        """What a worker must know of it, as plain JSON types."""
        config = to_dict(self.config)
        return {"address": self.address, "config": config, "pyramids": self.pyramids, "weights": self.weights}


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Addresses of the shard sets of a run."""

    train: dict[str, str]
    """Kind of targets -> shard set that holds them; at least one, unless no model is trained."""
    without_levels: str
    """Address that the training images have (or would have) without levels: what names a model that reads none."""
    validation: str = ""
    """Empty: there is no validation split."""

    def for_model(self, config: TrainConfig) -> tuple[dict[str, str], dict[str, str]]:
        """What a model reads, and what names it.

        Raises:
            ConfigError: it reads a kind of targets that no shard set holds.
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


def model_address(config: TrainConfig, shapes: Shapes, identity: Mapping[str, str], workers: int, weights: str) -> str:
    """``models/<kind>-<hash>``: all that the weights follow from, so that runs and tables share what they have in common.

    Batch norm is per worker, so their number counts; so does the source of a network of the user's own.

    Raises:
        ConfigError: as :func:`source_hash`.
    """
    said = to_dict(shapes)
    if config.defense != "defend++":
        del said["sizes"]
    # without the settings at their default: a setting that is added later does not rename the models there are
    defaults = to_dict(TrainConfig())
    settings = {k: v for k, v in to_dict(config).items() if v != defaults[k]}
    parts: list[Any] = [CODE_VERSION, settings, said, dict(identity), workers, weights]
    if config.pretrained and (spelt := libraries.explicit(config.arch, True)) != config.arch:
        parts.append(spelt)  # earlier versions built it as without weights
    if source := source_hash(config.arch):
        parts.append(source)
    # changes of one defense alone, which must not rename the models of the others
    if config.defense == "comdefend":
        parts.append("penalty on the bits")
    if config.defense == "adversarial" and workers > 1 and "validation" not in identity:
        parts.append("batch norm statistics shared after every epoch")
    if config.defense == "adversarial" and config.adversarial_attack == "ddn":
        parts.append("l2_norms")  # DDN lost the direction of gradients below 1e-19 before
    return f"models/{config.kind}-{content_hash(*parts)}"


def source_hash(arch: str) -> str:
    """SHA-256 of the file of the module in ``MODULE:FUNCTION``, which is not imported; empty for a network of ours or a library's.

    Raises:
        ConfigError: there is no such module, or it has no file.
    """
    if not own.is_own(arch):
        return ""
    module = arch.partition(":")[0]
    try:
        with own.importing(arch):  # the packages above a module are imported to find it
            spec = importlib.util.find_spec(module)
    except ConfigError as e:
        cause = e.__cause__
        absent = isinstance(cause, ModuleNotFoundError) and module.startswith(cause.name or "?")
        if not absent and not isinstance(cause, ValueError):  # of a module without a spec
            raise
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError.of(
            "train.arch",
            arch,
            f"a function of a module that is a file on the Python path; {module!r} is none. {own.where_found(module)}".rstrip(),
        )
    loader: Any = spec.loader  # that of a zip archive reads out of it
    return hashlib.sha256(loader.get_data(spec.origin)).hexdigest()
