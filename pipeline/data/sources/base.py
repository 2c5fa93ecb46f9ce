"""The base class of all sources of images, and the rows of their splits.

A :class:`Source` is a small picklable description of the training or the test images of a data set.
:meth:`Source.read` decodes the rows of one Ray task's shard.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np

from components.config import DataConfig
from components.errors import ConfigError, DataError
from components.fields import is_text
from pipeline.data.sources.split_names import SourceSplit
from pipeline.data.splits import draw_order, split_indices
from pipeline.runtime.user_files import first_names

Split = Literal["train", "validation", "test"]
"""The logical splits. Train and validation are parts of the source's training images."""
Batch = tuple[np.ndarray, np.ndarray]


def read_rows(source: Source, rows: np.ndarray) -> Batch:
    """Read rows in the given order, although the source reads its files from front to back."""
    order = np.argsort(rows)
    images, labels = source.read(rows[order])
    if (np.diff(order) == 1).all():
        return images, labels
    back = np.argsort(order)
    return images[back], labels[back]


def split_rows(source: Source, split: Split) -> np.ndarray:
    """Return the rows of a split, in the order in which they are stored.

    The training and the validation split keep the source's order: training shuffles them anyway,
    and shards of neighbouring rows read a large source once. The test split is in the order of the
    draw. An evaluation of N images takes its first N rows, which are then a draw over the whole
    split, and its first chunks are the same for every N.

    Args:
        source: the training images (for train and validation) or the test images.

    Returns:
        int64 [n]: positions in the source, 0..num_rows-1.

    Raises:
        DataError: no row is left.
    """
    data = source.data
    if split == "test":
        rows = draw_order(source.numbers, data.subset_seed)
    else:
        trained, validation = split_indices(source.numbers, data.validation_fraction, data.split_seed)
        rows = trained if split == "train" else validation
    if not len(rows):
        raise DataError(
            f"{data.source}: the {split} split is empty with {source.num_rows} images and "
            f"data.validation_fraction {data.validation_fraction}; change --data.validation-fraction or raise "
            "--data.train-limit"
        )
    return rows


def absolute_path(where: str, setting: str = "data.source") -> str:
    """Return a URI as it is, and a path as an absolute one, since Ray's workers run elsewhere."""
    path = where if "://" in where else os.path.abspath(os.path.expanduser(where))
    if not is_text(path):
        raise ConfigError.of(setting, path, "a path in UTF-8; rename the directory of the data, or link to it")
    return path


@dataclass(frozen=True, kw_only=True)
class Source:
    """The training or the test images of a data set. Picklable, small: no pixels."""

    data: DataConfig
    split: SourceSplit
    num_rows: int
    """Images used, after the limit."""
    class_names: tuple[str, ...]
    """Names of labels 0..; the numbers themselves where the source has no names."""
    drawn: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Sorted int64 [num_rows]: numbers, in the whole split, of the rows that a limit has kept.
    None: no limit, all rows."""

    left_out: str = field(default="", compare=False)
    """Files of the split that are no images, in words; empty: none."""

    @property
    def place(self) -> str:
        """Name of this source in messages."""
        return f"{self.data.source} ({self.split})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that changes if images or labels may have changed. Reads all files."""
        raise NotImplementedError

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the rows in the whole split, sorted int64 [num_rows]."""
        return np.arange(self.num_rows, dtype=np.int64) if self.drawn is None else self.drawn

    def limited(self, rows: int) -> Self:
        """Return this source with ``rows`` of its images, drawn by ``data.subset_seed``."""
        first = draw_order(self.numbers, self.data.subset_seed)[:rows]
        return dataclasses.replace(self, num_rows=rows, drawn=self.numbers[np.sort(first)])

    def describe(self) -> dict[str, Any]:
        """Return the source as JSON types, for a manifest or a report."""
        return {
            "source": self.data.source,
            "split": self.split,
            "rows": self.num_rows,
            "class_names": list(self.class_names),
        }

    def labels(self) -> np.ndarray:
        """Return all labels, int64 [num_rows], without reading images. Raises DataError."""
        raise NotImplementedError

    def check_labels(self) -> np.ndarray:
        """Check the number of classes and every label, without reading images.

        Returns:
            The labels, int64 [num_rows].

        Raises:
            DataError: a label is missing or out of range, or the source has names for more or
                fewer classes. The message has file and row.
        """
        self._check_class_count()
        labels = self.labels()
        if len(labels) and (labels < 0).all():
            raise DataError(self._unlabelled())
        self._check_label_range(labels, self._row_place)
        return labels

    def _unlabelled(self) -> str:
        """Return the message for a split without labels, as some public test splits are."""
        return (
            f"{self.place}: all {self.num_rows} labels are negative, which marks images without a label. "
            "Give labelled ones"
        )

    def check_files(self) -> None:
        """Check every file by its entry in the directory, if it has one. Raises DataError."""

    def _row_place(self, position: int) -> str:
        """Return the name of a row in messages: its file and number."""
        return f"{self.place} row {self.numbers[position]}"

    def _check_class_count(self) -> None:
        """Refuse a wrong number of classes, also a smaller one.

        A label is a position: with weights of more classes it would mean another class.
        """
        named = len(self.class_names)
        if named != self.data.num_classes:
            raise DataError(
                f"{self._classes_place} has {named} {self._classes_kind}, but data.num_classes is "
                f"{self.data.num_classes}; set --data.num-classes {named} (weights of another number of classes then "
                f"need --train.replace-head), or give images of all {self.data.num_classes} classes: a label is a "
                "position in the list of classes, which is " + first_names(self.class_names)
            )

    @property
    def _classes_place(self) -> str:
        """Name, in messages, of the place that names the classes."""
        return self.place

    _classes_kind: ClassVar[str] = "named classes"

    def read(self, indices: np.ndarray) -> Batch:
        """Decode some rows.

        Args:
            indices: int64 [n], sorted, each in 0..num_rows-1.

        Returns:
            images uint8 [n,C,H,W] in 0..255 and labels int64 [n], in the order of ``indices``.

        Raises:
            DataError: an image is truncated, of another size or cannot be decoded, or a label is
                out of range. The message has file and row.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices[0] < 0 or indices[-1] >= self.num_rows or (np.diff(indices) < 0).any()):
            raise IndexError(f"indices must be sorted and in 0..{self.num_rows - 1}")
        size = self.data.image_size
        images = np.empty((len(indices), self.data.channels, size, size), np.uint8)
        labels = np.empty(len(indices), np.int64)
        self._read_into(indices, images, labels)
        return images, labels

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """Fill ``images`` and ``labels`` with the rows at the sorted positions ``indices``."""
        raise NotImplementedError

    def _check_label_range(self, labels: np.ndarray, where: Callable[[int], str]) -> None:
        """Refuse a label out of range. ``where(i)`` returns the file and row of ``labels[i]``."""
        bad = np.flatnonzero((labels < 0) | (labels >= self.data.num_classes))
        if not len(bad):
            return
        label = labels[bad[0]]
        remedy = "set --data.num-classes to this data set's number of classes, or repair the label"
        if label < 0:
            remedy = (
                f"{(labels < 0).sum()} of {len(labels)} labels are negative, which marks images without a label; "
                "give labelled ones"
            )
        raise DataError(f"{where(int(bad[0]))}: label {label} is not in 0..{self.data.num_classes - 1}; {remedy}")
