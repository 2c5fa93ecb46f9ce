"""The record of a run as types, and what a sweep's has in common with it (docs/records.md).

While a run works, it writes its record as a plain dictionary. Readers of the record use these types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from functools import cached_property
from typing import Any, Self, TypeVar, cast

from components.config import Experiment, TrainConfig, roles
from components.errors import DataError
from components.fields import content_hash, from_dict, to_dict

SCHEMA = 1
"""Schema of ``run.json``, ``sweep.json``, ``best.json`` and ``table.json``."""

Json = Mapping[str, Any]
Value = TypeVar("Value")

_OPTIONAL = {"optional": True}
"""Metadata of a field that the JSON object lacks while the field has its default."""


class _Entry:
    """A frozen dataclass whose fields are the keys of a JSON object."""

    @classmethod
    def from_json(cls, value: Any, where: str = "run.json") -> Self:
        """Read an entry. A key that is null or missing gets the field's default.

        Args:
            value: the JSON object.
            where: the place of the object, for the error message.

        Raises:
            DataError: ``value`` is no object, or it lacks a key that has no default.
        """
        if not isinstance(value, Mapping):
            raise DataError(f"{where} is no JSON object; run the same command again to write it anew")
        present = {f.name: value[f.name] for f in _fields(cls) if value.get(f.name) is not None}
        for f in _fields(cls):
            if f.name not in present and _default(f) is MISSING:
                raise DataError(f"{where} lacks {f.name!r}; run the same command again to write it anew")
        return cls(**cls._parsed(present, where))

    @classmethod
    def _parsed(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the values of the fields, with JSON objects read as what the fields hold."""
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_json` reads."""
        values = {f: getattr(self, f.name) for f in _fields(type(self))}
        return {f.name: _to_json(v) for f, v in values.items() if not (f.metadata and v == _default(f))}


@dataclass(frozen=True, kw_only=True)
class ModelEntry(_Entry):
    """A finished model of a run."""

    path: str
    train: Json = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    clean_validation: float | None = None
    reconstruction_validation: float | None = None
    seconds: float = 0.0
    """Training time. It is 0 for a model that was not trained here."""
    images_per_second: float = 0.0
    autoencoder: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry(_Entry):
    """One model under one attack of one threat model."""

    model: str
    source: str | None = None
    """The model that the examples were made on. None for clean images and noise."""
    threat_model: str
    attack: str
    path: str | None = None
    examples: str | None = None
    n: int
    metrics: Json
    chunks_split_for_memory: int = field(default=0, metadata=_OPTIONAL)
    chunks_searched_in_float32: int = field(default=0, metadata=_OPTIONAL)

    @classmethod
    def _parsed(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        for key in ("accuracy", "accuracy_low", "accuracy_high"):
            if not isinstance(values["metrics"].get(key), int | float):
                raise DataError(f"{where} lacks metrics.{key}; run the same command again to write it anew")
        return values

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly under the attack."""
        return float(self.metrics["accuracy"])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return float(self.metrics["accuracy_low"]), float(self.metrics["accuracy_high"])

    @property
    def curve(self) -> Json | None:
        """Accuracy over the norm allowed: {norm, eps, accuracy}. None for attacks within a budget."""
        curve: Json | None = self.metrics.get("curve")
        return curve


@dataclass(frozen=True, kw_only=True)
class WorstCase(_Entry):
    """Accuracy of a model if the most harmful example within a budget counts for each image."""

    model: str
    threat_model: str
    norm: str
    eps: float
    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    attacks: int


@dataclass(frozen=True, kw_only=True)
class WorstCasePair(_Entry):
    """Two models in the worst case on the same images, with the p-value of McNemar's test."""

    model: str
    against: str
    threat_model: str
    norm: str
    eps: float
    n: int
    only_model: int
    only_against: int
    p: float


@dataclass(frozen=True, kw_only=True)
class Reliability(_Entry):
    """What the tests of the attacks on one model found (docs/reliability.md)."""

    probe: Json = field(default_factory=dict)
    active: Mapping[str, Json] = field(default_factory=dict)
    """Attack -> result of its active test."""
    flags: Sequence[Json] = ()


@dataclass(frozen=True, kw_only=True)
class Record(_Entry):
    """The part that ``run.json`` and ``sweep.json`` share: config, code, machine and times."""

    name: str
    experiment: Experiment
    created: str = ""
    finished: str | None = None
    data: Json = field(default_factory=dict)
    """Empty until the shards are made."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage, in the order of the stages."""
    git: Json = field(default_factory=dict, metadata=_OPTIONAL)
    source: str | None = field(default=None, metadata=_OPTIONAL)
    command: str = field(default="", metadata=_OPTIONAL)
    versions: Mapping[str, str] = field(default_factory=dict, metadata=_OPTIONAL)
    hardware: Json = field(default_factory=dict, metadata=_OPTIONAL)

    @classmethod
    def _parsed(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        values["experiment"] = from_dict(Experiment, values["experiment"])
        # Storage sorts the keys of JSON objects. People read them in the order of events.
        values["stages"] = in_order(values.get("stages", {}), ("pyramids", "train", "attack", "report"))
        if rows := values.get("data", {}).get("rows"):
            values["data"] = {**values["data"], "rows": in_order(rows, ("train", "validation", "test"))}
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_json` reads."""
        return {**super().to_json(), "schema": SCHEMA, "data": dict(self.data) or None}


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """All of ``run.json``."""

    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    """The finished models, in the order of the config."""
    evaluated: str | None = field(default=None, metadata=_OPTIONAL)
    """When the results of the attacks last changed."""
    evaluations: tuple[EvaluationEntry, ...] = ()
    worst_case: tuple[WorstCase, ...] | None = field(default=None, metadata=_OPTIONAL)
    worst_case_pairs: tuple[WorstCasePair, ...] | None = field(default=None, metadata=_OPTIONAL)
    reliability: Mapping[str, Reliability] | None = field(default=None, metadata=_OPTIONAL)
    """Model -> tests of the attacks on it, in config order. None before the attacks have run."""
    rebuilt_from: str | None = field(default=None, metadata=_OPTIONAL)
    """File that the record was rebuilt from, where the run itself was lost."""
    diverged: Mapping[str, int] | None = field(default=None, metadata=_OPTIONAL)
    """Model -> step at which its loss was not finite."""

    @classmethod
    def _parsed(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        values = super()._parsed(values, where)
        lists: dict[str, type[_Entry]] = {
            "evaluations": EvaluationEntry,
            "worst_case": WorstCase,
            "worst_case_pairs": WorstCasePair,
        }
        for key in lists.keys() & values.keys():
            entries = enumerate(values[key])
            values[key] = tuple(lists[key].from_json(e, f"{where}: entry {i} of {key}") for i, e in entries)
        order = tuple(roles.roles_of(values["experiment"]))
        objects: dict[str, type[_Entry]] = {"models": ModelEntry, "reliability": Reliability}
        for key in objects.keys() & values.keys():
            named = {name: objects[key].from_json(e, f"{where}: {key}.{name}") for name, e in values[key].items()}
            values[key] = in_order(named, order)
        return values

    @cached_property
    def roles(self) -> dict[str, str]:
        """Model -> source, control, defended or given, in the order of the config."""
        return roles.roles_of(self.experiment)

    @cached_property
    def replicates(self) -> dict[str, tuple[str, int]]:
        """Model -> (its name in the recipe, number of the replicate)."""
        return self.experiment.replicates()

    @cached_property
    def bases(self) -> dict[str, str]:
        """Model -> its name in the recipe."""
        return self.experiment.base_names()

    @property
    def first_replicates(self) -> list[str]:
        """The first replicate of each model of the recipe."""
        return roles.first_replicates(self.roles, self.bases)

    def model_config(self, name: str) -> Json:
        """Return the complete training config of a model, also before the model is trained."""
        trained = self.models[name].train if name in self.models else {}
        return trained or to_dict(self.experiment.model_configs()[name].canonical())


def run_address(experiment: Experiment) -> str:
    """Return ``runs/<recipe>-<hash>``, hashed over the settings that change the run's results."""
    config = to_dict(experiment)
    for name in ("storage", "tracking_uri", "experiment_name", "register", "description"):
        del config[name]
    # These settings came later. At their defaults, the addresses of earlier runs stay.
    for name in ("test_split", "image_column", "label_column"):
        if not config["data"][name]:
            del config["data"][name]
    defaults = to_dict(TrainConfig())
    for name in ("adversarial_training", "adversarial_loss", "adversarial_beta", "ema_decay"):
        if config["train"][name] == defaults[name]:
            del config["train"][name]
    # Of the scaling settings only the number of workers changes a result.
    config["scaling"] = {"workers": config["scaling"]["workers"]}
    return f"runs/{experiment.name}-{content_hash(config)}"


def drop_unreadable(record: dict[str, Any]) -> list[str]:
    """Empty the computed sections of a run's record that cannot be read, and return their names.

    The stages write these sections anew, so damage in them need not stop a run that continues.
    """
    computed = ("models", "evaluations", "worst_case", "worst_case_pairs", "reliability", "diverged")
    header = {key: value for key, value in record.items() if key not in computed}
    damaged = []
    for section in computed:
        try:
            RunRecord.from_json({**header, section: record.get(section)})
        except (DataError, AttributeError, TypeError, ValueError):
            damaged.append(section)
            record.pop(section)
    return damaged


def in_order(values: Mapping[str, Value], first: Sequence[str]) -> dict[str, Value]:
    """Return ``values`` with the keys ``first`` at the beginning, and the others after them."""
    return {name: values[name] for name in dict.fromkeys((*first, *values)) if name in values}


def _fields(cls: type[_Entry]) -> tuple[Field[Any], ...]:
    return dataclasses.fields(cast(Any, cls))


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _to_json(value: Any) -> Any:
    if isinstance(value, _Entry):
        return value.to_json()
    if isinstance(value, Experiment):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _to_json(v) for key, v in value.items()}
    return [_to_json(v) for v in value] if isinstance(value, tuple | list) else value
