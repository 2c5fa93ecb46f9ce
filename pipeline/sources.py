"""Where images come from: the bundled sample, Hugging Face Parquet, an image folder, torchvision.

A :class:`Source` is a small picklable description of the training or the test images of one data set. Nothing is decoded
before :meth:`Source.read` asks for certain rows, so that every Ray task reads just the rows of its own shard.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.config import DataConfig
from components.errors import ConfigError, DataError
from components.fields import is_text
from pipeline.decode import decode, fitted
from pipeline.parquet_files import (
    asked,
    class_names_of,
    columns_of,
    file_digest,
    find_parquet,
    open_parquet_file,
    row_counts,
    split_names_in,
)
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_files import Listing, first_names, list_directory, printable, read_file, reason
from pipeline.split_names import WORDS, SourceSplit, choose_word, ordered_classes, split_words
from pipeline.splits import draw_order, split_indices

Split = Literal["train", "validation", "test"]
"""The logical splits; train and validation are both taken out of the source's training images."""
Batch = tuple[np.ndarray, np.ndarray]

SAMPLES = {"mnist": "mnist-sample"}
"""Bundled samples: name -> directory below pipeline/data."""
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


def open_source(data: DataConfig, split: SourceSplit) -> Source:
    """Open the images of ``data.source`` without reading them, and apply ``train_limit`` or ``test_limit``.

    A limit of N keeps the first N rows of :func:`pipeline.splits.draw_order` over the whole split, whatever kind the source is.
    The rows that are left keep the source's order and their numbers in the whole split (:attr:`Source.numbers`).

    Raises:
        DataError: the directory, the split's files or a column is missing, a Parquet file is corrupt, or no image is left.
        ConfigError: there is no such sample or torchvision data set, or its path is not UTF-8.
    """
    kind, _, where = data.source.partition(":")
    source: Source
    if kind == "sample":
        if where not in SAMPLES:
            raise ConfigError.of("data.source", data.source, "sample:" + ", sample:".join(SAMPLES))
        source = _open_parquet(data, split, "", SAMPLES[where])
    elif kind == "parquet":
        source = _open_parquet(data, split, _absolute(where), "")
    elif kind == "folder":
        source = _open_folder(data, split, _absolute(where))
    else:
        source = _open_torchvision(data, split, where)
    limit = data.train_limit if split == "train" else data.test_limit
    if limit and limit < source.num_rows:
        source = source.limited(limit)
    if source.num_rows == 0:
        raise DataError(f"{source.place}: the {split} split has no image; give a data.source that has some")
    return source


def check_source(data: DataConfig, *, trains: bool = True, attacked: int = 0, workers: int = 1) -> list[str]:
    """Find what is wrong with the data before compute is spent, and describe each split.

    All labels are checked, since no image has to be decoded for that; of the images only the first.

    Args:
        trains: False where nothing is trained: the test images are enough.
        attacked: ``evaluation.test_images``.
        workers: ``scaling.workers``, each of which needs an image of the training and the validation split.

    Returns:
        A line per split, and one for the test images that are attacked where these are only a part: images, classes present,
        smallest and largest class.

    Raises:
        DataError, ConfigError: as :func:`open_source` and :meth:`Source.read`; or a file cannot be read; or a class has no image in
            the whole test split, or in a training split without limit, and ``data.allow_empty_classes`` does not allow it; or the
            splits' class names differ; or the test images are those that are trained on.
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
                    f"{source.place}: the {part} split has {len(rows)} images for {workers} training workers, which need one each: "
                    "lower --scaling.workers or change --data.validation-fraction (0: no validation)"
                )
            left_out = f"; {source.left_out}" if source.left_out and part == split else ""
            lines.append(f"{part}: {_describe_classes(source, labels[rows])}{left_out}")
            if part == "test" and 0 < attacked < len(rows):
                lines.append(f"test, attacked: {_describe_classes(source, labels[rows[:attacked]])}")
    unnamed = tuple(map(str, range(data.num_classes)))
    if len(set(class_names.values()) - {unnamed}) > 1:
        differ = [pair for pair in zip(class_names["train"], class_names["test"], strict=True) if pair[0] != pair[1]]
        raise DataError(
            f"{data.source}: the training and the test images name their classes differently: one label is {differ[0][0]!r} in "
            f"train and {differ[0][1]!r} in test; they are not splits of one data set"
        )
    return lines


def _check_every_class(source: Source, labels: np.ndarray) -> None:
    """Refuse a split in which a class has no image. A limit may leave a class out; the split that it is drawn from may not."""
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
            f"{source.place}: {len(empty)} of {data.num_classes} classes have no image in the {source.split} split ({named}). Add "
            "their images, correct data.num_classes, or set data.allow_empty_classes=true if they are meant to have none"
        )


def _describe_classes(source: Source, labels: np.ndarray) -> str:
    """Describe some images by their labels: how many, classes present, smallest and largest class."""
    classes = source.data.num_classes
    counts = np.bincount(labels, minlength=classes)
    present = np.flatnonzero(counts)
    smallest, largest = present[counts[present].argmin()], present[counts[present].argmax()]
    absent = np.flatnonzero(counts == 0)
    none = f", none of {first_names([source.class_names[i] for i in absent])}" if len(absent) else ""
    return (
        f"{len(labels)} images, {len(present)} of {classes} classes, smallest {printable(source.class_names[smallest])} "
        f"({counts[smallest]}), largest {printable(source.class_names[largest])} ({counts[largest]}){none}"
    )


def split_rows(source: Source, split: Split) -> np.ndarray:
    """Return the rows of an opened source that a logical split consists of, in the order in which they are stored.

    The training and the validation split keep the source's order, limited or not: training shuffles them anyway, and shards of
    neighbouring rows read a large source once. The test split is in the order of the draw, limited or not: an evaluation of N
    images takes the first N rows of the stored test set, so these must be a draw over the whole split. Its first chunks of
    examples then are the same for every N.

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
            f"data.validation_fraction={data.validation_fraction}; change data.validation_fraction or raise the limit"
        )
    return rows


def _absolute(where: str, setting: str = "data.source") -> str:
    """Ray's workers have another working directory: a relative path is resolved once, by whoever opens the source."""
    path = where if "://" in where else os.path.abspath(os.path.expanduser(where))
    if not is_text(path):
        raise ConfigError.of(setting, path, "a path in UTF-8; rename the directory of the data, or link to it")
    return path


@dataclass(frozen=True, kw_only=True)
class Source:
    """The training or the test images of a data set. Picklable; what it holds grows with files, not with pixels."""

    data: DataConfig
    split: SourceSplit
    num_rows: int
    """Images used, after the limit."""
    class_names: tuple[str, ...]
    """Names of labels 0..; the numbers themselves where the source has no names."""
    drawn: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Sorted int64 [num_rows]: numbers, in the whole split, of the rows that a limit has kept. None: no limit, all rows."""

    left_out: str = field(default="", compare=False)
    """Files of the split that are no images, in words; empty: none."""

    @property
    def place(self) -> str:
        """What a message calls this source."""
        return f"{self.data.source} ({self.split})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that changes when the source's images or labels may have changed; see each kind. Reads all files."""
        raise NotImplementedError

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the rows in the whole split, sorted int64 [num_rows]."""
        return np.arange(self.num_rows, dtype=np.int64) if self.drawn is None else self.drawn

    def limited(self, rows: int) -> Self:
        """Return the same source with only ``rows`` of its images, drawn over all of them by ``data.subset_seed``."""
        first = draw_order(self.numbers, self.data.subset_seed)[:rows]
        return dataclasses.replace(self, num_rows=rows, drawn=self.numbers[np.sort(first)])

    def describe(self) -> dict[str, Any]:
        """JSON for a manifest or a report."""
        return {
            "source": self.data.source,
            "split": self.split,
            "rows": self.num_rows,
            "class_names": list(self.class_names),
        }

    def labels(self) -> np.ndarray:
        """Return the label of every row, int64 [num_rows], reading no image. Raises DataError where one is missing."""
        raise NotImplementedError

    def check_labels(self) -> np.ndarray:
        """Check the number of classes and every label, reading no image.

        Returns:
            The labels, int64 [num_rows].

        Raises:
            DataError: a label is missing or out of range (names file and row), or the source has names for more or fewer classes.
        """
        self._check_class_count()
        labels = self.labels()
        if len(labels) and (labels < 0).all():
            raise DataError(self._unlabelled())
        self._check_label_range(labels, self._row_place)
        return labels

    def _unlabelled(self) -> str:
        """Say that the split has no labels, as the test splits of some public data sets, and which other ones have some."""
        return f"{self.place}: all {self.num_rows} labels are negative, which marks images without a label. Give labelled ones"

    def check_files(self) -> None:
        """Check that every file can be read, where a look at its entry in the directory tells. Raises DataError."""

    def _row_place(self, position: int) -> str:
        """Return what a message calls a row: its file and number."""
        return f"{self.place} row {self.numbers[position]}"

    def _check_class_count(self) -> None:
        """Refuse fewer classes, too: a label is a position, so with weights of more classes each would mean another class."""
        named = len(self.class_names)
        if named != self.data.num_classes:
            raise DataError(
                f"{self._classes_place} has {named} {self._classes_kind}, but data.num_classes is {self.data.num_classes}; set "
                f"data.num_classes={named} (weights of another number of classes then need train.replace_head), or give images of "
                f"all {self.data.num_classes} classes: a label is a position in the list of classes, which is "
                + first_names(self.class_names)
            )

    @property
    def _classes_place(self) -> str:
        """Return what a message calls the place that names the classes."""
        return self.place

    _classes_kind: ClassVar[str] = "named classes"

    def read(self, indices: np.ndarray) -> Batch:
        """Decode some rows.

        Args:
            indices: int64 [n], sorted, each in 0..num_rows-1.

        Returns:
            images uint8 [n,C,H,W] in 0..255 and labels int64 [n], in the order of ``indices``.

        Raises:
            DataError: an image is truncated, of another size or cannot be decoded, or a label is out of range; names file and row.
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
        """Fill ``images`` and ``labels`` with the rows at sorted positions ``indices`` (of :attr:`numbers`)."""
        raise NotImplementedError

    def _check_label_range(self, labels: np.ndarray, where: Callable[[int], str]) -> None:
        """``where(i)`` says in which file and row ``labels[i]`` is."""
        bad = np.flatnonzero((labels < 0) | (labels >= self.data.num_classes))
        if not len(bad):
            return
        label = labels[bad[0]]
        remedy = "set data.num_classes to this data set's number of classes, or repair the label"
        if label < 0:
            remedy = f"{(labels < 0).sum()} of {len(labels)} labels are negative, which marks images without a label; give labelled ones"
        raise DataError(f"{where(int(bad[0]))}: label {label} is not in 0..{self.data.num_classes - 1}; {remedy}")


# --- Hugging Face image Parquet ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ParquetFile:
    name: str
    row_group_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.row_group_rows)


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """Files of the Hugging Face image layout: a struct column of ``bytes`` and ``path``, and a column of integer labels.

    Its rows are those of the files in the order of their names. A read decompresses the row groups that it touches, so the
    memory it takes is that of one row group (of encoded images).
    """

    uri: str
    """Directory or URI; empty for a bundled sample, which is found again beside this file on whatever node reads."""
    sample: str
    files: tuple[_ParquetFile, ...]
    image_column: str
    label_column: str

    @property
    def storage(self) -> Storage:
        return _opened(self.uri or str(Path(__file__).resolve().parent / "data" / self.sample))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over each file's SHA-256, in order: it changes with any byte, not with names or places."""
        whole = hashlib.sha256()
        # Without these settings the columns follow from the files.
        chosen = f"{self.data.image_column}\0{self.data.label_column}"
        if chosen != "\0":
            whole.update(chosen.encode())
        for file in self.files:
            whole.update(file_digest(self.storage, file.name))
        return whole.hexdigest()

    def labels(self) -> np.ndarray:
        parts = [np.empty(0, np.int64)]
        for file, rows, _ in self._by_file(self.numbers):
            with self._open(file) as parquet:
                parts.append(self._labels(self._columns(parquet, file, [self.label_column]), file, 0, rows))
        return np.concatenate(parts)

    def _unlabelled(self) -> str:
        text = super()._unlabelled()
        if self.split == "train":
            return text
        others = [name for name in split_names_in(self.storage, self.data.test_split) if self._has_labels(name)]
        others.sort(key=lambda name: name.lower() in WORDS["train"])
        return f"{text}: set data.test_split to a split that has labels ({first_names(others)})" if others else text

    def _has_labels(self, split: str) -> bool:
        """Tell whether another split of the same directory has labels."""
        try:
            other = open_source(dataclasses.replace(self.data, test_split=split, test_limit=0), "test")
            return bool((other.labels() >= 0).any())
        except DataError:
            return False

    def _row_place(self, position: int) -> str:
        ((file, rows, _),) = self._by_file(self.numbers[position : position + 1])
        return f"{self._path(file)} row {rows[0]}"

    def _by_file(self, numbers: np.ndarray) -> Iterator[tuple[_ParquetFile, np.ndarray, slice]]:
        """Yield each file that sorted row numbers touch, with the rows of that file and which part of ``numbers`` they are."""
        starts = np.cumsum([0, *(f.num_rows for f in self.files)])
        for number, file in enumerate(self.files):
            low, high = np.searchsorted(numbers, starts[number : number + 2])
            if low < high:
                yield file, numbers[low:high] - starts[number], slice(int(low), int(high))

    def _path(self, file: _ParquetFile) -> str:
        return printable(f"{self.storage.uri}/{file.name}")

    def _open(self, file: _ParquetFile) -> pq.ParquetFile:
        return open_parquet_file(self.storage, file.name)

    def _columns(
        self, parquet: pq.ParquetFile, file: _ParquetFile, names: list[str], group: int | None = None
    ) -> pa.Table:
        rows = file.num_rows if group is None else file.row_group_rows[group]

        def read() -> pa.Table:
            if group is None:
                table = parquet.read(columns=names, use_threads=False)
            else:
                table = parquet.read_row_group(group, columns=names, use_threads=False)
            if table.num_rows != rows:
                raise pa.ArrowInvalid(f"it holds {table.num_rows} rows where its footer says {rows}")
            return table

        part = "" if group is None else f" (row group {group}, from row {sum(file.row_group_rows[:group])} on)"
        return asked(self.storage, f"{self._path(file)}{part}", read)

    def _labels(self, table: pa.Table, file: _ParquetFile, first_row: int, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some rows of the file, int64; ``table`` begins at ``first_row``."""
        column = table[self.label_column].take(pa.array(rows - first_row))
        if column.null_count:
            row = rows[column.is_null().to_pylist().index(True)]
            raise DataError(f"{self._path(file)} row {row}: the label is missing; repair or remove this row")
        return column.to_numpy().astype(np.int64)

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._check_class_count()
        for file, rows, part in self._by_file(self.numbers[indices]):
            self._read_file(file, rows, images[part], labels[part])

    def _read_file(self, file: _ParquetFile, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        starts = np.cumsum([0, *file.row_group_rows])
        with self._open(file) as parquet:
            for group in range(len(file.row_group_rows)):
                low, high = np.searchsorted(rows, starts[group : group + 2])
                if low == high:
                    continue
                table = self._columns(parquet, file, [self.image_column, self.label_column], group)
                wanted = rows[low:high]
                labels[low:high] = self._labels(table, file, int(starts[group]), wanted)
                self._check_label_range(
                    labels[low:high], lambda i, wanted=wanted: f"{self._path(file)} row {wanted[i]}"
                )
                column = table[self.image_column]
                for row, out in zip(wanted, images[low:high], strict=True):
                    encoded = column[int(row - starts[group])]
                    self._decode_row(encoded["bytes"].as_py() if encoded.is_valid else None, file, int(row), out)

    def _decode_row(self, value: bytes | None, file: _ParquetFile, row: int, out: np.ndarray) -> None:
        if not value:
            raise DataError(
                f"{self._path(file)} row {row}: there is no image (no bytes; images outside of the Parquet file are not "
                "read); embed the image or remove this row"
            )
        decode(self.data, value, lambda: f"{self._path(file)} row {row}", out)


@functools.lru_cache(maxsize=8)
def _opened(uri: str) -> Storage:
    """Open a storage once in each process: it is asked for at every row group."""
    return Storage(uri)


def _open_parquet(data: DataConfig, split: SourceSplit, uri: str, sample: str) -> ParquetSource:
    empty = ParquetSource(
        data=data,
        split=split,
        num_rows=0,
        class_names=(),
        uri=uri,
        sample=sample,
        files=(),
        image_column="",
        label_column="",
    )
    storage = empty.storage
    if not storage.exists():
        raise DataError(
            f"{printable(storage.uri)} does not exist; data.source must name a directory with train-*.parquet, test-*.parquet"
        )
    names = find_parquet(storage, split, data.test_split)
    files: list[_ParquetFile] = []
    columns = "", ""
    class_names: tuple[str, ...] = ()
    for name in names:
        where = printable(f"{storage.uri}/{name}")
        with open_parquet_file(storage, name) as parquet:
            files.append(_ParquetFile(name, row_counts(parquet)))
            found = columns_of(parquet.schema_arrow, data, where)
            if len(files) > 1 and found != columns:
                raise DataError(f"{where}: its columns of images and labels are {found}, those of {names[0]} {columns}")
            columns = found
            named = class_names_of(parquet.schema_arrow, columns[1])
            if class_names and named and named != class_names:
                raise DataError(f"{where}: its classes are not those of {names[0]}; they are of two data sets")
            class_names = class_names or named
    return dataclasses.replace(
        empty,
        num_rows=sum(f.num_rows for f in files),
        class_names=class_names or tuple(map(str, range(data.num_classes))),
        files=tuple(files),
        image_column=columns[0],
        label_column=columns[1],
    )


# --- image folder ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """``DIR/train/CLASS/**`` and ``DIR/test/CLASS/**`` (or ``val``, ``validation``, or ``data.test_split``).

    Images of a class may lie in folders below its own, at any depth, as torchvision and timm read them. Labels are the positions
    of the class folders of ``train``, or of the test split where there is no ``train``, in the order of ``data.class_order``. Rows
    are ordered by a hash of ``CLASS/file``, so that every shard holds a mixture of the classes. Files that are not images by their
    suffix are left out, as is all that is hidden.
    """

    directory: str
    """Of this split."""
    classes_directory: str
    """Of the split whose class folders the labels follow."""
    names: tuple[str, ...]
    """CLASS/file of every row; CLASS/FOLDER/file where it lies deeper."""
    _classes_kind: ClassVar[str] = "class folders"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over path, size and mtime of each file: hashing the content would read a large data set twice.

        So touching a file changes it, and an edit that keeps size and mtime goes unseen.
        """
        digest = hashlib.sha256()
        # a label is the position of a training folder, in which there may be no image of this split
        if self.split == "test" or self.data.allow_empty_classes:
            digest.update("\0".join(self.class_names).encode())
        for name in self.names:
            found = self._stat(name)
            digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check_files(self) -> None:
        empty, locked = [], []
        for name in self.names:
            status = self._stat(name)
            if status.st_size == 0:
                empty.append(name)
            # On a network's file system each call takes its time, so only files that are not open to everybody are asked about.
            if not status.st_mode & stat.S_IROTH and not os.access(f"{self.directory}/{name}", os.R_OK):
                locked.append(name)
        for names, fault in ((empty, "is empty"), (locked, "cannot be read by this user")):
            if names:
                raise DataError(_first_of(self.directory, names, f"{fault}; get the file again or remove it"))

    def _stat(self, name: str) -> os.stat_result:
        try:
            return os.stat(f"{self.directory}/{name}")
        except OSError as e:
            raise DataError(
                f"{printable(f'{self.directory}/{name}')} was listed, but cannot be looked at now ({reason(e)}); restore it, or run "
                "again when nothing changes the data set"
            ) from e

    def limited(self, rows: int) -> Self:
        limited = super().limited(rows)
        # The names of the other files would only travel with every task.
        kept = np.searchsorted(self.numbers, limited.numbers)
        return dataclasses.replace(limited, names=tuple(self.names[i] for i in kept))

    def labels(self) -> np.ndarray:
        numbers = {name: i for i, name in enumerate(self.class_names)}
        return np.array([numbers[name.partition("/")[0]] for name in self.names], np.int64)

    @property
    def _classes_place(self) -> str:
        return printable(self.classes_directory)

    def _check_class_count(self) -> None:
        """Do not take a folder without any image for a class: its number would be the advice."""
        if len(self.class_names) != self.data.num_classes:
            empty = [label for label in self.class_names if not _holds_image(self.classes_directory, label)]
            if empty:
                raise DataError(
                    f"{self._classes_place} has {len(self.class_names)} folders, and {len(empty)} of them hold no image "
                    f"({first_names(empty)}), but data.num_classes is {self.data.num_classes}; each folder there must be a class, "
                    "with its images below it"
                )
        super()._check_class_count()

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._check_class_count()
        numbers = {name: i for i, name in enumerate(self.class_names)}
        for position, index in enumerate(indices):
            name = self.names[index]
            labels[position] = numbers[name.partition("/")[0]]
            path = f"{self.directory}/{name}"
            where = f"{printable(path)} (row {index})"
            decode(self.data, read_file(path), lambda where=where: where, images[position])


def _open_folder(data: DataConfig, split: SourceSplit, root: str) -> FolderSource:
    if "://" in root:
        raise ConfigError.of("data.source", data.source, "a local directory for folder:; use parquet: for a URI")
    if not os.path.isdir(root):
        raise DataError(
            f"{printable(root)} is not a directory; data.source must name one with train/CLASS/* and test/CLASS/*"
        )
    top = list_directory(root)
    directory = _split_directory(root, top, split, data.test_split if split == "test" else "")
    listing = list_directory(directory)
    classes_directory, folders = directory, listing.folders
    # The labels of a network follow the training folders. Where nothing is trained there may be none.
    if split == "test" and choose_word(root, "train", [*top.folders, *top.broken]):
        train = _split_directory(root, top, "train")
        if training_folders := list_directory(train).folders:
            classes_directory, folders = train, training_folders
    _check_class_folders(directory, listing, classes_directory, folders)
    files, broken = _files_below(directory, listing.folders)
    if broken := sorted([*listing.broken, *broken]):
        fault = "is neither a file nor a folder (a link to nothing, a pipe, a socket or a device); replace or remove it"
        raise DataError(_first_of(directory, broken, fault))
    if strange := [name for name in (*folders, *files) if not is_text(name)]:
        raise DataError(_first_of(directory, strange, "has a name that is not UTF-8; rename it"))
    suffixes = [_suffix(name) for name in files]
    names = [name for name, suffix in zip(files, suffixes, strict=True) if suffix in _IMAGE_SUFFIXES]
    if not names:
        raise DataError(_no_image(directory, listing))
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    return FolderSource(
        data=data,
        split=split,
        num_rows=len(names),
        class_names=ordered_classes(classes_directory, folders, data.class_order),
        directory=directory,
        classes_directory=classes_directory,
        names=tuple(names),
        left_out=_left_out(listing, suffixes),
    )


def _split_directory(root: str, listing: Listing, split: SourceSplit, test_split: str = "") -> str:
    """Return the folder of a split. ``listing`` is of ``root``, ``test_split`` as of :func:`choose_word`.

    Raises:
        DataError: there is none, or two, or it is a broken link.
    """
    folders = listing.folders
    # Without the broken ones another split would silently take the place of one whose link is broken.
    word = choose_word(root, split, [*folders, *listing.broken], test_split)
    if word in listing.broken:
        raise DataError(f"{printable(f'{root}/{word}')} is no folder but a broken link; replace or remove it")
    if word is None:
        names = test_split or " or ".join(WORDS[split])
        there = f"; there are only {first_names(folders)}" if folders else ""
        remedy = ". Name one of them in data.test_split" if split == "test" and folders else ""
        parent, name = os.path.split(root)
        if name.lower() in split_words():
            remedy = f". If these are classes, set data.source=folder:{printable(parent)} and data.test_split={name}"
        raise DataError(f"{printable(root)}: no folder for the {split} split ({printable(names)}){there}{remedy}")
    return os.path.join(root, word)


def _check_class_folders(directory: str, listing: Listing, classes_directory: str, folders: Sequence[str]) -> None:
    """Refuse folders of a split that are no classes: its own are unknown in the training split, or there is but one in all.

    Args:
        directory: the split's.
        listing: of it.
        classes_directory: that of the split whose folders are the classes.
        folders: these.
    """
    unknown = sorted(set(listing.folders) - set(folders))
    if unknown and len(unknown) < len(listing.folders):
        number = f"{len(unknown)} class folders are" if len(unknown) > 1 else "1 class folder is"
        raise DataError(
            f"{printable(directory)}: {number} not in {printable(os.path.basename(classes_directory))} ({first_names(unknown)}); "
            "remove them or add training images"
        )
    if unknown or len(folders) == 1:
        root = os.path.dirname(directory)
        lists = [
            f"{split}/{name}"
            for split in list_directory(root).folders
            for name in list_directory(f"{root}/{split}").files
            if name.endswith("annotations.txt")
        ]
        text = (
            f"{printable(directory)} is not sorted into class folders: it has {first_names(listing.folders)}"
            + (f", of which none is in {printable(classes_directory)}" if unknown else " alone")
            + ". Move each image into a folder named by its class, or name another split in data.test_split"
        )
        if lists:
            text += f". {printable(lists[0])} seems to name the class of each image, as Tiny ImageNet's does"
        raise DataError(text)


def _no_image(directory: str, listing: Listing) -> str:
    """Say that a split has no image in a class folder, and where images or Parquet files are instead."""
    text = f"{printable(directory)}: no image in {printable(directory)}/CLASS/ ({', '.join(sorted(_IMAGE_SUFFIXES))})"
    beside = [name for name in listing.files if _suffix(name) in _IMAGE_SUFFIXES]
    if beside:
        text += f"; {len(beside)} images lie beside the class folders: move each into the folder of its class"
    elif any(_suffix(name) == ".parquet" for name in listing.files):
        text += "; it has Parquet files, which data.source=parquet:DIR reads"
    return text


def _first_of(directory: str, names: Sequence[str], fault: str) -> str:
    """Return a message about the first of some files that have the same fault, and how many there are."""
    more = f" (the first of {len(names)})" if len(names) > 1 else ""
    return f"{printable(f'{directory}/{names[0]}')}{more} {fault}"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _left_out(listing: Listing, suffixes: Sequence[str]) -> str:
    """Say which files of a split are no images by their suffix, or lie beside the class folders; empty if there are none.

    Args:
        listing: of the split's directory.
        suffixes: of all files in its class folders.
    """
    kinds = [suffix or "without suffix" for suffix in suffixes if suffix not in _IMAGE_SUFFIXES]
    kinds += [f"{_suffix(name) or 'without suffix'} beside the class folders" for name in listing.files]
    if not kinds:
        return ""
    counted = ", ".join(f"{printable(kind)} {count}" for kind, count in sorted(Counter(kinds).items()))
    return f"{len(kinds)} file{'s' if len(kinds) > 1 else ''} left out ({counted})"


def _files_below(directory: str, folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files in ``folders`` and in all folders below them, and what is neither, as paths from ``directory``.

    Raises:
        DataError: a folder cannot be listed, or a link leads back to a folder that it lies in.
    """
    files, broken = [], []
    # Each with its path, free of links, and those of the folders on the way to it. Only a link needs the slow os.path.realpath.
    pending = [(f, os.path.realpath(f"{directory}/{f}"), frozenset[str]()) for f in reversed(folders)]
    while pending:
        folder, path, above = pending.pop()
        if path in above:
            raise DataError(f"{printable(f'{directory}/{folder}')} is a link to a folder that it lies in; remove it")
        listing = list_directory(path)
        files += [f"{folder}/{name}" for name in listing.files]
        broken += [f"{folder}/{name}" for name in listing.broken]
        for name in reversed(listing.folders):
            below = f"{path}/{name}"
            below = os.path.realpath(below) if os.path.islink(below) else below
            pending.append((f"{folder}/{name}", below, above | {path}))
    return files, broken


def _holds_image(directory: str, folder: str) -> bool:
    return any(_suffix(name) in _IMAGE_SUFFIXES for name in _files_below(directory, [folder])[0])


# --- torchvision -----------------------------------------------------------------------------------------------------------

_TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10"}


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(Source):
    """MNIST or CIFAR-10 by torchvision. A process that reads holds the whole split in memory (at most 150 MB)."""

    name: str
    root: str
    train: bool
    """Whether these are torchvision's training images."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all pixels and labels of the split."""
        images, labels = _torchvision_arrays(self.name, self.root, self.train)
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def labels(self) -> np.ndarray:
        labels = _torchvision_arrays(self.name, self.root, self.train)[1]
        return labels[self.numbers]

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        all_images, all_labels = _torchvision_arrays(self.name, self.root, self.train)
        rows = self.numbers[indices]
        labels[:] = all_labels[rows]
        self._check_label_range(labels, lambda i: f"{self.place} row {rows[i]}")
        size = all_images.shape[1]
        if size != self.data.image_size and self.data.resize == "none":
            raise DataError(
                f"{self.place}: images are {size}x{size} pixels, but data.image_size is {self.data.image_size}; "
                "set data.image_size, or data.resize=crop"
            )
        mode = "L" if self.data.channels == 1 else "RGB"
        for position, row in enumerate(rows):
            image = Image.fromarray(all_images[row]).convert(mode)
            array = np.asarray(fitted(image, self.data.image_size))
            images[position] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _open_torchvision(data: DataConfig, split: SourceSplit, name: str) -> TorchvisionSource:
    if name not in _TORCHVISION:
        raise ConfigError.of("data.source", data.source, "torchvision:" + " or torchvision:".join(_TORCHVISION))
    if data.test_split not in ("", "train", "test"):
        raise ConfigError.of("data.test_split", data.test_split, f"train or test, the splits of torchvision:{name}")
    root = _absolute(data.root or "~/.cache/defendpp", "data.root")
    train = "train" in (split, data.test_split)
    dataset = _torchvision_dataset(name, root, train, data.download)
    return TorchvisionSource(
        data=data,
        split=split,
        num_rows=len(dataset),
        class_names=tuple(map(str, dataset.classes)),
        name=name,
        root=root,
        train=train,
    )


def _torchvision_dataset(name: str, root: str, train: bool, download: bool) -> Any:
    import torchvision.datasets  # takes 2.4 s, so only who needs it pays

    try:
        return getattr(torchvision.datasets, _TORCHVISION[name])(root, train=train, download=download)
    # torchvision checks MNIST's files by assertions and lookups
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError, LookupError) as e:
        raise DataError(
            f"torchvision:{name} is not usable in {printable(root)} ({reason(e)}); set data.download=true, or data.root to "
            "where torchvision's files are"
        ) from e


@functools.lru_cache(maxsize=2)
def _torchvision_arrays(name: str, root: str, train: bool) -> Batch:
    """All images uint8 [n,H,W] or [n,H,W,3] and labels int64 [n]; kept, since a worker reads many shards of one set."""
    dataset = _torchvision_dataset(name, root, train, download=False)
    return np.asarray(dataset.data), np.asarray(dataset.targets, np.int64)
