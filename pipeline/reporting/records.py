"""Reading the records of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config import Experiment
from components.config.roles import roles_of
from components.errors import DataError
from components.fields import from_dict, to_dict
from components.training.schedule import PHASES
from pipeline.runtime.storage import Storage, read_arrays

SCHEMA = 1
"""Of ``run.json``, ``sweep.json`` and ``best.json``."""

Row = dict[str, Any]


def read_record(directory: Storage, file: str) -> dict[str, Any]:
    """Read ``run.json`` or ``sweep.json``.

    Raises:
        DataError: it is of another schema. StorageError: it cannot be read.
    """
    record = directory.read_json(file)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{directory.uri}/{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    return dict(record)


def read_run(run: Storage) -> dict[str, Any]:
    """``run.json`` with what a run that is not complete lacks filled in empty.

    Raises:
        DataError: it is missing, of another schema, or lacks what every run has. StorageError: it cannot be read.
    """
    if not run.exists("run.json"):
        raise DataError(f"{run.uri} is not the directory of a run: it has no run.json. Runs lie under STORAGE/runs/")
    record = read_record(run, "run.json")
    for key in ("name", "experiment"):
        if key not in record:
            raise DataError(f"{run.uri}/run.json lacks {key!r}; run the same command again to write it anew")
    empty: dict[str, Any] = {"models": {}, "evaluations": [], "stages": {}, "data": {}, "git": {}, "hardware": {}}
    whole = {**empty, "versions": {}, "command": "", "created": "", "finished": None}
    whole.update({k: v for k, v in record.items() if v is not None})
    # JSON objects are stored by name; people read them in the order in which things happen
    whole["stages"] = in_order(whole["stages"], ("pyramids", "train", "attack", "report"))
    whole["data"] = {
        **whole["data"],
        "rows": in_order(whole["data"].get("rows") or {}, ("train", "validation", "test")),
    }
    whole["models"] = in_order(whole["models"], tuple(roles_of(experiment_of(whole))))
    for i, evaluation in enumerate(whole["evaluations"]):
        for key in ("model", "threat_model", "attack", "n", "metrics"):
            if key not in evaluation:
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks {key!r}; run the same command again")
        for key in ("accuracy", "accuracy_low", "accuracy_high"):
            if not isinstance(evaluation["metrics"].get(key), int | float):
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks metrics.{key}; run the same command again")
    return whole


def in_order(values: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in dict.fromkeys((*first, *values)) if name in values}


def history_files(root: Storage, model: Mapping[str, Any]) -> list[str]:
    """Names, below the storage, of a model's epoch records, first epoch first."""
    directory = f"{model['path']}/history"
    return [f"{directory}/{name}" for name in root.list(directory)]


def read_epoch(root: Storage, file: str) -> dict[str, Any]:
    """One epoch record. Raises DataError if it is not one, StorageError if it cannot be read."""
    record = root.read_json(file)
    try:
        if (
            record["phase"] in PHASES
            and int(record["epoch"]) >= 0
            and all({"step", "time"} <= s.keys() for s in record["steps"])
        ):
            return dict(record)
    except (KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{root.uri}/{file} is not the record of an epoch; delete its directory and run the same command again"
    )


def read_gallery(run: Storage) -> dict[str, np.ndarray]:
    """``gallery.npz``; empty if the run has none yet. Raises DataError if it is corrupt."""
    gallery = read_arrays(run, "gallery.npz")
    if not gallery or ({"clean", "label"} <= gallery.keys() and len(gallery["clean"]) == len(gallery["label"])):
        return gallery
    raise DataError(
        f"{run.uri}/gallery.npz is corrupt (it has not as many labels as images); delete it and run the same command again"
    )


def read_judged(root: Storage, path: str) -> dict[str, np.ndarray]:
    """The columns of one ``judged/<hash>``, by sample index. Raises DataError if a chunk is missing or corrupt."""
    chunks = [name for name in root.list(path) if name.endswith(".parquet")]
    if not chunks:
        raise DataError(f"{root.uri}/{path} has no records of an evaluation; run the same command again")
    wanted = ["index", "label", "adversarial_prediction"]
    try:
        tables = [pq.read_table(pa.BufferReader(root.read_bytes(f"{path}/{name}")), columns=wanted) for name in chunks]
    except (pa.ArrowInvalid, OSError, KeyError) as e:
        raise DataError(f"{root.uri}/{path} is corrupt ({e}); delete it and run the same command again") from e
    table = pa.concat_tables(tables).sort_by("index")
    return {name: table.column(name).to_numpy() for name in wanted}


def model_config(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The complete training config of a model, also before it is trained."""
    trained: dict[str, Any] | None = record["models"].get(name, {}).get("train") if "models" in record else None
    return trained or to_dict(experiment_of(record).model_configs()[name].canonical())


def experiment_of(record: Mapping[str, Any]) -> Experiment:
    """The config of a run out of its record."""
    return from_dict(Experiment, record["experiment"])
