"""Sources of images: what they read, how they split, and that each error names file, row and remedy."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import IMAGE, encode, grey, write_parquet
from PIL import Image
from repository import ROOT

from components.config import DataConfig
from components.errors import ConfigError, DataError
from pipeline.data.sources.base import split_rows
from pipeline.data.sources.open import check_source, open_source
from pipeline.data.splits import split_indices, splitmix64

SAMPLE = ROOT / "pipeline" / "data" / "mnist-sample"

ONE = pa.array([{"bytes": b"1", "path": ""}], IMAGE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two training files of 10 and 7 rows and one test file of 5, 28x28 grey, labels row % 10."""
    pixels = grey(22)
    for name, rows in {
        "train-00000-of-00002": range(10),
        "train-00001-of-00002": range(10, 17),
        "test-00000-of-00001": range(17, 22),
    }.items():
        write_parquet(tmp_path / f"{name}.parquet", [encode(pixels[i]) for i in rows], [i % 10 for i in rows])
    return tmp_path


def of(directory: Path, **changes: Any) -> DataConfig:
    return DataConfig(source=f"parquet:{directory}", **changes)


# -- what is read --------------------------------------------------------------------------------


def test_bundled_sample() -> None:
    check_source(DataConfig())
    train, test = open_source(DataConfig(), "train"), open_source(DataConfig(), "test")
    assert (train.num_rows, test.num_rows) == (6000, 1000)
    assert train.class_names == tuple("0123456789")
    images, labels = train.read(np.arange(8))
    assert images.shape == (8, 1, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == [5, 0, 4, 1, 9, 2, 1, 3]  # MNIST's well-known first labels
    assert sum(f.stat().st_size for f in SAMPLE.iterdir()) < 3_000_000


def test_sample_is_the_beginning_of_mnist(shared_data: Path) -> None:
    whole = open_source(of(shared_data / "mnist"), "train")
    rows = np.array([0, 999, 1000, 5999])
    for a, b in zip(whole.read(rows), open_source(DataConfig(), "train").read(rows), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reads_rows_across_files_and_row_groups(directory: Path) -> None:
    source = open_source(of(directory), "train")
    assert source.num_rows == 17
    for rows in (np.arange(17), np.array([3, 4, 9, 10, 16]), np.array([12]), np.array([], np.int64)):
        images, labels = source.read(rows)
        np.testing.assert_array_equal(images[:, 0], grey(22)[rows])
        np.testing.assert_array_equal(labels, rows % 10)
    for bad in ([17], [-1], [3, 2]):
        with pytest.raises(IndexError):
            source.read(np.array(bad))


def test_is_small_when_pickled_and_reads_the_same(directory: Path) -> None:
    source = open_source(of(directory), "train")
    assert len(pickle.dumps(source)) < 2000
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(source)).read(np.arange(5))[0], source.read(np.arange(5))[0]
    )


def test_relative_paths_and_uris(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    relative = open_source(DataConfig(source=f"parquet:{directory.name}"), "test")
    monkeypatch.chdir("/")  # as a worker would be
    assert relative.read(np.arange(5))[1].tolist() == [7, 8, 9, 0, 1]
    assert open_source(DataConfig(source=f"parquet:file://{directory}"), "test").fingerprint == relative.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "channels", "rows"),
    [("mnist", 28, 1, 60_000), ("cifar10", 32, 3, 50_000), ("imagenette", 224, 3, 3000)],
)
def test_shared_data_sets(shared_data: Path, name: str, size: int, channels: int, rows: int) -> None:
    data = of(shared_data / name, image_size=size, channels=channels)
    check_source(data)
    source = open_source(data, "train")
    assert source.num_rows == rows
    assert len(source.class_names) == 10
    images, labels = source.read(np.array([0, 1000, rows - 1]))
    assert images.shape == (3, channels, size, size)
    assert images.std() > 10
    assert ((labels >= 0) & (labels < 10)).all()


MODES: dict[str, Callable[[Image.Image], bytes]] = {
    "L": lambda i: encode(i.convert("L")),
    "1": lambda i: encode(i.convert("1")),
    "LA": lambda i: encode(i.convert("LA")),
    "P": lambda i: encode(i.convert("P")),
    "RGB": lambda i: encode(i),
    "RGBA": lambda i: encode(i.convert("RGBA")),
    "jpeg": lambda i: encode(i, "JPEG"),
    "cmyk": lambda i: encode(i.convert("CMYK"), "JPEG"),
    "webp": lambda i: encode(i, "WEBP", lossless=True),
}


@pytest.mark.parametrize("channels", [1, 3])
def test_mixed_modes(tmp_path: Path, channels: int) -> None:
    pixels = np.zeros((28, 28, 3), np.uint8)
    pixels[:, 14:] = (255, 0, 0)
    image = Image.fromarray(pixels)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [f(image) for f in MODES.values()], range(len(MODES)), "img")
    images = open_source(of(tmp_path, channels=channels), "train").read(np.arange(len(MODES)))[0].astype(int)
    assert images.shape == (len(MODES), channels, 28, 28)
    assert (images[:, :, :, :13] < 30).all()
    for mode, out in zip(MODES, images, strict=True):
        right = out[:, 5, 20].tolist()
        if mode == "1":
            assert set(np.unique(out)) <= {0, 255}
        elif channels == 1 or mode in ("L", "LA"):
            assert right == pytest.approx([76] * channels, abs=4), mode  # ITU-R 601 luma of red
        else:
            assert right == pytest.approx([255, 0, 0], abs=8), mode


def test_folder(tmp_path: Path) -> None:
    pixels = grey(24)
    for i in range(24):
        split, label = ("train", "val")[i >= 18], ("zebra", "ant", "cat")[i % 3]
        path = tmp_path / split / label / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels[i]))
    (tmp_path / "train" / "ant" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "ant" / "notes.txt").write_bytes(b"")
    data = DataConfig(source=f"folder:{tmp_path}", num_classes=3)
    check_source(data)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert (train.num_rows, test.num_rows, train.class_names) == (18, 6, ("ant", "cat", "zebra"))
    for source in (train, test):
        images, labels = source.read(np.arange(source.num_rows))
        for name, image, label in zip(source.names, images, labels, strict=True):
            assert train.class_names[label] == name.split("/")[0]
            np.testing.assert_array_equal(image[0], pixels[int(name[-6:-4])])
    # the first rows are a mixture, else train_limit would take one class alone
    limited = open_source(dataclasses.replace(data, train_limit=9), "train")
    assert limited.num_rows == 9
    assert len(set(limited.read(np.arange(9))[1])) == 3
    before = train.fingerprint
    os.utime(tmp_path / "train" / "cat" / "02.png", (1, 1))
    assert open_source(data, "train").fingerprint != before


def test_torchvision(tmp_path: Path) -> None:
    """Idx files as torchvision keeps them, made here: nothing is downloaded."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = grey(6)
    for name, n in (("train", 6), ("t10k", 4)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            b"".join(v.to_bytes(4, "big") for v in (0x803, n, 28, 28)) + images[:n].tobytes()
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            b"".join(v.to_bytes(4, "big") for v in (0x801, n)) + bytes(range(n))
        )
    data = DataConfig(source="torchvision:mnist", root=str(tmp_path), validation_fraction=0)
    with pytest.raises(DataError, match=r"4 of 10 classes have no image in the train split \('6 - six', "):
        check_source(data)
    with pytest.raises(
        DataError, match=r"torchvision:mnist \(train\) has 10 named classes, but data\.num_classes is 11"
    ):
        check_source(dataclasses.replace(data, num_classes=11))
    data = dataclasses.replace(data, allow_empty_classes=True)
    check_source(data)
    source = open_source(data, "train")
    read, labels = source.read(np.array([1, 5]))
    np.testing.assert_array_equal(read[:, 0], images[[1, 5]])
    assert labels.tolist() == [1, 5]
    assert source.fingerprint != open_source(data, "test").fingerprint
    assert open_source(dataclasses.replace(data, channels=3), "test").read(np.array([2]))[0].shape == (1, 3, 28, 28)
    for change in ({"root": str(tmp_path / "empty")}, {"root": str(tmp_path), "source": "torchvision:cifar10"}):
        with pytest.raises(DataError, match=r"set --data\.download"):
            open_source(dataclasses.replace(data, **change), "train")
    with pytest.raises(ConfigError, match="torchvision:mnist or torchvision:cifar10"):
        open_source(dataclasses.replace(data, source="torchvision:svhn"), "train")
    with pytest.raises(DataError, match=r"28x28 pixels, but data\.image_size is 32"):
        open_source(dataclasses.replace(data, image_size=32), "train").read(np.array([0]))


def test_fingerprint_follows_the_bytes_not_the_place(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(directory, copy)
    before = open_source(of(directory), "train").fingerprint
    assert open_source(of(copy), "train").fingerprint == before
    write_parquet(copy / "train-00001-of-00002.parquet", [encode(i) for i in grey(7, seed=1)], range(7))
    assert open_source(of(copy), "train").fingerprint != before


# -- splits --------------------------------------------------------------------------------------


def test_split_is_a_partition_and_stable() -> None:
    train, held_out = split_indices(np.arange(60_000), 0.1, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(60_000))
    assert len(held_out) == pytest.approx(6000, abs=300)
    # rows added at the end move none of the others
    np.testing.assert_array_equal(split_indices(np.arange(1000), 0.1, 0)[1], held_out[held_out < 1000])
    # a larger share keeps what a smaller one held out
    assert set(held_out) < set(split_indices(np.arange(60_000), 0.2, 0)[1])
    # the exact rows are part of every stored result: they must never change
    assert held_out[:8].tolist() == [1, 18, 25, 27, 43, 47, 58, 73]
    # splitmix64's published first output for seed 0
    assert hex(int(splitmix64(np.zeros(1, np.uint64))[0])) == "0xe220a8397b1dcdaf"


def test_seeds_give_independent_splits() -> None:
    a, b = set(split_indices(np.arange(60_000), 0.1, 0)[1]), set(split_indices(np.arange(60_000), 0.1, 1)[1])
    assert len(a & b) == pytest.approx(600, abs=120)
    # neighbouring seeds must not merely swap neighbouring rows
    assert len({r ^ 1 for r in a} & b) == pytest.approx(600, abs=120)


def test_split_extremes() -> None:
    train, held_out = split_indices(np.arange(100), 0.0, 0)
    assert len(train) == 100
    assert held_out.dtype == np.int64
    assert len(held_out) == 0
    assert [len(x) for x in split_indices(np.arange(0), 0.5, 0)] == [0, 0]


def test_limits_come_before_the_split(directory: Path) -> None:
    data = of(directory, train_limit=12, test_limit=3, validation_fraction=0.5)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert (train.num_rows, test.num_rows) == (12, 3)
    rows = [split_rows(train, split) for split in ("train", "validation")]
    assert sorted(np.concatenate(rows)) == list(range(12))
    with pytest.raises(IndexError):
        train.read(np.array([12]))


def test_empty_split(directory: Path) -> None:
    data = of(directory, validation_fraction=0.0)
    with pytest.raises(DataError, match=r"validation split is empty.*change --data\.validation-fraction"):
        split_rows(open_source(data, "train"), "validation")
    with pytest.raises(DataError, match="split is empty with 1 images"):
        check_source(of(directory, train_limit=1, validation_fraction=0.5))


# -- errors --------------------------------------------------------------------------------------


def test_missing_places(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(of(tmp_path / "nowhere"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file for the train split.*no \.parquet file at all"):
        open_source(of(tmp_path / "empty"), "train")
    (directory / "test-00000-of-00001.parquet").rename(directory / "other.parquet")
    with pytest.raises(DataError, match=r"no file for the test split.*only other\.parquet"):
        open_source(of(directory), "test")
    (directory / "other.parquet").rename(directory / "validation.parquet")
    assert open_source(of(directory), "test").num_rows == 5
    (directory / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 train-\*"):
        open_source(of(directory), "train")
    with pytest.raises(ConfigError, match="sample:mnist"):
        open_source(DataConfig(source="sample:cifar10"), "train")


def test_corrupt_parquet(directory: Path) -> None:
    path = directory / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is not a readable Parquet file.*get it again"):
        open_source(of(directory), "train")
    path.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])  # the footer is whole, a page is not
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet.*(corrupt|cannot be decoded)"):
        open_source(of(directory), "train").read(np.arange(10, 17))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"picture": [b"1"], "label": [0]},
            r"no column of images \('image' or 'img'.* It has picture \(binary\), label",
        ),
        ({"image": [b"1"], "label": [0]}, "column 'image' is binary, not a struct"),
        ({"image": ONE, "size": [0]}, "no column of labels .*--data.label-column"),
        (
            {"image": ONE, "label": ["cat"]},
            "column 'label' is string, not integers; name the column with --data.label-column",
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: " + message):
        open_source(of(tmp_path), "train")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (encode(grey(1)[0])[:300], "cannot be decoded.*truncated or not an image"),
        (encode(grey(1)[0], "JPEG")[:300], "cannot be decoded"),
        (b"no image", "cannot be decoded"),
        (b"", "there is no image"),
        (None, "there is no image"),
        (encode(grey(1, 32)[0]), "32x32 pixels, but data.image_size is 28; set --data.image-size"),
        (encode(grey(1)[0].astype(np.uint16) * 256), r"mode I;16 .*8 bits"),
    ],
)
def test_bad_image_names_file_and_row(directory: Path, bad: bytes | None, message: str) -> None:
    encoded: list[bytes | None] = [encode(i) for i in grey(7)]
    encoded[5] = bad
    write_parquet(directory / "train-00001-of-00002.parquet", encoded, range(7))
    source = open_source(of(directory), "train")
    source.read(np.arange(15))
    with pytest.raises(DataError, match=rf"{directory}/train-00001-of-00002\.parquet row 5: .*{message}"):
        source.read(np.arange(10, 17))


def test_null_struct(directory: Path) -> None:
    table = pa.table({"image": pa.array([None], IMAGE), "label": [0]})
    pq.write_table(table, directory / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="row 0: there is no image"):
        check_source(of(directory))


@pytest.mark.parametrize(("label", "message"), [(10, "label 10 is not in 0..9"), (-1, "label -1"), (None, "missing")])
def test_bad_label_is_found_before_compute(directory: Path, label: int | None, message: str) -> None:
    encoded = [encode(i) for i in grey(7)]
    write_parquet(directory / "train-00001-of-00002.parquet", encoded, [0, 1, 2, 3, 4, label, 6])
    with pytest.raises(DataError, match=rf"train-00001-of-00002\.parquet row 5: .*{message}"):
        check_source(of(directory, allow_empty_classes=True))
    with pytest.raises(DataError, match=rf"row 5: .*{message}"):
        open_source(of(directory), "train").read(np.array([15]))
    if label is not None:  # a row that the limit leaves out is nobody's concern
        limited = of(directory, train_limit=2, validation_fraction=0.0, allow_empty_classes=True)
        assert 15 not in open_source(limited, "train").numbers
        check_source(limited)


def test_folder_errors(tmp_path: Path) -> None:
    def data(**changes: Any) -> DataConfig:
        return DataConfig(source=f"folder:{tmp_path}/d", **changes)

    with pytest.raises(DataError, match="is not a directory"):
        open_source(data(), "train")
    for label in ("a", "b", "c"):
        (tmp_path / "d" / "train" / label).mkdir(parents=True)
    with pytest.raises(DataError, match="no image in"):
        open_source(data(), "train")
    (tmp_path / "d" / "train" / "a" / "1.png").write_bytes(encode(grey(1)[0])[:200])
    with pytest.raises(DataError, match=r"no folder for the test split \(test or "):
        open_source(data(), "test")
    with pytest.raises(DataError, match=r"d/train/a/1\.png \(row 0\): the image cannot be decoded"):
        open_source(data(num_classes=3), "train").read(np.array([0]))
    with pytest.raises(
        DataError, match=r"3 folders, and 2 of them hold no image \(b, c\), but data\.num_classes is 2;"
    ):
        open_source(data(num_classes=2), "train").check_labels()
    for label in ("b", "c"):
        (tmp_path / "d" / "train" / label / "1.png").write_bytes(encode(grey(1)[0]))
    for classes in (2, 10):  # too few folders, too: with weights of 10 classes label 1 need not be folder "b"
        with pytest.raises(
            DataError, match=rf"3 class folders, but data\.num_classes is {classes}; set --data\.num-classes 3"
        ):
            open_source(data(num_classes=classes), "train").check_labels()
    (tmp_path / "d" / "test" / "zebra").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"d/test is not sorted into class folders: it has zebra, of which none is in .*/train"
    ):
        open_source(data(), "test")
    (tmp_path / "d" / "test" / "a").mkdir()
    with pytest.raises(DataError, match=r"d/test: 1 class folder is not in train \(zebra\); remove"):
        open_source(data(), "test")
    with pytest.raises(ConfigError, match="use parquet: for a URI"):
        open_source(DataConfig(source="folder:s3://bucket/x"), "train")
