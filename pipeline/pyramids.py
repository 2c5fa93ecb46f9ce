"""SIGNATURES ONLY for now (being written)."""

from __future__ import annotations
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
import numpy as np
from components.config import DataConfig, PyramidConfig
from pipeline.sources import Split
from pipeline.storage import Storage

Columns = dict[str, np.ndarray]
"""index int64 [n], label int32 [n], image uint8 [n,C,H,W], level_1.. float16|float32 [n,C,h,w]; read-only zero-copy views."""


@dataclass(frozen=True)
class ShardSet:
    storage: Storage  # the run's root storage
    address: str  # "pyramids/<hash>"
    manifest: dict[str, Any]

    @property
    def num_rows(self) -> int: ...
    @property
    def num_shards(self) -> int: ...
    @property
    def shard_rows(self) -> tuple[int, ...]: ...
    @property
    def level_sizes(self) -> tuple[int, ...]:
        """(28, 14, 7); (28,) for targets none"""

    @property
    def targets(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def level_columns(self) -> tuple[str, ...]:
        """("level_1", "level_2")"""

    def read_shard(self, i: int) -> Columns: ...
    def iter_shards(self) -> Iterator[Columns]: ...
    def read_rows(self, start: int, stop: int) -> Columns:
        """Writable copy of rows start..stop-1 in order, across shards."""

    def verify(self) -> None:
        """Checksums of all files. DataError names the file and the remedy."""


def address_of(data: DataConfig, pyramids: PyramidConfig, split: Split) -> str: ...
def load(storage: Storage, address: str) -> ShardSet:
    """DataError: no manifest, another version."""


def build(
    data: DataConfig,
    pyramids: PyramidConfig,
    storage: Storage,
    split: Split,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """progress(images done, images in all); called from another thread."""
