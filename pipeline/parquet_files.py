"""Parquet files of images in the Hugging Face layout: opening them, their digests, and what their schemas say."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import DataError
from pipeline.storage import Storage


def open_parquet_file(storage: Storage, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.fs.open_input_file(storage.path(name)))
    except FileNotFoundError:
        raise DataError(
            f"{storage.uri}/{name} does not exist on this machine; every node must reach the data"
        ) from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(
            f"{storage.uri}/{name} is not a readable Parquet file ({e}); it is truncated or corrupt: get it again"
        ) from e


_DIGESTS: dict[tuple[str, int, Any], bytes] = {}
"""SHA-256 of each file read by this process, by path, size and time: a run opens its source once for every split and kind of
targets, and gigabytes need not be read as often."""


def file_digest(storage: Storage, name: str) -> bytes:
    path = storage.path(name)
    info = storage.fs.get_file_info(path)
    key = f"{storage.uri}/{name}", info.size, info.mtime_ns
    if key not in _DIGESTS:
        digest = hashlib.sha256()
        with storage.fs.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        _DIGESTS[key] = digest.digest()
    return _DIGESTS[key]


def image_column_of(schema: pa.Schema, where: str) -> str:
    for name in ("image", "img"):
        index = schema.get_field_index(name)
        if index >= 0:
            kind = schema.field(index).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DataError(
                    f"{where}: column {name!r} is {kind}, not a struct of bytes and path (Hugging Face image)"
                )
            break
    else:
        raise DataError(f"{where}: no column 'image' or 'img'; it has {', '.join(schema.names)}")
    label = schema.get_field_index("label")
    if label < 0 or not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{where}: no integer column 'label'; it has {', '.join(schema.names)}")
    return name


def class_names_of(schema: pa.Schema) -> tuple[str, ...]:
    """Return the class names in the schema's ``huggingface`` metadata; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
