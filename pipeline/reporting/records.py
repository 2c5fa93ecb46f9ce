"""Readers of the files of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from components.errors import DataError
from components.training.schedule import PHASES
from pipeline.evaluation import chunks
from pipeline.records import SCHEMA, RunRecord
from pipeline.runtime.storage import Storage, read_arrays

Row = dict[str, Any]
"""A row of a table as data. docs/records.md lists the keys of the rows of table.json."""


def read_record(directory: Storage, file: str) -> dict[str, Any] | None:
    """Read ``run.json`` or ``sweep.json``; return None if there is no such file.

    Raises:
        DataError: the file has another schema.
        StorageError: the file cannot be read.
    """
    if not directory.exists(file):
        return None
    record = directory.read_json(file)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{directory.uri}/{file} has schema {schema!r}; this version reads schema {SCHEMA}")
    return dict(record)


def read_run(run: Storage) -> RunRecord:
    """Read the record of a run, complete or not.

    Raises:
        DataError: ``run.json`` is missing, has another schema, or lacks a key that every run has.
        StorageError: the file cannot be read.
    """
    record = read_record(run, "run.json")
    if record is None:
        raise DataError(f"{run.uri} is not the directory of a run: it has no run.json. Runs lie under STORAGE/runs/")
    return RunRecord.from_json(record, f"{run.uri}/run.json")


def history_files(root: Storage, path: str) -> list[str]:
    """Return the names of a model's epoch records below the storage, first epoch first."""
    directory = f"{path}/history"
    return [f"{directory}/{name}" for name in root.list(directory)]


def read_epoch(root: Storage, file: str) -> dict[str, Any]:
    """Read the record of one epoch.

    Raises:
        DataError: the file holds no such record.
        StorageError: the file cannot be read.
    """
    record = root.read_json(file)
    try:
        steps_complete = all({"step", "time"} <= step.keys() for step in record["steps"])
        if record["phase"] in PHASES and int(record["epoch"]) >= 0 and steps_complete:
            return dict(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise DataError(
        f"{root.uri}/{file} is not the record of an epoch; delete its directory and run the same command again"
    )


def read_gallery(run: Storage) -> dict[str, np.ndarray]:
    """Read ``gallery.npz``; return {} if the run has none yet.

    Raises:
        DataError: the file is corrupt.
    """
    gallery = read_arrays(run, "gallery.npz")
    if not gallery or ({"clean", "label"} <= gallery.keys() and len(gallery["clean"]) == len(gallery["label"])):
        return gallery
    raise DataError(
        f"{run.uri}/gallery.npz is corrupt (the numbers of images and labels differ); "
        "delete it and run the same command again"
    )


def read_judged(root: Storage, path: str) -> dict[str, np.ndarray]:
    """Read the columns of one ``judged/<hash>``, in the order of the samples.

    Raises:
        DataError: there is no chunk, or a chunk is corrupt.
        StorageError: a chunk is missing.
    """
    count = sum(name.endswith(".parquet") for name in root.list(path))
    if not count:
        raise DataError(f"{root.uri}/{path} has no records of an evaluation; run the same command again")
    return chunks.read_chunks(root / path, count)
