"""The source that a config names, opened and checked."""

from __future__ import annotations

import dataclasses

import numpy as np

from components.config import DataConfig
from components.errors import ConfigError, DataError
from pipeline.data import hub
from pipeline.data.sources.base import Source, Split, absolute_path, split_rows
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.parquet import SAMPLES, open_parquet
from pipeline.data.sources.split_names import WORDS, SourceSplit
from pipeline.data.sources.torchvision import open_torchvision
from pipeline.runtime.user_files import first_names, printable


def open_source(data: DataConfig, split: SourceSplit) -> Source:
    """Open the images of ``data.source`` without reading them, and apply the split's limit.

    A limit of N keeps the first N rows of :func:`pipeline.data.splits.draw_order` over the whole
    split. They keep the source's order and their numbers in the whole split
    (:attr:`Source.numbers`).

    Raises:
        DataError: the directory, the split's files or a column is missing, a Parquet file is
            corrupt, or there is no image.
        ConfigError: there is no such sample or torchvision data set, or its path is not UTF-8.
    """
    kind, _, where = data.source.partition(":")
    source: Source
    refuse_memory(data)
    if kind == "sample":
        if where not in SAMPLES:
            raise ConfigError.of("data.source", data.source, "sample:" + ", sample:".join(SAMPLES))
        source = open_parquet(data, split, "", SAMPLES[where])
    elif kind == "parquet":
        source = open_parquet(data, split, absolute_path(where), "")
    elif kind == "hf":
        # An evaluation needs no training images, which may be a hundred gigabytes.
        only_test = split == "test" and data.test_split.lower() not in WORDS["train"]
        snapshot = hub.snapshot(data.source, without_training=only_test)
        source = open_parquet(data, split, snapshot.directory, "", hub=str(snapshot.address))
    elif kind == "folder":
        source = open_folder(data, split, absolute_path(where))
    else:
        source = open_torchvision(data, split, where)
    limit = data.train_limit if split == "train" else data.test_limit
    if limit and limit < source.num_rows:
        source = source.limited(limit)
    if source.num_rows == 0:
        raise DataError(f"{source.place}: the {split} split has no image; give a --data.source that has some")
    return source


def refuse_memory(data: DataConfig) -> None:
    """Refuse the source that only the record of ``defendpp.evaluate`` has. Raises ConfigError."""
    if data.source.startswith("memory:"):
        raise ConfigError.of(
            "data.source",
            data.source,
            "images on a storage. These were in the memory of a process that called defendpp.evaluate: call it again",
        )


def check_source(data: DataConfig, *, trains: bool = True, attacked: int = 0, workers: int = 1) -> list[str]:
    """Check the data before compute is spent, and describe each split.

    All labels are checked, since this decodes no image, and the first image.

    Args:
        trains: False if nothing is trained, so that the test images are enough.
        attacked: ``evaluation.test_images``.
        workers: ``scaling.workers``; each needs a training and a validation image.

    Returns:
        A line for each split, and one for the attacked test images if these are only a part. It has
        the numbers of images and of classes, and the smallest and the largest class.

    Raises:
        DataError, ConfigError: as :func:`open_source` and :meth:`Source.read`. Also if a file
            cannot be read, the splits' class names differ, or the test images are the training
            images. Also if a class has no image in the whole test split, or in a training split
            without limit, unless ``data.allow_empty_classes``.
    """
    if trains and data.test_split.lower() in WORDS["train"]:
        raise ConfigError.of(
            "data.test_split",
            data.test_split,
            "another split, since models are trained on this one and would be tested on it",
        )
    lines = []
    class_names: dict[str, tuple[str, ...]] = {}
    for split in ("train", "test") if trains else ("test",):
        source = open_source(data, split)
        labels = source.check_labels()
        source.check_files()
        source.read(np.zeros(1, np.int64))
        if not data.allow_empty_classes:
            _check_every_class(source, labels)
        class_names[split] = source.class_names
        parts: tuple[Split, ...] = ("train", "validation") if data.validation_fraction else ("train",)
        for part in parts if split == "train" else ("test",):
            rows = split_rows(source, part)
            if part != "test" and len(rows) < workers:
                raise DataError(
                    f"{source.place}: the {part} split has {len(rows)} images for {workers} training workers, which "
                    "need one each: lower --scaling.workers or change --data.validation-fraction (0: no validation)"
                )
            left_out = f"; {source.left_out}" if source.left_out and part == split else ""
            lines.append(f"{part}: {_describe_classes(source, labels[rows])}{left_out}")
            if part == "test" and 0 < attacked < len(rows):
                lines.append(f"test, attacked: {_describe_classes(source, labels[rows[:attacked]])}")
    unnamed = tuple(map(str, range(data.num_classes)))
    if len(set(class_names.values()) - {unnamed}) > 1:
        differ = [pair for pair in zip(class_names["train"], class_names["test"], strict=True) if pair[0] != pair[1]]
        raise DataError(
            f"{data.source}: the training and the test images name their classes differently: one label is "
            f"{differ[0][0]!r} in train and {differ[0][1]!r} in test; they are not splits of one data set"
        )
    return lines


def _check_every_class(source: Source, labels: np.ndarray) -> None:
    """Refuse a split in which a class has no image, although a limit may leave classes out."""
    data = source.data
    if source.drawn is not None:
        if source.split == "train":
            return
        source = open_source(dataclasses.replace(data, test_limit=0), "test")
        labels = source.labels()
    empty = sorted(set(range(data.num_classes)) - set(labels.tolist()))
    if empty:
        named = first_names([repr(source.class_names[i]) for i in empty])
        raise DataError(
            f"{source.place}: {len(empty)} of {data.num_classes} classes have no image in the {source.split} split "
            f"({named}). Add their images, correct --data.num-classes, or set --data.allow-empty-classes if they are "
            "meant to have none"
        )


def _describe_classes(source: Source, labels: np.ndarray) -> str:
    """Return the number of images, of classes, and the smallest and largest class, in words."""
    classes = source.data.num_classes
    counts = np.bincount(labels, minlength=classes)
    present = np.flatnonzero(counts)
    smallest, largest = present[counts[present].argmin()], present[counts[present].argmax()]
    absent = np.flatnonzero(counts == 0)
    none = f", none of {first_names([source.class_names[i] for i in absent])}" if len(absent) else ""
    return (
        f"{len(labels)} images, {len(present)} of {classes} classes, smallest "
        f"{printable(source.class_names[smallest])} ({counts[smallest]}), largest "
        f"{printable(source.class_names[largest])} ({counts[largest]}){none}"
    )
