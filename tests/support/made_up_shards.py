"""Shards of made-up images, for one training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from components.config.data import Shapes

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
