"""Where a data set's splits, classes and columns are: the layouts of the Hugging Face Hub and of image folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import IMAGE, PNG, folders, grey, hub, outcome, write_parquet

from components import fields
from components.config import DataConfig, Experiment
from components.errors import ConfigError, DataError
from components.fields import to_dict
from pipeline import run_directory
from pipeline.data.sources.base import Source
from pipeline.data.sources.open import check_source, open_source
from pipeline.recipes.registry import RECIPES


def files_of(source: Source) -> list[str]:
    return [file.name for file in source.files]  # type: ignore[attr-defined]


# -- the Hub's layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["data/train-00000-of-00001.parquet"], ["data/test-00000-of-00001.parquet"]),
        (["data/train-00000-of-00001-0a1b.parquet"], ["data/validation-00000-of-00001-2c3d.parquet"]),
        (["train/0000.parquet", "train/0001.parquet"], ["test/0000.parquet"]),
        (["default/train/0000.parquet"], ["default/test/0000.parquet"]),
        (["data/train/train-00000-of-00001.parquet"], ["data/test/test.parquet"]),
        (["plain/train-00000-of-00001.parquet"], ["plain/test-00000-of-00001.parquet"]),
        (["data/plain/train.parquet"], ["data/plain/test.parquet"]),
        (["data/plain/train/0.parquet"], ["data/plain/val/0.parquet"]),
        (["train.parquet"], ["test/0001.parquet", "test/0002.parquet"]),
        (["Train/0000.parquet"], ["Validation/0000.parquet"]),
        ([f"train/{i}.parquet" for i in range(11)], ["test.parquet"]),
    ],
)
def test_layouts_of_the_hub_are_read(tmp_path: Path, train: list[str], test: list[str]) -> None:
    data = hub(tmp_path, *train, *test)
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    (tmp_path / ".git" / "train").mkdir(parents=True)
    (tmp_path / ".git" / "train" / "0000.parquet").write_bytes(b"")
    check_source(data)
    assert sorted(files_of(open_source(data, "train"))) == sorted(train)
    assert files_of(open_source(data, "test")) == test
    assert open_source(data, "train").read(np.arange(3 * len(train)))[1].tolist() == [0, 1, 2] * len(train)


def test_numbered_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    data = hub(tmp_path, *(f"train/{i}.parquet" for i in range(11)))
    assert files_of(open_source(data, "train")) == [f"train/{i}.parquet" for i in range(11)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain/test.parquet", "resized/test.parquet"], r"in 2 folders, .*: plain, resized\. .*=?parquet:.*/plain$"),
        (["a/plain/test/0.parquet", "a/small/test/0.parquet"], r"in 2 folders, .*: a/plain, a/small\. "),
        (["data/test.parquet", "data/test/0000.parquet"], r"/data has the split 'test' twice"),
        (["test/0000.parquet", "test/0002.parquet"], r"/test: the numbers of its files have a gap"),
        (["test/0.parquet", "test/00.parquet"], r"/test: the numbers of its files have a gap"),
        (["test/test-00000-of-00002.parquet"], r"/test: 1 of 2 test-\*-of-\*\.parquet files"),
        (["test/part-0.parquet"], r"/test: part-0\.parquet is not a file of the split 'test', .* or NNNN\.parquet"),
        (["test/0000.parquet", "test/hard.parquet"], r"/test: 0000\.parquet, hard\.parquet are not files"),
        (["a/b/c/test.parquet"], r"no \.parquet file at all, nor have the folders"),
        (["test-0-of-999999999999999.parquet"], r"1 of 999999999999999 "),
        (["train.parquet", "easy.parquet"], r"no file for the test split .*data\.test-split: easy$"),
    ],
)
def test_a_layout_that_is_not_clear_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(hub(tmp_path, *names), "test")


def test_a_configuration_is_chosen_by_its_folder(tmp_path: Path) -> None:
    data = hub(tmp_path, "plain/train/0.parquet", "plain/test/0.parquet", "resized/test/0.parquet")
    assert check_source(replace(data, source=f"parquet:{tmp_path}/plain"))


def test_a_git_lfs_pointer_is_called_so(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    data = hub(tmp_path, "data/train.parquet", "data/test.parquet")
    (tmp_path / "data/test.parquet").write_bytes(pointer)
    with pytest.raises(DataError, match=r"data/test\.parquet is a Git LFS pointer.* `git lfs pull`"):
        check_source(data)
    data = folders(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")
    for name in ("a", "b"):
        (tmp_path / "train" / name / "0.png").write_bytes(pointer)
    with pytest.raises(DataError, match=r"train/[ab]/0\.png .* is a Git LFS pointer.* `git lfs pull`"):
        check_source(data)


# -- columns -------------------------------------------------------------------------------------


def columns(directory: Path, names: Sequence[str], class_labels: Sequence[str] = (), **options: str) -> DataConfig:
    """Write a test file whose columns are images (names that begin with i, j or p), text (t) or integers."""
    images = pa.array([{"bytes": PNG, "path": ""}] * 3, IMAGE)
    values: dict[str, Any] = {"i": images, "j": images, "p": images, "t": pa.array(["a"] * 3)}
    table = pa.table([values.get(name[0], pa.array([0, 1, 2])) for name in names], names=list(names))
    features = {name: {"names": ["a", "b", "c"], "_type": "ClassLabel"} for name in class_labels}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), directory / "test.parquet")
    return DataConfig(source=f"parquet:{directory}", num_classes=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "class_labels", "expected"),
    [
        (["image", "label"], [], ("image", "label")),
        (["img", "labels"], [], ("img", "labels")),
        (["image", "img", "label", "labels"], [], ("image", "label")),
        (["jpg", "cls"], [], ("jpg", "cls")),
        (["image", "width", "height", "fine_label"], [], ("image", "fine_label")),
        (["photo", "width", "species"], ["species"], ("photo", "species")),
        (["text", "image", "label"], [], ("image", "label")),
    ],
)
def test_usual_columns_are_found(
    tmp_path: Path, names: list[str], class_labels: list[str], expected: tuple[str, str]
) -> None:
    data = columns(tmp_path, names, class_labels)
    check_source(data, trains=False)
    source = open_source(data, "test")
    assert (source.image_column, source.label_column) == expected  # type: ignore[attr-defined]
    assert source.class_names == (("a", "b", "c") if class_labels else ("0", "1", "2"))
    assert source.read(np.arange(3))[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message", "choice"),
    [
        (["img", "fine_label", "coarse_label"], r"'fine_label' and 'coarse_label': .*\.label-column\.", "fine_label"),
        (
            ["image", "width", "height"],
            r"no column of labels .*label-column\. It has image \(struct.*width \(int",
            "width",
        ),
        (["image", "text"], r"no column of labels", ""),
        (["photo", "painting", "label"], r"'photo' and 'painting': more than one .*data\.image-column\.", "painting"),
        (["text", "label"], r"no column of images .*data\.image-column\. It has text \(string\)", ""),
        (["image", "label", "label"], r"more than one column 'label'", ""),
    ],
)
def test_columns_that_are_not_clear_are_named(tmp_path: Path, names: list[str], message: str, choice: str) -> None:
    with pytest.raises(DataError, match=r"test\.parquet: .*" + message):
        check_source(columns(tmp_path, names), trains=False)
    if choice:
        setting = "image_column" if "image-column" in message else "label_column"
        data = columns(tmp_path, names, **{setting: choice})
        check_source(data, trains=False)
        assert getattr(open_source(data, "test"), setting) == choice
    with pytest.raises(DataError, match=r"no column 'none'; it has "):
        check_source(columns(tmp_path, names, image_column="none"), trains=False)


def test_names_of_classes_are_text(tmp_path: Path) -> None:
    data = columns(tmp_path, ["image", "label"])
    table = pq.read_table(tmp_path / "test.parquet")
    info = '{"info": {"features": {"label": {"names": ["\\ud800", "b\\nc", "d"]}}}}'
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "test.parquet")
    assert open_source(data, "test").class_names == ("?", "b\nc", "d")
    assert check_source(data, trains=False)[0].isprintable()
    assert r"which is ?, b\nc, d" in outcome(replace(data, num_classes=4))


def test_another_column_of_labels_is_another_data_set(tmp_path: Path) -> None:
    names = ["image", "fine_label", "coarse_label"]
    prints = {open_source(columns(tmp_path, names, label_column=n), "test").fingerprint for n in names[1:]}
    assert len(prints) == 2
    whole = open_source(columns(tmp_path, ["image", "label"]), "test").fingerprint
    assert open_source(columns(tmp_path, ["image", "label"], label_column="label"), "test").fingerprint != whole


def test_files_of_a_split_have_the_same_columns(tmp_path: Path) -> None:
    data = hub(tmp_path, "train-00000-of-00002.parquet")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [PNG] * 3, range(3), "img")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: its columns .* \('img', 'label'\), those of"):
        open_source(data, "train")


# -- data.test_split -----------------------------------------------------------------------------


def test_the_split_of_test_images_is_chosen_by_name(tmp_path: Path) -> None:
    names = ["train.parquet", "test.parquet", "test_hard.parquet", "val.parquet", "validation/0000.parquet"]
    data = hub(tmp_path, *names)
    with pytest.raises(
        DataError, match=r"test_hard\.parquet is not a file of the split .*data\.test-split: test, test_hard$"
    ):
        check_source(data)
    for split, file in (*((name.split(".")[0].split("/")[0], name) for name in names[1:]), ("VAL", "val.parquet")):
        chosen = replace(data, test_split=split)
        check_source(chosen)
        assert files_of(open_source(chosen, "test")) == [file]
        assert files_of(open_source(chosen, "train")) == ["train.parquet"]
    with pytest.raises(
        DataError, match=r"no file for the test split \(dev\.parquet.*data\.test-split: test, test_hard, "
    ):
        check_source(replace(data, test_split="dev"))


def test_any_folder_is_the_test_split_where_it_is_named(tmp_path: Path) -> None:
    names = [f"{split}/{label}/0.png" for split in ("train", "test", "val", "validation", "held out") for label in "ab"]
    data = folders(tmp_path, *names)
    for split in ("", "test", "val", "VALIDATION", "held out"):
        check_source(replace(data, test_split=split))
        directory = open_source(replace(data, test_split=split), "test").directory  # type: ignore[attr-defined]
        assert directory == f"{tmp_path}/{split.lower() or 'test'}"
    with pytest.raises(
        DataError, match=r"no folder for the test split \(dev\); there are only held out, test, .*test-split"
    ):
        check_source(replace(data, test_split="dev"))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("split", ["train", "Train"])
def test_models_are_not_tested_on_what_they_are_trained_on(tmp_path: Path, kind: str, split: str) -> None:
    if kind == "folder":
        data = folders(tmp_path, *(f"{s}/{label}/0.png" for s in ("train", "test") for label in "ab"))
    else:
        data = hub(tmp_path, "train.parquet", "test.parquet")
    data = replace(data, test_split=split)
    with pytest.raises(ConfigError, match=r"data\.test_split is '[tT]rain'; it must be another split"):
        check_source(data)
    check_source(data, trains=False)
    assert open_source(data, "test").fingerprint is not None


def test_torchvision_has_its_own_two_splits(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 6), ("t10k", 4)):
        pixels = b"".join(v.to_bytes(4, "big") for v in (0x803, n, 28, 28)) + grey(n).tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(pixels)
        labels = b"".join(v.to_bytes(4, "big") for v in (0x801, n)) + bytes(range(n))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    data = DataConfig(source="torchvision:mnist", root=str(tmp_path), allow_empty_classes=True)
    for split, rows in (("", 4), ("test", 4), ("train", 6)):
        assert open_source(replace(data, test_split=split), "test").num_rows == rows
    with pytest.raises(ConfigError, match=r"data\.test_split is 'val'; it must be train or test"):
        open_source(replace(data, test_split="val"), "test")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0" * 12)
    with pytest.raises(DataError, match=r"torchvision:mnist is not usable in"):
        open_source(data, "test")


def test_an_unlabelled_split_names_those_with_labels(tmp_path: Path) -> None:
    data = hub(tmp_path, "train.parquet", "validation.parquet")
    write_parquet(tmp_path / "test.parquet", [PNG] * 3, [-1] * 3)
    write_parquet(tmp_path / "other.parquet", [PNG] * 3, [-1] * 3)
    message = (
        r"\(test\): all 3 labels are negative, .*data\.test-split to a split that has labels \(validation, train\)"
    )
    for trains in (True, False):
        with pytest.raises(DataError, match=message):
            check_source(data, trains=trains)
    assert "test: 3 images" in check_source(replace(data, test_split="validation"))[1]


def test_where_nothing_is_trained_no_training_images_are_needed(tmp_path: Path) -> None:
    data = folders(tmp_path / "f", "val/a/0.png", "val/b/0.png", "val/b/1.png")
    assert check_source(data, trains=False) == ["test: 3 images, 2 of 2 classes, smallest a (1), largest b (2)"]
    with pytest.raises(DataError, match="no folder for the train split"):
        check_source(data)
    with pytest.raises(DataError, match=r"/val has 2 class folders, but data\.num_classes is 9"):
        check_source(replace(data, num_classes=9), trains=False)
    inside = replace(data, source=f"{data.source}/val")
    with pytest.raises(
        DataError, match=r"If these are classes, use --data\.source folder:.*/f --data\.test-split val$"
    ):
        check_source(inside, trains=False)
    (tmp_path / "f" / "train").mkdir()  # as a download that keeps its archives there leaves it
    (tmp_path / "f" / "train" / "images.tar").write_bytes(b"")
    check_source(data, trains=False)
    check_source(hub(tmp_path / "p", "validation.parquet"), trains=False)


def test_tiny_imagenet_is_called_unsorted(tmp_path: Path) -> None:
    train = [f"train/{label}/images/{label}_0.JPEG" for label in ("n01443537", "n01629819")]
    data = folders(tmp_path, *train, "val/images/val_0.JPEG", "test/images/test_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t0\t1\t1\n")
    for split in ("test", "val"):
        message = (
            rf"/{split} is not sorted into class folders: it has images, of which none is in .*/train\. .*test-split\. "
            r"val/val_annotations\.txt seems"
        )
        with pytest.raises(DataError, match=message) as refused:
            check_source(replace(data, test_split=split))
        assert "num_classes" not in str(refused.value)
    for name in train:
        (tmp_path / name).unlink()
        (tmp_path / name).parent.rmdir()
        (tmp_path / name).parents[1].rmdir()
    with pytest.raises(DataError, match=r"/test is not sorted into class folders: it has images alone"):
        check_source(replace(data, num_classes=200), trains=False)


def test_images_without_class_folders_are_counted(tmp_path: Path) -> None:
    data = folders(tmp_path, "val/0.png", "val/1.png")
    with pytest.raises(DataError, match=r"no image in .*/val/CLASS/ .*; 2 images lie beside the class folders: move"):
        check_source(data, trains=False)
    hub(tmp_path, "test/0000.parquet")
    with pytest.raises(DataError, match=r"Parquet files, which --data\.source parquet:DIR reads"):
        check_source(data, trains=False)


# -- settings and addresses ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist-smoke", "table2-fast"])
def test_defaults_leave_the_addresses_of_runs_as_they_were(name: str) -> None:
    experiment = RECIPES[name].make()
    config = to_dict(experiment)
    for field in ("storage", "tracking_uri", "experiment_name", "register", "description"):
        del config[field]
    for field in ("test_split", "image_column", "label_column"):
        assert config["data"].pop(field) == ""
    for field in ("adversarial_training", "adversarial_loss", "adversarial_beta", "ema_decay"):
        del config["train"][field]
    config["scaling"] = {"workers": config["scaling"]["workers"]}
    assert run_directory.run_address(experiment) == f"runs/{name}-{fields.content_hash(config)}"
    changed: Experiment = replace(experiment, data=replace(experiment.data, test_split="validation"))
    assert run_directory.run_address(changed) != run_directory.run_address(experiment)


# -- any names and labels ------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 240
)
WORDS = st.sampled_from(
    ["test", "Test", "validation", "val", "train", "test_hard", "data", "0000", "test-00000-of-00002"]
)


@settings(max_examples=80)
@example(labels=["a\nb", "\U0001f40c"], split="été\t", test_split="été\t")
@given(labels=st.lists(NAMES, min_size=1, max_size=4), split=WORDS | NAMES, test_split=st.just("") | WORDS | NAMES)
def test_any_names_of_folders_are_read_or_refused(labels: list[str], split: str, test_split: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for label in labels:
            (Path(directory) / split / label).mkdir(parents=True, exist_ok=True)
            (Path(directory) / split / label / f"{label[:20]}.png").write_bytes(PNG)
        data = DataConfig(source=f"folder:{directory}", num_classes=max(2, len(set(labels))), test_split=test_split)
        said = outcome(data)
        hidden = any(name.startswith(".") for name in (split, *labels))
        if (
            len(set(labels)) > 1
            and not hidden
            and test_split == split
            and not any(c.isdigit() for c in "".join(labels))
        ):
            assert said == "read"


@settings(max_examples=80)
@example(names=[("data/", "été\n")], test_split="été\n")
@given(
    names=st.lists(st.tuples(st.just("") | st.just("data/") | WORDS.map(lambda w: w + "/"), WORDS | NAMES), max_size=4),
    test_split=st.just("") | WORDS | NAMES,
)
def test_any_names_of_parquet_files_are_read_or_refused(names: list[tuple[str, str]], test_split: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for folder, name in names:
            path = Path(directory) / f"{folder}{name}.parquet"
            if not path.exists():
                hub(path.parent, path.name)
        data = DataConfig(source=f"parquet:{directory}", num_classes=3, test_split=test_split)
        said = outcome(data)
        if len(names) == 1 and names[0][0] in ("", "data/") and names[0][1] == test_split and test_split[0] != ".":
            assert said == "read" or "-of-" in test_split


@settings(max_examples=80)
@given(
    labels=st.lists(st.none() | st.integers(-2, 4), max_size=6)
    | st.lists(st.none() | st.floats(), max_size=3)
    | st.lists(st.none() | st.text(max_size=3), max_size=3)
    | st.lists(st.booleans(), max_size=3)
    | st.lists(st.integers(2**63, 2**64 - 1), max_size=3)
    | st.lists(st.lists(st.integers(0, 2), max_size=2), max_size=3)
)
def test_any_labels_are_read_or_refused(labels: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        large = any(type(label) is int and label >= 2**63 for label in labels)
        column = pa.array(labels, pa.uint64() if large else None)
        table = pa.table({"image": pa.array([{"bytes": PNG, "path": ""}] * len(labels), IMAGE), "label": column})
        pq.write_table(table, f"{directory}/test.parquet", row_group_size=2)
        said = outcome(DataConfig(source=f"parquet:{directory}", num_classes=3, allow_empty_classes=True))
        good = labels and all(type(label) is int and 0 <= label < 3 for label in labels)
        assert (said == "read") == bool(good), said
