"""Stored levels are those of torch-dct, or the build stops."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import DataConfig, PyramidConfig
from components.dct import lowpass_pyramid
from components.errors import DataError
from pipeline.data import pyramids
from pipeline.data.pyramids import build
from pipeline.data.shard_plan import Targets, plan_shard_set
from pipeline.data.shards import MANIFEST, load
from pipeline.runtime.storage import Storage

DATA = DataConfig(train_limit=700, test_limit=130)
SMALL = PyramidConfig(rows_per_shard=100)


def write_shards(storage: Storage, config: PyramidConfig, targets: Targets = "lowpass") -> str:
    """Write the shards of the test split without Ray; build then has only the manifest left to write."""
    plan = plan_shard_set(DATA, config, "test", targets)
    for shard in range(plan.num_shards):
        pyramids.write_shard(storage / plan.address, shard, plan.table(shard))
    return plan.address


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 5e-4), ("float32", 2e-6)])
def test_levels_equal_those_of_torch_dct(tmp_path: Path, dtype: Any, largest: float) -> None:
    config = dataclasses.replace(SMALL, dtype=dtype)
    address = write_shards(Storage(tmp_path), config)
    made = build(DATA, config, Storage(tmp_path), "test")
    assert made.address == address
    assert 0 < made.manifest["torch_dct_difference"] < largest
    assert made.manifest["torch_dct_images"] == pyramids.COMPARED_IMAGES
    # manifests of earlier versions have neither key
    earlier = {key: value for key, value in made.manifest.items() if not key.startswith("torch_dct")}
    (tmp_path / address / MANIFEST).write_text(json.dumps(earlier))
    assert load(Storage(tmp_path), address).manifest == earlier
    assert build(DATA, config, Storage(tmp_path), "test").manifest == earlier


@pytest.mark.parametrize("targets", ["linear", "none"])
def test_only_low_pass_levels_are_compared(tmp_path: Path, targets: Targets) -> None:
    write_shards(Storage(tmp_path), SMALL, targets)
    made = build(DATA, SMALL, Storage(tmp_path), "test", targets=targets)
    assert not any(key.startswith("torch_dct") for key in made.manifest)


DEFECTS: dict[str, Any] = {
    "scaled": lambda image, level: level * 1.002,
    "shifted by a pixel": lambda image, level: level.roll(1, dims=-1),
    "transposed": lambda image, level: level.mT.contiguous(),
    "averaged": lambda image, level: torch.nn.functional.adaptive_avg_pool2d(image, level.shape[-1]),
    "not a number": lambda image, level: torch.full_like(level, torch.nan),
}


@pytest.mark.parametrize("changed", [1, 2])
@pytest.mark.parametrize("defect", DEFECTS)
def test_levels_unlike_those_of_torch_dct_stop_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str, changed: int
) -> None:
    def defective(images: torch.Tensor, sizes: tuple[int, ...], targets: str) -> list[torch.Tensor]:
        levels = lowpass_pyramid(images, sizes)
        levels[changed] = DEFECTS[defect](images, levels[changed])
        return levels

    monkeypatch.setattr("components.dct.target_levels", defective)
    address = write_shards(Storage(tmp_path), SMALL)
    with pytest.raises(
        DataError, match=rf"shard-00000\.parquet: level_{changed} differs from torch-dct's result by"
    ) as caught:
        build(DATA, SMALL, Storage(tmp_path), "test")
    assert f"Delete {tmp_path}/{address} and run the same command again" in str(caught.value)
    assert sorted(os.listdir(tmp_path / address)) == ["shard-00000.parquet", "shard-00001.parquet"]
