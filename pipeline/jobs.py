"""What is to be trained, and where it will lie: addresses, a sweep's plan, and the queue between its trials and its workers.

No torch here: a trial of a sweep is a process that only asks and reports, and must not cost more than that.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from components.config import SEED_STRIDE, Experiment, Shapes, TrainConfig, stored_levels
from components.errors import ConfigError
from components.fields import content_hash, replace_typed, to_dict
from components.models import libraries, own
from components.search_space import Point

CODE_VERSION = 1
"""Part of a model's address. Raise it when the same config would train to other weights, or a default changes."""
NOT_FINITE = "not-finite.json"
"""In a model's directory: the step at which its loss was not finite."""
FAILED_MODEL = "failed.json"
"""In a model's directory: why it could not be trained."""


@dataclass(frozen=True, kw_only=True)
class Job:
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

    def order(self) -> dict[str, Any]:
        """What a worker must know of it, as plain JSON types."""
        config = to_dict(self.config)
        return {"address": self.address, "config": config, "pyramids": self.pyramids, "weights": self.weights}


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Addresses of the shard sets of a run."""

    train: dict[str, str]
    """Kind of targets -> shard set that holds them; at least one, unless no model is trained."""
    bare: str
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
            train, identity = next(iter(self.train.values())), self.bare
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


# -- sweeps ----------------------------------------------------------------------------------------------------------------


OBJECTIVE_VERSION = 2
"""Part of an objective's name. Raise it when the same settings would measure something else."""
DIVERGED, FAILED, DONE, WAITING, TRAINING = "diverged", "failed", "done", "waiting", "training"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is measured of a model after each epoch, on validation images."""

    attack: str
    """Canonical text of an AttackSpec."""
    images: int
    validation: str
    """Address of the shard set."""

    @property
    def directory(self) -> str:
        """Below a model's: ``objectives/<hash>``. Models are shared with runs that measure something else, or nothing."""
        return f"objectives/{content_hash(OBJECTIVE_VERSION, self.attack, self.images, self.validation)}"

    def file(self, epoch: int) -> str:
        """Of an epoch, counted from 0 as in ``history/``."""
        return f"{self.directory}/epoch-{epoch:05d}.json"


def trial_config(experiment: Experiment, base: TrainConfig, point: Point) -> TrainConfig:
    """The first model of a trial: the recipe's model ``base`` with the point's values.

    Raises:
        ConfigError: the values do not go together, with one another or with the recipe, or make nothing that a sweep can judge.
    """
    # by way of text, as in an experiment's models: 1 and 1.0 are one value, and so one address
    config = replace_typed(base, {name: str(value) for name, value in point.items()}, "space")
    if config.defense == "comdefend":
        raise ConfigError.of("space: defense", config.defense, "that of a classifier: a reformer alone has no accuracy")
    if not config.epochs:
        raise ConfigError.of("space: epochs", 0, "at least 1 in a sweep, which trains")
    evaluation = replace(experiment.evaluation, threat_models=("white_box",), transfer_source="")
    # the recipe's own checks, of this model alone
    replace(experiment, train=config, models=("trial",), evaluation=evaluation, figures=(), paper="")
    return config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all trials of a sweep have in common. Picklable."""

    root: str
    """URI of the storage."""
    experiment: Experiment
    """The recipe: how many models a trial has (their seeds are SEED_STRIDE apart, as in ``Experiment.replicates``), on what."""
    base: TrainConfig
    shapes: Shapes
    data: TrainingData
    weights: str
    objective: Objective

    def jobs(self, point: Point) -> list[Job]:
        """The models of one trial, one for each seed.

        Raises:
            ConfigError: the point's values do not go together, with one another or with the recipe.
        """
        jobs = []
        given = trial_config(self.experiment, self.base, point)
        for replicate in range(self.experiment.seeds):
            config = replace(given, seed=given.seed + SEED_STRIDE * replicate).canonical()
            reads, identity = self.data.for_model(config)
            address = model_address(config, self.shapes, identity, self.experiment.scaling.workers, self.weights)
            jobs.append(Job(name=f"s{replicate}", config=config, pyramids=reads, weights=self.weights, address=address))
        return jobs


class JobQueue:
    """Between the trials of a sweep, which want models, and its Ray Train runs, which train them. A Ray actor.

    It holds no truth: what is trained lies on storage, and each trial says again and again what it wants. So a queue that is
    lost and started anew fills itself. (It may then give away a model that a run is just training: both write the same.)

    Args:
        attempts: how often a model is given out whose workers died; it may be what kills them.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._wanted: dict[str, dict[str, Any]] = {}
        self._followers: dict[str, set[str]] = {}
        self._held: dict[str, int] = {}
        self._given: Counter[str] = Counter()
        self._ended: dict[str, tuple[str, str]] = {}
        self._closed = False
        self._error = ""

    def follow(self, orders: Sequence[Mapping[str, Any]], trial: str) -> list[tuple[str, str]]:
        """Have these models trained, in order; said again, nothing changes. State and reason (if it failed) of each."""
        states = []
        for order in orders:
            address = order["address"]
            self._followers.setdefault(address, set()).add(trial)
            if address not in self._ended:
                self._wanted.setdefault(address, dict(order))
            where = (TRAINING if address in self._held else WAITING), ""
            states.append(self._ended.get(address, where))
        return states

    def leave(self, trial: str) -> None:
        """A trial is over: what it alone wanted is not trained further."""
        for followers in self._followers.values():
            followers.discard(trial)
        for address in [a for a in self._wanted if not self._followers[a] and a not in self._held]:
            del self._wanted[address]

    def take(self, run: int) -> dict[str, Any] | None:
        """The next model for a Ray Train run: {} if there is none yet, None if there will be none any more.

        A run that still holds one was started again, since its workers died: it goes on with that.
        """
        for address in [a for a, holder in self._held.items() if holder == run]:
            del self._held[address]
            if self._followers.get(address) and self._given[address] >= self._attempts:
                reason = f"its workers died {self._given[address]} times (out of memory?)"
                self.end(address, FAILED, reason)
        if self._closed:
            return None
        for address, order in self._wanted.items():
            if address not in self._held and self._followers[address]:
                self._held[address] = run
                self._given[address] += 1
                return order
        return {}

    def cancelled(self, address: str, run: int) -> bool:
        """Asked between two epochs by the run that trains it."""
        self._held[address] = run  # said anew to a queue that was lost
        return self._closed or (address in self._followers and not self._followers[address])

    def end(self, address: str, state: str, reason: str = "") -> None:
        """A model is done, diverged or failed, for its reason; or, with no state, was left."""
        self._held.pop(address, None)
        self._wanted.pop(address, None)
        if not state:  # its workers live
            self._given[address] -= 1
        if state and not (state == FAILED and self._error):  # it follows from that
            self._ended[address] = state, reason

    def close(self, error: str = "") -> None:
        """Nothing is given out any more; with an error, which is of no one model, the sweep ends with it."""
        self._closed, self._error = True, self._error or error

    def error(self) -> str:
        """What :meth:`close` was first told, if anything."""
        return self._error

    def lost(self, run: int) -> None:
        """A Ray Train run ended for good: others may have what it held."""
        self._held = {address: holder for address, holder in self._held.items() if holder != run}
