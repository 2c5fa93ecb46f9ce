"""A part of a split is a seeded draw over all of it, for every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, write_parquet

from components.config import DataConfig, PyramidConfig
from pipeline.data.pyramids import address_of
from pipeline.data.shard_plan import plan_shard_set
from pipeline.data.sources import base
from pipeline.data.sources import torchvision as sources_torchvision
from pipeline.data.sources.open import open_source
from pipeline.data.splits import draw_order, held_out

ROWS, CLASSES, SIZE = 200, 10, 8
SortedSource = Callable[[], DataConfig]


def pixels(row: int) -> np.ndarray:
    """Return an image whose pixels encode its row."""
    return np.full((SIZE, SIZE), row, np.uint8)


def parquet(path: Path) -> DataConfig:
    """Rows sorted by class, as in many published data sets, 20 of each; two files each, several row groups."""
    for split in ("train", "test"):
        for part in (0, 1):
            rows = range(part * ROWS // 2, (part + 1) * ROWS // 2)
            write_parquet(
                path / f"{split}-{part:05d}-of-00002.parquet",
                [encode(pixels(r)) for r in rows],
                [r * CLASSES // ROWS for r in rows],
                group=30,
            )
    return DataConfig(source=f"parquet:{path}", image_size=SIZE)


def folder(path: Path) -> DataConfig:
    for split in ("train", "test"):
        for row in range(ROWS):
            file = path / split / str(row * CLASSES // ROWS) / f"{row:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(pixels(row)))
    return DataConfig(source=f"folder:{path}", image_size=SIZE)


def torchvision(monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    images = np.stack([pixels(r) for r in range(ROWS)])
    labels = np.arange(ROWS, dtype=np.int64) * CLASSES // ROWS

    class Dataset:
        classes = tuple(map(str, range(CLASSES)))
        data, targets = images, labels

        def __len__(self) -> int:
            return ROWS

    monkeypatch.setattr(sources_torchvision, "open_dataset", lambda *a, **k: Dataset())
    sources_torchvision.load_arrays.cache_clear()
    return DataConfig(source="torchvision:mnist", image_size=SIZE)


@pytest.fixture(params=["parquet", "folder", "torchvision"])
def data(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    if request.param == "torchvision":
        return torchvision(monkeypatch)
    return {"parquet": parquet, "folder": folder}[request.param](tmp_path)


def stored_test_set(data: DataConfig) -> dict[str, np.ndarray]:
    """The test set as attacks see it: shard after shard, each row with its image's first pixel, which names it."""
    plan = plan_shard_set(data, PyramidConfig(rows_per_shard=70), "test", "none")
    tables = [plan.table(i) for i in range(plan.num_shards)]
    return {
        "index": np.concatenate([t["index"].to_numpy() for t in tables]),
        "label": np.concatenate([t["label"].to_numpy() for t in tables]),
        "pixel": np.concatenate([t["image"].combine_chunks().to_numpy_ndarray()[:, 0, 0, 0] for t in tables]),
    }


def test_the_first_test_images_are_of_all_classes(data: DataConfig) -> None:
    stored = stored_test_set(data)
    assert sorted(stored["pixel"]) == list(range(ROWS)), "the test set holds every image once"
    np.testing.assert_array_equal(stored["label"], stored["pixel"].astype(int) * CLASSES // ROWS)
    counts = np.bincount(stored["label"][:60], minlength=CLASSES)
    assert counts.min() >= 1, f"60 test images of {CLASSES} sorted classes: {counts.tolist()}"


def test_limits_draw_over_the_whole_split(data: DataConfig) -> None:
    for split, limit in (("train", "train_limit"), ("test", "test_limit")):
        drawn = []
        for n in (60, 90):
            source = open_source(replace(data, **{limit: n}), split)
            images, labels = source.read(np.arange(source.num_rows))
            source.check_labels()
            assert len(set(images[:, 0, 0, 0])) == source.num_rows == n
            assert set(labels) == set(range(CLASSES)), f"{split}: {n} images are of classes {sorted(set(labels))}"
            drawn.append(set(images[:, 0, 0, 0].tolist()))
        assert drawn[0] < drawn[1], "the draw of 60 is part of the draw of 90"


def test_more_test_images_go_on_from_fewer(data: DataConfig) -> None:
    whole = stored_test_set(data)
    for n in (7, 60):
        limited = stored_test_set(replace(data, test_limit=n))
        for name, values in limited.items():
            np.testing.assert_array_equal(values, whole[name][:n], err_msg=f"test_limit={n}: {name}")
    other = stored_test_set(replace(data, subset_seed=1))
    assert 5 < len(set(other["pixel"][:60]) & set(whole["pixel"][:60])) < 40, "another seed is another draw"


def test_an_unlimited_training_split_keeps_its_order_and_address(tmp_path: Path) -> None:
    data = parquet(tmp_path)
    pyramids = PyramidConfig()
    rows = plan_shard_set(data, pyramids, "train", "none").rows
    assert (np.diff(rows) > 0).all()
    assert address_of(data, pyramids, "train") == address_of(replace(data, subset_seed=1), pyramids, "train")
    for split, changes in (("test", {}), ("train", {"train_limit": 60}), ("validation", {"train_limit": 60})):
        one = replace(data, **changes)
        assert address_of(one, pyramids, split) != address_of(replace(one, subset_seed=1), pyramids, split)


def test_a_limit_moves_no_image_between_training_and_validation(tmp_path: Path) -> None:
    data = replace(parquet(tmp_path), validation_fraction=0.3)

    def numbers(split: base.Split, **changes: int) -> set[int]:
        plan = plan_shard_set(replace(data, **changes), PyramidConfig(), split, "none")
        return set(plan.source.numbers[plan.rows].tolist())

    for split in ("train", "validation"):
        assert numbers(split, train_limit=60) < numbers(split, train_limit=90) < numbers(split)
    # the draw and the validation split are independent: 30 % of the images that are drawn are held
    # out
    assert 15 <= len(numbers("validation", train_limit=90)) <= 40


def test_draw_order() -> None:
    order = draw_order(np.arange(100_000), 0)
    np.testing.assert_array_equal(np.sort(order), np.arange(100_000))
    # rows appended to the split keep the order of the others, and so do rows that are left out
    np.testing.assert_array_equal(order[order < 1000], draw_order(np.arange(1000), 0))
    some = np.sort(order[:5000])
    np.testing.assert_array_equal(some[draw_order(some, 0)], order[:5000])
    # the exact order is part of every stored result: raise DRAW_VERSION where it changes
    assert order[:5].tolist() == [64872, 77960, 69949, 14900, 10960]
    # a draw of 1000 is even over the split (10 parts of 100 expected each) and holds out as many as
    # any other rows
    assert np.bincount(order[:1000] // 10_000).min() > 60
    assert held_out(order[:10_000], 0.1, 0).mean() == pytest.approx(0.1, abs=0.015)
    assert len(set(order[:1000]) & set(draw_order(np.arange(100_000), 1)[:1000])) < 30
