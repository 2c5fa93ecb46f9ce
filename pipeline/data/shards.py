"""Shard sets as readers see them. No Ray here: workers start faster without Ray Data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import DataError
from pipeline.runtime.storage import Storage

FORMAT_VERSION = 1
"""Part of each address. Raise it when the same settings give other shards or manifests."""
MANIFEST = "manifest.json"
Columns = dict[str, np.ndarray]
"""Columns of a shard set: index int64 [n] (row of the source), label int32 [n], image uint8
[n,C,H,W], and level_1.. float16 or float32 [n,C,h,w] in the units of images in [0,1], unclipped."""


@dataclass(frozen=True)
class ShardSet:
    """The stored pyramids of one split. Picklable."""

    storage: Storage
    """The root below which ``address`` is."""
    address: str
    """``pyramids/<hash>``, a hash of all that determines the content."""
    manifest: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return int(self.manifest["num_rows"])

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.manifest["shards"])

    @property
    def level_columns(self) -> tuple[str, ...]:
        """Names of the stored levels, "level_1" and so on. Level 0 is "image"."""
        return tuple(f"level_{m}" for m in range(1, len(self.manifest["level_sizes"])))

    def read_shard(self, i: int, columns: Sequence[str] | None = None) -> Columns:
        """Return columns of one shard, all if None, as read-only views of one buffer.

        Raises:
            DataError: the file is missing, or differs from its checksum.
        """
        table = pq.read_table(
            pa.BufferReader(self._checked_bytes(i)),
            columns=None if columns is None else list(columns),
            use_threads=False,
        )
        return {name: to_numpy(table[name]) for name in table.column_names}

    def iter_shards(self, columns: Sequence[str] | None = None) -> Iterator[Columns]:
        """Yield the shards in order, one in memory at a time. Raises as :meth:`read_shard`."""
        for i in range(self.num_shards):
            yield self.read_shard(i, columns)

    def read_rows(self, start: int, stop: int, columns: Sequence[str] | None = None) -> Columns:
        """Return rows start..stop-1 of the set, across shards, as writable copies.

        Raises:
            IndexError: there are no such rows.
            DataError: as :meth:`read_shard`.
        """
        if not 0 <= start < stop <= self.num_rows:
            raise IndexError(f"rows {start}..{stop - 1} are not all in 0..{self.num_rows - 1}")
        per_shard = int(self.manifest["rows_per_shard"])
        parts = []
        for i in range(start // per_shard, (stop - 1) // per_shard + 1):
            rows = slice(max(start - i * per_shard, 0), stop - i * per_shard)
            parts.append({name: values[rows] for name, values in self.read_shard(i, columns).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def verify(self) -> None:
        """Compare every file with its checksum. Raises DataError."""
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(self._checked_bytes, range(self.num_shards)):
                pass

    def _checked_bytes(self, i: int) -> bytes:
        """Return a shard's file. Raises DataError if it differs from its checksum."""
        entry = self.manifest["shards"][i]
        name = f"{self.address}/{entry['name']}"
        remedy = f"delete {self.storage.uri}/{self.address} and run the same command again to rebuild it"
        if not self.storage.exists(name):
            raise DataError(f"{self.storage.uri}/{name} is missing; {remedy}")
        data = self.storage.read_bytes(name)
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise DataError(f"{self.storage.uri}/{name} is damaged: it differs from its checksum; {remedy}")
        return data


def load(storage: Storage, address: str) -> ShardSet:
    """Return the finished shard set at an address.

    Raises:
        DataError: there is none, or it is of another version of this program.
    """
    name = f"{address}/{MANIFEST}"
    if not storage.exists(name):
        raise DataError(
            f"{storage.uri}/{name} does not exist: the pyramids are not (wholly) built; run the pyramids stage"
        )
    manifest = storage.read_json(name)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{storage.uri}/{name} is of format version {version}, this program reads {FORMAT_VERSION}; delete "
            f"{storage.uri}/{address} and run the pyramids stage again"
        )
    return ShardSet(storage, address, manifest)


def tensor_array(values: np.ndarray) -> pa.ExtensionArray:
    """Return values [n, ...] as Arrow's fixed-shape tensors, without a copy.

    from_numpy_ndarray guesses the order of axes from strides, and so permutes axes of length 1.
    """
    flat = pa.array(values.reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    kind = pa.fixed_shape_tensor(flat.type, values.shape[1:], dim_names=["channel", "row", "column"])
    return pa.ExtensionArray.from_storage(kind, storage)


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as an array [n, ...], without a copy if it is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values: np.ndarray = (
        array.to_numpy_ndarray() if isinstance(array, pa.FixedShapeTensorArray) else array.to_numpy(zero_copy_only=True)
    )
    return values
