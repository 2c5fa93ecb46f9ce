"""Stored pyramids: exact rows, whole files, continued builds, clear errors. Most of it runs on Ray."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch_dct
from image_files import encode, grey, write_parquet
from repository import ROOT
from storages import FsspecStorage

from components.config import DataConfig, PyramidConfig
from components.dct import linear_pyramid, lowpass_pyramid
from components.errors import DataError
from pipeline.data import pyramids, shards
from pipeline.data.pyramids import address_of, build
from pipeline.data.shards import MANIFEST, ShardSet, load
from pipeline.data.sources import base
from pipeline.data.sources.open import open_source
from pipeline.runtime.storage import Storage, StorageError

DATA = DataConfig(train_limit=700, test_limit=130)
SMALL = PyramidConfig(rows_per_shard=100)
BARE = PyramidConfig(rows_per_shard=20)
"""Without levels: new worker processes need not import torch, which takes most of a build's time
here."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(tmp_path_factory.mktemp("pyramids"))


@pytest.fixture(scope="module")
def train(ray_cluster: str, storage: Storage) -> ShardSet:
    """700 of the sample's training images less those held out, in shards of 100."""
    return build(DATA, SMALL, storage, "train")


def files(storage: Storage, address: str) -> dict[str, bytes]:
    """Return the content of all files of a shard set, hidden ones included."""
    directory = storage.local_root / address
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


# -- content -------------------------------------------------------------------------------------


def shard_rows(shards: ShardSet) -> list[int]:
    return [shard["rows"] for shard in shards.manifest["shards"]]


@pytest.mark.cluster
def test_rows_are_those_of_the_source_in_order(train: ShardSet) -> None:
    source = open_source(DATA, "train")
    rows = base.split_rows(source, "train")
    images, labels = source.read(rows)
    assert train.num_rows == len(rows)
    assert shard_rows(train) == [100] * 6 + [len(rows) - 600]
    columns = train.read_rows(0, train.num_rows)
    assert list(columns) == ["index", "label", "image", "level_1", "level_2"]
    np.testing.assert_array_equal(columns["index"], source.numbers[rows])
    np.testing.assert_array_equal(columns["label"], labels)
    np.testing.assert_array_equal(columns["image"], images)
    assert {k: v.dtype.name for k, v in columns.items()} == train.manifest["columns"]
    assert (train.manifest["level_sizes"], train.level_columns) == ([28, 14, 7], ("level_1", "level_2"))
    assert (train.manifest["targets"], train.manifest["channels"]) == ("lowpass", 1)
    assert train.manifest["source"]["class_names"] == list("0123456789")


@pytest.mark.cluster
def test_stored_levels_equal_recomputed_ones(train: ShardSet) -> None:
    columns = train.read_rows(0, train.num_rows)
    images = torch.from_numpy(columns["image"]).float() / 255
    for m, level in enumerate(lowpass_pyramid(images, (28, 14, 7))[1:], start=1):
        stored = torch.from_numpy(columns[f"level_{m}"])
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), level, rtol=0, atol=5e-4)


@pytest.mark.cluster
def test_read_rows_across_shards(train: ShardSet) -> None:
    whole = train.read_rows(0, train.num_rows)
    for start, stop in [(0, 1), (95, 105), (100, 200), (99, 301), (train.num_rows - 1, train.num_rows)]:
        part = train.read_rows(start, stop, columns=["image", "label"])
        assert list(part) == ["image", "label"]
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][start:stop])
            assert values.flags.writeable
    for start, stop in [(-1, 2), (5, 5), (0, train.num_rows + 1)]:
        with pytest.raises(IndexError):
            train.read_rows(start, stop)
    parts = list(train.iter_shards())
    assert [len(s["index"]) for s in parts] == shard_rows(train)
    np.testing.assert_array_equal(np.concatenate([s["level_2"] for s in parts]), whole["level_2"])


@pytest.mark.cluster
def test_any_arrow_reader_sees_the_shapes(train: ShardSet, storage: Storage) -> None:
    file = pq.ParquetFile(storage.local_root / train.address / "shard-00000.parquet")
    assert file.num_row_groups == 1
    schema = file.schema_arrow
    for name, kind, shape in [
        ("image", pa.uint8(), [1, 28, 28]),
        ("level_1", pa.float16(), [1, 14, 14]),
        ("level_2", pa.float16(), [1, 7, 7]),
    ]:
        column = schema.field(name).type
        assert (column.extension_name, column.value_type, column.shape) == ("arrow.fixed_shape_tensor", kind, shape)
        assert column.permutation in (None, [0, 1, 2])
    assert (schema.field("index").type, schema.field("label").type) == (pa.int64(), pa.int32())


@pytest.mark.cluster
def test_numpy_columns_are_views_not_copies(train: ShardSet) -> None:
    columns = train.read_shard(0)
    for name in ("image", "level_1", "level_2"):
        assert not columns[name].flags.owndata
        assert not columns[name].flags.writeable
        assert columns[name].flags.c_contiguous


@pytest.mark.cluster
def test_splits_share_no_row(train: ShardSet, storage: Storage) -> None:
    held_out = build(DATA, SMALL, storage, "validation")
    test = build(DATA, SMALL, storage, "test")
    assert shard_rows(test) == [100, 30]
    assert len({train.address, held_out.address, test.address}) == 3
    rows = np.concatenate([s.read_rows(0, s.num_rows)["index"] for s in (train, held_out)])
    np.testing.assert_array_equal(np.sort(rows), open_source(DATA, "train").numbers)


@pytest.mark.cluster
@pytest.mark.parametrize(("targets", "dtype"), [("linear", "float32"), ("none", "float16")])
def test_other_targets(ray_cluster: str, storage: Storage, targets: Any, dtype: Any) -> None:
    made = build(DATA, PyramidConfig(dtype=dtype), storage, "test", targets=targets)
    columns = made.read_shard(0)
    if targets == "none":
        assert (made.manifest["level_sizes"], made.level_columns) == ([28], ())
        assert list(columns) == ["index", "label", "image"]
    else:
        levels = linear_pyramid(torch.tensor(columns["image"]).float() / 255, (28, 14, 7))
        for m in (1, 2):
            torch.testing.assert_close(torch.tensor(columns[f"level_{m}"]), levels[m], rtol=0, atol=1e-6)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "size", "channels", "rows"), [("mnist", 28, 1, 300), ("cifar10", 32, 3, 300), ("imagenette", 224, 3, 40)]
)
def test_shared_data_sets(
    ray_cluster: str, storage: Storage, shared_data: Path, name: str, size: int, channels: int, rows: int
) -> None:
    data = DataConfig(source=f"parquet:{shared_data / name}", image_size=size, channels=channels, test_limit=rows)
    made = build(data, PyramidConfig(rows_per_shard=rows - 10), storage, "test")
    columns = made.read_rows(0, rows)
    source = open_source(data, "test")
    np.testing.assert_array_equal(columns["image"], source.read(np.arange(rows))[0][base.split_rows(source, "test")])
    levels = lowpass_pyramid(torch.from_numpy(columns["image"]).float() / 255, tuple(made.manifest["level_sizes"]))
    assert len(levels) == (4 if size == 224 else 3)
    for m, level in enumerate(levels[1:], start=1):
        torch.testing.assert_close(torch.from_numpy(columns[f"level_{m}"]).float(), level, rtol=0, atol=5e-4)


# -- address, reuse, manifest --------------------------------------------------------------------


def test_address_follows_all_that_the_content_follows_from(tmp_path: Path) -> None:
    addresses = {
        address_of(data, config, split)
        for data, config, split in [
            (DATA, SMALL, "train"),
            (DATA, SMALL, "validation"),
            (DATA, SMALL, "test"),
            (dataclasses.replace(DATA, train_limit=699), SMALL, "train"),
            (dataclasses.replace(DATA, validation_fraction=0.2), SMALL, "train"),
            (dataclasses.replace(DATA, split_seed=1), SMALL, "train"),
            (dataclasses.replace(DATA, channels=3), SMALL, "train"),
            (dataclasses.replace(DATA, resize="crop"), SMALL, "train"),
            (DATA, PyramidConfig(), "train"),
            (DATA, dataclasses.replace(SMALL, dtype="float32"), "train"),
            (DATA, dataclasses.replace(SMALL, levels=2), "train"),
        ]
    }
    assert len(addresses) == 11
    linear, none = (address_of(DATA, SMALL, "train", targets=t) for t in ("linear", "none"))  # type: ignore[arg-type]
    assert len({linear, none, *addresses}) == 13
    # images alone have no levels whose precision could count
    assert address_of(DATA, dataclasses.replace(SMALL, dtype="float32"), "train", targets="none") == none
    # and on nothing else: not the place of the files, nor, for the test images, the validation
    # split
    shutil.copytree(ROOT / "pipeline" / "data" / "mnist-sample", tmp_path / "copy")
    copy = dataclasses.replace(DATA, source=f"parquet:{tmp_path / 'copy'}")
    assert address_of(copy, SMALL, "train") in addresses
    assert address_of(dataclasses.replace(DATA, validation_fraction=0.3), SMALL, "test") in addresses
    assert address_of(dataclasses.replace(DATA, train_limit=3), SMALL, "test") in addresses


@pytest.mark.cluster
def test_reuse_does_no_work(train: ShardSet, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramids, "_write", lambda *a: pytest.fail("worked"))
    monkeypatch.setattr(base.Source, "read", lambda *a: pytest.fail("decoded"))
    calls: list[tuple[int, int]] = []
    again = build(DATA, SMALL, storage, "train", progress=lambda *a: calls.append(a))
    assert again.manifest == train.manifest
    assert calls == [(train.num_rows, train.num_rows)]
    assert load(storage, train.address).manifest == train.manifest
    assert pickle.loads(pickle.dumps(train)).read_shard(6)["index"][-1] == train.read_shard(6)["index"][-1]


@pytest.mark.cluster
def test_manifest(train: ShardSet, storage: Storage) -> None:
    manifest = json.loads(files(storage, train.address)[MANIFEST])
    assert manifest["version"] == shards.FORMAT_VERSION
    assert manifest["source"]["source"] == "sample:mnist"
    assert manifest["fingerprint"] == open_source(DATA, "train").fingerprint
    assert sum(s["rows"] for s in manifest["shards"]) == manifest["num_rows"] == train.num_rows
    assert not any("time" in key or "date" in key for key in manifest)
    # float16 rounds values below 1 by 2.4e-4 at most, those that overshoot it by twice that
    assert 1e-5 < manifest["torch_dct_difference"] < 5e-4
    assert manifest["torch_dct_images"] == pyramids.COMPARED_IMAGES
    assert sorted(files(storage, train.address)) == [MANIFEST, *(f"shard-{i:05d}.parquet" for i in range(7))]
    train.verify()


@pytest.fixture
def copy(train: ShardSet, storage: Storage, tmp_path: Path) -> ShardSet:
    """A finished set that a test may damage."""
    shutil.copytree(storage.local_root / train.address, tmp_path / train.address)
    return load(Storage(tmp_path), train.address)


@pytest.mark.cluster
def test_damaged_missing_and_foreign_sets(copy: ShardSet) -> None:
    directory = copy.storage.local_root / copy.address
    shard = directory / "shard-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    for use in (copy.verify, lambda: copy.read_shard(2), lambda: copy.read_rows(250, 251)):
        with pytest.raises(DataError, match=rf"shard-00002\.parquet is damaged.*delete {directory} and run"):
            use()
    copy.read_shard(1)
    shard.unlink()
    with pytest.raises(DataError, match=rf"shard-00002\.parquet is missing; delete {directory}"):
        copy.verify()
    (directory / MANIFEST).write_text(json.dumps({**copy.manifest, "version": 99}))
    with pytest.raises(DataError, match=rf"format version 99, this program reads 1; delete {directory}"):
        load(copy.storage, copy.address)
    (directory / MANIFEST).write_text('{"version": ')
    with pytest.raises(StorageError, match="not valid JSON"):
        load(copy.storage, copy.address)
    (directory / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"manifest\.json does not exist: .*run the pyramids stage"):
        load(copy.storage, copy.address)


# -- kill and continue ---------------------------------------------------------------------------

KILLED = """
import os, sys, time
from pathlib import Path
from components.config import DataConfig, PyramidConfig
from pipeline.runtime import cluster
from pipeline.data.pyramids import build
from pipeline.runtime.storage import Storage

class SlowStorage(Storage):
    # stays half-way through every shard for a while, so that a kill comes in the middle of writes
    def write_bytes(self, name, data):
        if name.endswith(".parquet"):
            os.makedirs(self.root, exist_ok=True)
            half = Path(self.path(f".{name}.half.tmp"))
            half.write_bytes(memoryview(data)[: len(data) // 2])
            time.sleep(0.3)
            half.unlink()
        super().write_bytes(name, data)

cluster.connect()
data = DataConfig(train_limit=700, test_limit=130)
build(data, PyramidConfig(rows_per_shard=20), SlowStorage(sys.argv[2]), "train", targets="none")
"""


@pytest.mark.cluster
def test_killed_and_continued_equals_unbroken(ray_cluster: str, storage: Storage, tmp_path: Path) -> None:
    unbroken = build(DATA, BARE, storage, "train", targets="none")
    directory = tmp_path / unbroken.address
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, ray_cluster, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len(list(directory.glob("shard-*"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Ray ends a dead driver's tasks a moment later
    _wait_until_still(directory)
    finished = {p.name: p.stat().st_ino for p in directory.glob("shard-*.parquet")}
    assert 2 <= len(finished) < unbroken.num_shards
    assert not (directory / MANIFEST).exists()
    # what a power cut or a storage without atomic renames may leave: half a shard under its final
    # name
    broken = directory / f"shard-{unbroken.num_shards - 1:05d}.parquet"
    broken.write_bytes(files(storage, unbroken.address)[broken.name][:5000])
    finished.pop(broken.name, None)
    for leftover in directory.glob(".*"):
        os.utime(leftover, (time.time() - 1000,) * 2)

    calls: list[tuple[int, int]] = []
    build(DATA, BARE, Storage(tmp_path), "train", targets="none", progress=lambda *a: calls.append(a)).verify()
    assert files(Storage(tmp_path), unbroken.address) == files(storage, unbroken.address)
    assert {name: (directory / name).stat().st_ino for name in finished} == finished  # kept, not made again
    assert calls[-1] == (unbroken.num_rows, unbroken.num_rows)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def _wait_until_still(directory: Path) -> None:
    state: Any = None
    for _ in range(100):
        now = sorted((p.name, p.stat().st_size) for p in directory.iterdir())
        if now == state:
            return
        state = now
        time.sleep(1)


@pytest.mark.cluster
def test_only_the_manifest_was_missing(copy: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(copy.storage, copy.address)
    copy.storage.delete(f"{copy.address}/{MANIFEST}")
    monkeypatch.setattr(base.Source, "read", lambda *a: pytest.fail("decoded"))
    build(DATA, SMALL, copy.storage, "train")
    assert files(copy.storage, copy.address) == before


@pytest.mark.cluster
def test_a_difference_from_torch_dct_is_one_error_of_a_whole_build(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    inverse = torch_dct.idct_2d
    monkeypatch.setattr(torch_dct, "idct_2d", lambda coefficients, norm: 1.002 * inverse(coefficients, norm=norm))
    with pytest.raises(DataError, match="level_1 differs from torch-dct's result by"):
        build(DATA, SMALL, Storage(tmp_path), "test")
    assert "".join(capfd.readouterr()) == ""
    assert list(tmp_path.glob("pyramids/*/shard-00000.parquet"))
    assert not list(tmp_path.glob(f"pyramids/*/{MANIFEST}"))


# -- other storages, errors, memory --------------------------------------------------------------


class DefectiveStorage(Storage):
    """A storage whose error is a defect of the program."""

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        _ = 1 // 0


class FullStorage(Storage):
    """A disk that has room for two shards of test_full_disk."""

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        if name.endswith(".parquet") and len(self.list()) >= 2:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as e:
                raise StorageError(f"{self.uri}/{name} could not be written: {e}") from e
        super().write_bytes(name, data)


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["file", "fsspec"])
def test_storage_behind_a_uri(ray_cluster: str, train: ShardSet, storage: Storage, tmp_path: Path, kind: str) -> None:
    target = Storage(f"file://{tmp_path}/a") if kind == "file" else FsspecStorage(f"{tmp_path}/a")
    made = build(DATA, SMALL, target, "train")
    made.verify()
    assert files(Storage(tmp_path / "a"), made.address) == files(storage, train.address)
    np.testing.assert_array_equal(made.read_shard(3)["image"], train.read_shard(3)["image"])


@pytest.mark.cluster
def test_full_disk_keeps_finished_shards(
    ray_cluster: str, train: ShardSet, storage: Storage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StorageError) as caught:
        build(DATA, SMALL, FullStorage(tmp_path), "train")
    assert "No space left on device" in str(caught.value)
    assert "Traceback" not in str(caught.value) + "".join(capfd.readouterr())
    kept = set(os.listdir(tmp_path / train.address))
    assert len(kept) >= 2
    assert MANIFEST not in kept
    build(DATA, SMALL, Storage(tmp_path), "train")
    assert files(Storage(tmp_path), train.address) == files(storage, train.address)


@pytest.mark.cluster
def test_truncated_image_names_file_and_row(
    ray_cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoded: list[bytes | None] = [encode(i) for i in grey(60)]
    assert encoded[37] is not None
    encoded[37] = encoded[37][:400]
    write_parquet(tmp_path / "d" / "train.parquet", encoded, [0] * 60)
    data = DataConfig(source=f"parquet:{tmp_path / 'd'}", validation_fraction=0)
    with pytest.raises(DataError) as caught:
        build(data, PyramidConfig(rows_per_shard=10), Storage(tmp_path), "train")
    assert str(caught.value) == (
        f"{tmp_path}/d/train.parquet row 37: the image cannot be decoded (image file is truncated); it is truncated or "
        "not an image file. Get the file again or remove it"
    )
    assert caught.value.__cause__ is None
    assert "".join(capfd.readouterr()) == ""  # one message, and nothing of Ray's beside it


@pytest.mark.cluster
def test_a_defect_of_ours_keeps_its_traceback(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="in write_bytes"):
        build(DATA, SMALL, DefectiveStorage(tmp_path), "test")
