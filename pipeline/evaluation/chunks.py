"""Files of examples and of judgements, one per chunk of samples."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import DataError
from pipeline.data import shards
from pipeline.runtime.storage import Storage


def write_json_once(root: Storage, name: str, value: Any) -> None:
    """Write a JSON file unless it exists."""
    if not root.exists(name):
        root.write_json(name, value)


def chunk_name(i: int) -> str:
    """Return the file name of chunk ``i``."""
    return f"chunk-{i:05d}.parquet"


def read_chunks(directory: Storage, chunks: int) -> dict[str, np.ndarray]:
    """Read all records of one evaluation, in the order of the samples.

    Raises:
        DataError: a chunk is missing or corrupt.
    """
    table = pa.concat_tables([read_table(directory, i) for i in range(chunks)])
    return {name: table.column(name).to_numpy() for name in table.column_names}


def read_table(directory: Storage, i: int) -> pa.Table:
    """Read one chunk.

    Raises:
        DataError: the file is corrupt.
    """
    try:
        return pq.read_table(pa.BufferReader(directory.read_bytes(chunk_name(i))))
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(
            f"{directory.uri}/{chunk_name(i)} is corrupt ({e}); "
            "delete it and run the same command again: only it is computed anew"
        ) from e


def read_metadata(directory: Storage, i: int) -> dict[str, Any]:
    """Read the metadata that :func:`write_table` was given for one chunk."""
    with directory.open(chunk_name(i)) as file:  # The images are large, so only the footer is read.
        schema = pq.read_schema(file)
    metadata: dict[str, Any] = json.loads(schema.metadata[b"defendpp"])
    return metadata


def write_table(directory: Storage, i: int, columns: dict[str, pa.Array], metadata: dict[str, Any]) -> None:
    """Write one chunk with its metadata, unless its file exists.

    Ray may take a task for dead and start it again while it still runs. The first file stays,
    since others may have read it by then.
    """
    table = pa.table(columns)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"defendpp": json.dumps(metadata).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    directory.write_if_absent(chunk_name(i), sink.getvalue())


def read_examples(directory: Storage, i: int) -> np.ndarray:
    """Read the adversarial examples of one chunk, float32 [n,C,H,W].

    Raises:
        DataError: the file is corrupt.
    """
    return shards.to_numpy(read_table(directory, i).column("adversarial"))
