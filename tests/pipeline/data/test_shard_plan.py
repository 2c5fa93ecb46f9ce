"""The plan of a shard set: its shards, and the memory that a task takes."""

from __future__ import annotations

import dataclasses
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from image_files import encode, grey, write_parquet

from components.config import DataConfig, PyramidConfig
from components.errors import DataError
from pipeline.data import pyramids
from pipeline.data.pyramids import build
from pipeline.data.shard_plan import plan_shard_set
from pipeline.runtime.storage import Storage

DATA = DataConfig(train_limit=700, test_limit=130)
SMALL = PyramidConfig(rows_per_shard=100)


def test_a_shard_of_other_content_is_not_taken(tmp_path: Path) -> None:
    plan = plan_shard_set(DATA, SMALL, "train", "lowpass")
    other = plan_shard_set(dataclasses.replace(DATA, split_seed=1), SMALL, "train", "lowpass")
    directory = Storage(tmp_path)
    for shard in (0, 1):
        pyramids.write_shard(directory, shard, (plan if shard else other).table(shard))
    assert plan.missing(directory) == [0, *range(2, plan.num_shards)]
    pyramids.write_shard(directory, 1, plan.table(1).slice(0, 50))
    assert 1 in plan.missing(directory)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_empty_split(tmp_path: Path, split: Any) -> None:
    data = DataConfig(train_limit=1, validation_fraction=0.0 if split == "validation" else 0.999999)
    with pytest.raises(DataError, match=f"the {split} split is empty"):
        build(data, SMALL, Storage(tmp_path), split)


def test_memory_follows_the_shard_not_the_data_set(tmp_path: Path) -> None:
    """A task holds one shard and a row group of the source, and the driver some bytes per image."""
    encoded = [encode(i) for i in grey(50)]
    peaks = {}
    for rows in (2000, 16_000):
        directory = tmp_path / str(rows)
        write_parquet(directory / "train.parquet", encoded * (rows // 50), [0] * rows, group=500)
        data = DataConfig(source=f"parquet:{directory}", validation_fraction=0)
        tracemalloc.start()
        plan = plan_shard_set(data, SMALL, "train", "lowpass")
        task = pickle.loads(pickle.dumps(plan))
        arrow = pa.total_allocated_bytes()
        for shard in (0, plan.num_shards - 1):
            table = task.table(shard)
            arrow = max(arrow, pa.total_allocated_bytes())
            del table
        peaks[rows] = tracemalloc.get_traced_memory()[1] + arrow
        tracemalloc.stop()
    # 14,000 more images of 784 bytes would be 11 MB as pixels alone; 8 bytes of row number each are
    # 0.1 MB, thrice
    assert peaks[16_000] - peaks[2000] < 1_000_000
