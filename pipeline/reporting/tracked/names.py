"""Names, times and data sets of MLflow's runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from components.fields import parse_spec, to_dict
from pipeline.recipes.registry import RECIPES
from pipeline.records import Record, RunRecord
from pipeline.reporting import verdicts
from pipeline.runtime.storage import Storage
from pipeline.tracking.datasets import SplitData

UNNAMED = ("name", "description", "storage", "tracking_uri", "experiment_name", "register", "data.root")
"""Settings that say where a run is computed and shown. Its name leaves them out."""
LONGEST_NAME = 120


def run_name(record: Record) -> str:
    """Return the recipe's name and what differs from it, as in ``mnist-demo train.lam=0.1``."""
    experiment = record.experiment
    differing: dict[str, Any] = {}
    if record.name in RECIPES:
        recipe, own = flatten(to_dict(RECIPES[record.name].make())), flatten(to_dict(experiment))
        differing = {key: value for key, value in own.items() if value != recipe.get(key) and _is_named(key)}
    elif record.name.endswith("-best"):  # The run that tests a sweep's choice.
        fields = next((f for name, f in map(parse_spec, experiment.models) if name == "best"), {})
        differing = {key: value for key, value in fields.items() if key not in ("defense", "seed")}
    name = " ".join([record.name, *(f"{key}={_short(value)}" for key, value in differing.items())])
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _is_named(key: str) -> bool:
    # Of the scaling settings only the number of workers changes a result.
    return key not in UNNAMED and (not key.startswith("scaling.") or key == "scaling.workers")


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    with contextlib.suppress(ValueError):
        text = text if text.lstrip("-").isdecimal() else f"{float(text):.4g}"  # All digits of a whole number count.
    return text if len(text) <= 40 else text[:39] + "…"


def code_tags(record: Record) -> dict[str, Any]:
    """Return the tags of every run and logged model that name the code.

    MLflow shows them in its columns "Source", "Version" and "Logged from".
    """
    tags = {
        "mlflow.source.name": "pipeline/main.py",
        "mlflow.source.git.commit": record.git.get("revision"),
        "mlflow.source.type": "LOCAL",
        "git_dirty": record.git.get("dirty"),
        "source": record.source,
    }
    return {key: value for key, value in tags.items() if value is not None}


def model_tags(record: RunRecord, name: str) -> dict[str, Any]:
    """Return the tags that a model's run and its logged model have."""
    tags = {
        "recipe": record.name,
        "model": name,
        "role": record.roles.get(name),
        "records": record.models[name].path if name in record.models else None,
        "warning": next((row["sentence"] for row in verdicts.near_chance(record) if row["model"] == name), None),
    }
    return {key: value for key, value in tags.items() if value is not None}


def split_data(record: Record, root: Storage, split: str) -> SplitData | None:
    """Return a split as a data set; None if the record does not have it (yet).

    The digest is that of the split's own shards. Training images have it from their shards without
    levels, so that it is the same for all models.
    """
    data = record.data
    rows = (data.get("rows") or {}).get(split)
    if "hash" not in data or not rows:  # The run was stopped before all splits were made.
        return None
    own = [address for name, address in (data.get("splits") or {}).items() if name.partition("/")[0] == split]
    images = data.get("bare") if split == "train" else None
    return SplitData(
        # Charts have room for a short name only. The source has the whole.
        name=f"{re.split('[:/]', data['source'].rstrip('/'))[-1]} {split}",
        digest=(images or (own or [data["hash"]])[0]).rpartition("/")[2],
        source=f"{root.uri}/{own[0]}" if own else data["source"],
        rows=rows,
        channels=record.experiment.data.channels,
        image_size=record.experiment.data.image_size,
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"train": {"lr": 1}}`` as ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unix_time(iso: str | None) -> float | None:
    """Return an ISO time in unix seconds; None for an empty text."""
    return datetime.fromisoformat(iso).timestamp() if iso else None


def epoch_of(file: str) -> int:
    """Return the number in the name of an epoch record: 3 for ``.../history/epoch-00003.json``."""
    return int(re.sub(r"\D", "", file.rpartition("/")[2]))
