"""What is a split's and what only looks like it: files, class folders, classes without images."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import IMAGE, encode, grey, write_parquet

from components.config import DataConfig
from components.errors import DataError
from pipeline.data.sources import base
from pipeline.data.sources.open import check_source, open_source
from pipeline.data.splits import draw_order, split_indices

PNG = encode(grey(1)[0])


def put(directory: Path, *names: str, labels: Sequence[int] = range(10)) -> DataConfig:
    """Write Parquet files of ten images, one of each class unless ``labels`` says otherwise."""
    for name in names:
        write_parquet(directory / name, [PNG] * len(labels), list(labels))
    return DataConfig(source=f"parquet:{directory}", validation_fraction=0.0)


def images(directory: Path, *names: str) -> DataConfig:
    """Write image files at ``names`` below ``train`` and ``test``."""
    for split in ("train", "test"):
        for name in names:
            (directory / split / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / split / name).write_bytes(PNG)
    classes = len({name.partition("/")[0] for name in names})
    return DataConfig(source=f"folder:{directory}", num_classes=classes, validation_fraction=0.0)


# -- Parquet files -------------------------------------------------------------------------------


def test_a_shard_with_a_hash_in_its_name_is_missed(tmp_path: Path) -> None:
    data = put(tmp_path, "train-00000-of-00003-1359597a978bc4fa.parquet", "train-00002-of-00003-77aa.parquet")
    with pytest.raises(DataError, match=r"2 of 3 train-\*-of-\*\.parquet files .*get the missing"):
        open_source(data, "train")
    put(tmp_path, "train-00001-of-00003-8f2c.parquet")
    assert open_source(data, "train").num_rows == 30
    put(tmp_path, "train-00001-of-00003.parquet")
    with pytest.raises(
        DataError, match=r"00001-of-00003-8f2c\.parquet and .*00001-of-00003\.parquet are the same part"
    ):
        open_source(data, "train")


@pytest.mark.parametrize(
    ("names", "strange"),
    [
        (["test.parquet", "test_corrupted.parquet"], r"test_corrupted\.parquet is not a file of the split 'test'"),
        (
            ["test-00000-of-00001.parquet", "test_corrupted-00000-of-00001.parquet"],
            r"test_corrupted-00000-of-00001\.parquet is not a file",
        ),
        (["test-00000-of-00001.parquet", "test.10pct-00000-of-00001.parquet"], r"test\.10pct-.* is not a file"),
        (["test.parquet", "test2.parquet"], r"test2\.parquet is not a file"),
        (["test.parquet", "test-hard.parquet"], r"test-hard\.parquet is not a file"),
        (["test_hard.parquet", "validation.parquet"], r"test_hard\.parquet is not a file"),
        (["test.parquet", "test-00000-of-00001.parquet"], "are not one set of files"),
        (["test-00000-of-00001.parquet", "test-00000-of-00002.parquet"], "are not one set of files"),
        (["test-00000-of-00002.parquet", "test-00002-of-00002.parquet"], r"2 of 2 test-\*.* get the missing"),
        (["val.parquet", "validation.parquet"], "has 'val' and 'validation', and each may be the test split"),
        (["test.parquet", "TEST.parquet"], "has 'TEST' and 'test', and each may be the test split"),
        (["mnist-test-00000-of-00001.parquet", "cifar-test.parquet"], "no file for the test split"),
    ],
)
def test_another_split_is_named_and_not_merged(tmp_path: Path, names: list[str], strange: str) -> None:
    with pytest.raises(DataError, match=strange):
        open_source(put(tmp_path, *names), "test")


@pytest.mark.parametrize(
    "names",
    [
        ["test.parquet", "validation.parquet", "val_extra.parquet", "testing.parquet", "._test.parquet"],
        ["Test.parquet", "validation.parquet"],
        ["TEST-00001-OF-00001.PARQUET"],
        ["validation-00000-of-00001-0a1b.parquet"],
    ],
)
def test_a_split_beside_others_is_taken_alone(tmp_path: Path, names: list[str]) -> None:
    source = open_source(put(tmp_path, *names), "test")
    assert source.num_rows == 10
    assert [file.name for file in source.files] == names[:1]  # type: ignore[attr-defined]


def put_named(path: Path, names: Sequence[str]) -> None:
    """Write a Parquet file of ten images whose metadata name its classes."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table({"image": pa.array([{"bytes": PNG, "path": ""}] * 10, IMAGE), "label": list(range(10))})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


@pytest.mark.parametrize("classes", [9, 11, 1000])
def test_a_file_that_names_another_number_of_classes_is_refused(tmp_path: Path, classes: int) -> None:
    for split in ("train", "test"):
        put_named(tmp_path / f"{split}.parquet", "abcdefghij")
    data = DataConfig(source=f"parquet:{tmp_path}", num_classes=classes, allow_empty_classes=True)
    message = rf"10 named classes, but data\.num_classes is {classes}; set --data\.num-classes 10"
    with pytest.raises(DataError, match=message):
        check_source(data, trains=False)
    with pytest.raises(DataError, match=message):
        open_source(data, "test").read(np.arange(1))
    check_source(replace(data, num_classes=10), trains=False)


def test_files_that_name_their_classes_differently_are_refused(tmp_path: Path) -> None:
    put_named(tmp_path / "train.parquet", "abcdefghij")
    put_named(tmp_path / "test.parquet", "abcdefghji")
    data = DataConfig(source=f"parquet:{tmp_path}", validation_fraction=0.0)
    with pytest.raises(DataError, match="one label is 'i' in train and 'j' in test"):
        check_source(data)
    put(tmp_path, "test.parquet")  # without names it contradicts none
    check_source(data)
    put_named(tmp_path / "validation-00000-of-00002.parquet", "abcdefghij")
    put_named(tmp_path / "validation-00001-of-00002.parquet", "klmnopqrst")
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"validation-00001-of-00002\.parquet: its classes are not those of"):
        open_source(data, "test")


# -- classes without images ----------------------------------------------------------------------


def test_a_class_without_a_test_image_is_refused_unless_allowed(tmp_path: Path) -> None:
    data = put(tmp_path, "train.parquet")
    put(tmp_path, "test.parquet", labels=[0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    for trains in (True, False):
        with pytest.raises(DataError, match=r"\(test\): 1 of 10 classes .* \('9'\).*--data\.allow-empty-classes"):
            check_source(data, trains=trains)
    # a class that the labels start after is the same fault: labels 1..10 read as 0..10
    put(tmp_path, "test.parquet", labels=range(1, 11))
    with pytest.raises(DataError, match=r"1 of 11 classes have no image in the test split \('0'\)"):
        check_source(replace(data, num_classes=11), trains=False)
    # what a limit leaves out is printed, not refused; what the whole split lacks is refused under a
    # limit, too
    put(tmp_path, "test.parquet")
    assert "8 of 10 classes" in check_source(replace(data, test_limit=8), trains=False)[0]
    put(tmp_path, "test.parquet", labels=[0] * 20)
    with pytest.raises(DataError, match="9 of 10 classes have no image"):
        check_source(replace(data, test_limit=8), trains=False)
    (line,) = check_source(replace(data, allow_empty_classes=True), trains=False)
    assert line == "test: 20 images, 1 of 10 classes, smallest 0 (20), largest 0 (20), none of 1, 2, 3, 4, 5, ..."


def test_negative_labels_are_called_unlabelled(tmp_path: Path) -> None:
    data = put(tmp_path, "test.parquet", labels=[-1] * 10)
    with pytest.raises(DataError, match=r"\(test\): all 10 labels are negative, which marks images without a label"):
        check_source(data, trains=False)
    put(tmp_path, "test.parquet", labels=[*range(10), -1])
    with pytest.raises(DataError, match=r"row 10: label -1 .*1 of 11 labels are negative"):
        check_source(data, trains=False)


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    """A class of .heic files would otherwise be a class without images, or with fewer, without a word."""
    data = images(tmp_path, "a/0.png", "b/0.png")
    for name in ("a/1.heic", "a/2.HEIC", "a/notes", "stray.png", ".hidden.png", "a/.DS_Store"):
        (tmp_path / "test" / name).write_bytes(PNG)
    train, test = check_source(data)
    assert "left out" not in train
    assert test.endswith("; 4 files left out (.heic 2, .png beside the class folders 1, without suffix 1)")


def test_another_list_of_classes_is_another_training_set(tmp_path: Path) -> None:
    """Labels are positions: an empty class that moves them must not leave the address as it was."""
    prints = []
    for empty in ("b", "d"):
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        images(tmp_path, "a/0.png", "c/0.png")
        for name in ("a", "c"):
            os.utime(tmp_path / "train" / name / "0.png", (0, 0))
        (tmp_path / "train" / empty).mkdir()
        data = DataConfig(source=f"folder:{tmp_path}", num_classes=3, allow_empty_classes=True)
        prints.append(open_source(data, "train").fingerprint)
    assert prints[0] != prints[1]


def test_a_class_folder_without_an_image_is_refused_unless_allowed(tmp_path: Path) -> None:
    data = images(tmp_path, "a/0.png", "b/notes.txt", "c/0.png")
    with pytest.raises(DataError, match=r"\(train\): 1 of 3 classes have no image in the train split \('b'\)"):
        check_source(data)
    (tmp_path / "train" / "b" / "0.PNG").write_bytes(PNG)
    (tmp_path / "test" / "b" / ".hidden.png").write_bytes(PNG)
    with pytest.raises(DataError, match=r"\(test\): 1 of 3 classes have no image in the test split \('b'\)"):
        check_source(data)
    (tmp_path / "test" / "b" / "notes.txt").unlink()
    (tmp_path / "test" / "b" / ".hidden.png").unlink()
    (tmp_path / "test" / "b").rmdir()
    with pytest.raises(DataError, match=r"\('b'\)"):
        check_source(data)
    lines = check_source(replace(data, allow_empty_classes=True))
    assert lines == [
        "train: 3 images, 3 of 3 classes, smallest a (1), largest a (1); 1 file left out (.txt 1)",
        "test: 2 images, 2 of 3 classes, smallest a (1), largest a (1), none of b",
    ]


def test_a_label_that_moves_changes_the_test_images(tmp_path: Path) -> None:
    """The label of c follows from the training folders, which may have no test images."""
    data = replace(images(tmp_path, "a/0.png", "b/0.png", "c/0.png"), allow_empty_classes=True)
    (tmp_path / "test" / "b" / "0.png").unlink()
    (tmp_path / "test" / "b").rmdir()
    before = open_source(data, "test")
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "d")
    after = open_source(data, "test")
    assert [source.labels()[source.names.index("c/0.png")] for source in (before, after)] == [2, 1]
    assert before.fingerprint != after.fingerprint


# -- class folders -------------------------------------------------------------------------------


def test_images_below_a_class_folder_count(tmp_path: Path) -> None:
    data = images(tmp_path, "cat/0.png", "dog/one/0.png", "dog/one/two/0.png", "dog/.cache/0.png", "dog/.1.png")
    lines = check_source(data)
    assert lines[1] == "test: 3 images, 2 of 2 classes, smallest cat (1), largest dog (2)"
    source = open_source(data, "test")
    images_read, labels = source.read(np.arange(3))
    assert sorted(labels) == [0, 1, 1]
    assert images_read.shape == (3, 1, 28, 28)
    os.symlink(tmp_path / "test" / "cat", tmp_path / "test" / "dog" / "linked")
    assert open_source(data, "test").num_rows == 4
    os.symlink(tmp_path / "test" / "dog", tmp_path / "test" / "dog" / "one" / "loop")
    with pytest.raises(DataError, match=r"dog/one/loop is a link to a folder that it lies in"):
        open_source(data, "test")


def test_folders_of_splits_are_found_in_any_case_and_never_two(tmp_path: Path) -> None:
    data = images(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "test").rename(tmp_path / "Test")
    (tmp_path / "test_hard" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a").mkdir(parents=True)
    assert open_source(data, "test").directory == f"{tmp_path}/Test"  # type: ignore[attr-defined]
    (tmp_path / "Test").rename(tmp_path / "Validation")
    with pytest.raises(DataError, match="has 'Validation' and 'val', and each may be the test split"):
        open_source(data, "test")


@pytest.mark.parametrize("names", [[str(i) for i in range(12)], [f"class{i}" for i in range(12)]])
def test_numbered_class_folders_need_their_order(tmp_path: Path, names: list[str]) -> None:
    data = images(tmp_path, *(f"{name}/x.png" for name in names))
    with pytest.raises(DataError, match=r"label 2 is '\w*10' as text .* and '\w*2' by number .* --data\.class-order"):
        check_source(data)
    for order, expected in (("text", sorted(names)), ("number", names)):
        source = open_source(replace(data, class_order=order), "test")
        assert list(source.class_names) == expected
        labels = dict(zip(source.names, source.read(np.arange(12))[1].tolist(), strict=True))
        assert labels == {f"{name}/x.png": i for i, name in enumerate(expected)}


@pytest.mark.parametrize("names", [["00", "01", "10"], ["1", "2", "3"], ["n01440764", "n02102040"], ["a", "B"]])
def test_class_folders_whose_two_orders_agree_are_not_asked_about(tmp_path: Path, names: list[str]) -> None:
    data = images(tmp_path, *(f"{name}/x.png" for name in names))
    check_source(data)
    assert list(open_source(data, "test").class_names) == sorted(names)


def test_equal_numbers_have_no_order(tmp_path: Path) -> None:
    data = images(tmp_path, "1/x.png", "01/x.png", "2/x.png")
    check_source(data)
    with pytest.raises(DataError, match="class folders '01' and '1' are the same number"):
        open_source(replace(data, class_order="number"), "test")


# -- what is printed -----------------------------------------------------------------------------


def test_a_line_describes_each_split() -> None:
    sample = Path(base.__file__).parents[1] / "mnist-sample"
    label = {s: pq.read_table(sample / f"{s}-00000-of-00001.parquet")["label"].to_numpy() for s in ("train", "test")}
    train, validation = split_indices(np.arange(6000), 0.1, 0)
    parts = {
        "train": label["train"][train],
        "validation": label["train"][validation],
        "test": label["test"],
        "test, attacked": label["test"][draw_order(np.arange(1000), 0)[:60]],
    }
    expected = []
    for name, labels in parts.items():
        counts = Counter(sorted(labels.tolist())).most_common()
        largest, (_, least) = counts[0], counts[-1]
        smallest = min(c for c, n in counts if n == least)
        expected.append(
            f"{name}: {len(labels)} images, 10 of 10 classes, smallest {smallest} ({least}), largest {largest[0]} "
            f"({largest[1]})"
        )
    assert check_source(DataConfig(), attacked=60) == expected
    assert check_source(DataConfig(), trains=False, attacked=1000) == expected[2:3], (
        "all are attacked: one line says it"
    )
