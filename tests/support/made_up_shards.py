"""Shards of made-up images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config.data import Shapes
from pipeline.data.shards import FORMAT_VERSION, MANIFEST, tensor_array
from pipeline.runtime.storage import Storage

SHAPES = Shapes(image_size=14, channels=1, num_classes=10, sizes=(14, 7))


class Shards:
    """A shard set in memory."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.num_rows = n
        self.columns: dict[str, np.ndarray] = {
            "index": np.arange(n),
            "image": rng.integers(0, 256, (n, 1, 14, 14), dtype=np.uint8),
            "label": np.arange(n) % 10,
            "level_1": rng.random((n, 1, 7, 7)).astype(np.float16),
        }

    level_columns = ("level_1",)

    def iter_shards(self, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        yield {name: self.columns[name] for name in columns}


def write_shards(root: Storage, address: str, n: int, seed: int = 0) -> None:
    """Write a shard set of images without levels."""
    columns = Shards(n, seed).columns
    label = columns["label"].astype(np.int32)
    file = io.BytesIO()
    table = pa.table({"index": columns["index"], "label": label, "image": tensor_array(columns["image"])})
    pq.write_table(table, file)
    content = file.getvalue()
    root.write_bytes(f"{address}/a.parquet", content)
    shard = {"name": "a.parquet", "rows": n, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"num_rows": n, "rows_per_shard": n, "level_sizes": [SHAPES.image_size], "shards": [shard]}
    root.write_json(f"{address}/{MANIFEST}", {"version": FORMAT_VERSION, **manifest})
