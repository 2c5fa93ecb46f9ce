"""The plan of a shard set: its address, the rows of each shard, and the shard's table."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config import DataConfig, PyramidConfig, level_sizes
from components.fields import content_hash
from pipeline.data.shards import FORMAT_VERSION, tensor_array
from pipeline.data.sources.base import Source, Split, read_rows, split_rows
from pipeline.data.sources.open import open_source
from pipeline.data.splits import DRAW_VERSION
from pipeline.runtime.storage import Storage

SHARD_BYTES = 32 << 20
"""Size of a shard's pixels and levels before compression. Ray Data takes 0.1 to 0.2 s between two
tasks, which must be little beside a task."""
MAX_SHARD_ROWS = 16384
CHUNK_BYTES = 2 << 20
"""Size of the float32 images that are filtered at once. They stay in the processor's cache."""

Targets = Literal["lowpass", "linear", "none"]


@dataclass(frozen=True)
class ShardSetPlan:
    """All that a task needs to compute any shard of a set. Picklable."""

    source: Source
    fingerprint: str
    """The source's, since a task would have to read all files to hash them again."""
    split: Split
    pyramids: PyramidConfig
    rows: np.ndarray
    """Positions in the source of the split's rows, in stored order, int64 [n]."""
    sizes: tuple[int, ...]
    targets: Targets

    @property
    def address(self) -> str:
        """``pyramids/<hash>``."""
        return f"pyramids/{content_hash(self.settings())}"

    def settings(self) -> dict[str, Any]:
        """Return all that determines the bytes of the set, as JSON types."""
        data = self.source.data
        settings: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "source_rows": self.source.num_rows,
            "image_size": data.image_size,
            "channels": data.channels,
            "num_classes": data.num_classes,
            "targets": self.targets,
            "level_sizes": list(self.sizes),
            # Without levels there is no precision.
            "dtype": self.pyramids.dtype if len(self.sizes) > 1 else None,
            "rows_per_shard": self.pyramids.rows_per_shard,
        }
        if data.resize != "none":
            settings["resize"] = data.resize
        # Only the test images and a limited source depend on a draw. Whole training splits, and so
        # the models trained on them, keep their addresses if the draw's version changes.
        if self.split == "test" or self.source.drawn is not None:
            settings["draw"] = {"version": DRAW_VERSION, "seed": data.subset_seed}
        if data.class_order == "number":
            settings["class_order"] = data.class_order
        if self.split != "test":  # The test images do not depend on the validation split.
            settings |= {"validation_fraction": data.validation_fraction, "split_seed": data.split_seed}
        return settings

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-len(self.rows) // self.pyramids.rows_per_shard)

    def shard_rows(self, shard: int) -> np.ndarray:
        """Return the part of ``rows`` that a shard holds."""
        return self.rows[shard * self.pyramids.rows_per_shard : (shard + 1) * self.pyramids.rows_per_shard]

    def missing(self, directory: Storage) -> list[int]:
        """Return the shards that are absent, or not whole after a kill or on a full disk."""
        present = set(directory.list())
        return [i for i in range(self.num_shards) if shard_name(i) not in present or not self._is_whole(directory, i)]

    def _is_whole(self, directory: Storage, shard: int) -> bool:
        """Return whether a shard's file has the tag and the number of rows of this plan."""
        try:
            with pq.ParquetFile(directory.fs.open_input_file(directory.path(shard_name(shard)))) as file:
                tag = (file.schema_arrow.metadata or {}).get(b"defendpp")
                return tag == self.tag(shard) and file.metadata.num_rows == len(self.shard_rows(shard))
        except (pa.ArrowException, OSError):
            return False

    def tag(self, shard: int) -> bytes:
        """Return the schema metadata of a shard: its number and the address of its set."""
        return json.dumps({"address": self.address, "shard": shard}, sort_keys=True).encode()

    def table(self, shard: int) -> pa.Table:
        """Decode a shard's images and compute their levels. Raises as :meth:`Source.read`."""
        images, labels = read_rows(self.source, self.shard_rows(shard))
        columns: dict[str, pa.Array] = {
            "index": pa.array(self.source.numbers[self.shard_rows(shard)]),
            "label": pa.array(labels.astype(np.int32)),
            "image": tensor_array(images),
        }
        for m, level in enumerate(self._levels(images), start=1):
            columns[f"level_{m}"] = tensor_array(level)
        return pa.table(columns).replace_schema_metadata({"defendpp": self.tag(shard)})

    def _levels(self, images: np.ndarray) -> list[np.ndarray]:
        """Return levels 1.. of uint8 images [n,C,W,W], in the stored precision."""
        if len(self.sizes) == 1:
            return []
        _import_torch()
        import torch

        from components.dct import target_levels

        n, channels, size = images.shape[:3]
        levels = [np.empty((n, channels, s, s), np.dtype(self.pyramids.dtype)) for s in self.sizes[1:]]
        chunk = max(1, CHUNK_BYTES // (4 * channels * size * size))
        with _one_thread():
            for start in range(0, n, chunk):
                part = slice(start, start + chunk)
                batch = torch.from_numpy(images[part]).float().div_(255)
                for stored, level in zip(levels, target_levels(batch, self.sizes, self.targets)[1:], strict=True):
                    torch.from_numpy(stored[part]).copy_(level)
        return levels


def plan_shard_set(data: DataConfig, pyramids: PyramidConfig, split: Split, targets: Targets) -> ShardSetPlan:
    """Plan the shard set of a split. Raises as :func:`open_source` and :func:`split_rows`."""
    source = open_source(data, "test" if split == "test" else "train")
    sizes = level_sizes(data.image_size, 1 if targets == "none" else pyramids.levels)
    if pyramids.rows_per_shard == 0:
        stored = np.dtype(pyramids.dtype).itemsize
        row_bytes = data.channels * (sizes[0] ** 2 + stored * sum(size**2 for size in sizes[1:]))
        pyramids = replace(pyramids, rows_per_shard=max(1, min(MAX_SHARD_ROWS, SHARD_BYTES // row_bytes)))
    return ShardSetPlan(source, source.fingerprint, split, pyramids, split_rows(source, split), sizes, targets)


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05d}.parquet"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: a task has one CPU, and the order of sums must not depend on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _import_torch() -> None:
    """Import components.dct in a thread, so that no interrupt can leave torch half imported.

    When a task fails, Ray interrupts the main threads of the others. An interrupted import of torch
    would stay unusable in a worker process that lives on. Other threads are not interrupted.
    """
    thread = threading.Thread(target=importlib.import_module, args=("components.dct",))
    thread.start()
    thread.join()
