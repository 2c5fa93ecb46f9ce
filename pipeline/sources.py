"""Where images come from: the bundled sample, Hugging Face Parquet, an image folder, torchvision.

A :class:`Source` is a small picklable description of the training or the test images of one data set. Nothing is decoded
before :meth:`Source.read` asks for certain rows, so that every Ray task reads just the rows of its own shard.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.config import DataConfig
from components.errors import ConfigError, DataError
from pipeline.splits import draw_order, held_out
from pipeline.storage import Storage

Split = Literal["train", "validation", "test"]
"""The logical splits; train and validation are both taken out of the source's training images."""
SourceSplit = Literal["train", "test"]
Batch = tuple[np.ndarray, np.ndarray]

SAMPLES = {"mnist": "mnist-sample"}
"""Bundled samples: name -> directory below pipeline/data."""
_FILE_NAMES: dict[SourceSplit, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""What a split's files or folder may be called, the first that is found counts."""
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""PIL modes of 8 bits per channel. PIL would silently clip the deeper ones (I;16, F) to 255, so they are refused."""


def open_source(data: DataConfig, split: SourceSplit) -> Source:
    """Open the images of ``data.source`` without reading them, and apply ``train_limit`` or ``test_limit``.

    A limit of N keeps the first N rows of :func:`pipeline.splits.draw_order` over the whole split, whatever kind the source is.
    The rows that are left keep the source's order and their numbers in the whole split (:attr:`Source.numbers`).

    Raises:
        DataError: the directory, the split's files or a column is missing, a Parquet file is corrupt, or no image is left.
        ConfigError: there is no such sample or torchvision data set.
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


def check_source(data: DataConfig, *, trains: bool = True) -> None:
    """Find what is wrong with the data before compute is spent: files, columns, labels and one image of each split.

    All labels are checked, since no image has to be decoded for that; of the images only the first.

    Args:
        trains: False where nothing is trained: the test images are enough.

    Raises:
        DataError, ConfigError: as :func:`open_source` and :meth:`Source.read`.
    """
    splits: tuple[SourceSplit, ...] = ("train", "test") if trains else ("test",)
    for split in splits:
        source = open_source(data, split)
        source.check_labels()
        source.read(np.zeros(1, np.int64))
        if split == "train":
            for part in ("train", "validation") if data.validation_fraction else ("train",):
                split_rows(source, part)


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
        validation = held_out(source.numbers, data.validation_fraction, data.split_seed)
        rows = np.flatnonzero(validation == (split == "validation")).astype(np.int64)
    if not len(rows):
        raise DataError(
            f"{data.source}: the {split} split is empty with {source.num_rows} images and "
            f"data.validation_fraction={data.validation_fraction}; change data.validation_fraction or raise the limit"
        )
    return rows


def _absolute(where: str) -> str:
    """Ray's workers have another working directory: a relative path is resolved once, by whoever opens the source."""
    return where if "://" in where else os.path.abspath(os.path.expanduser(where))


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

    def check_labels(self) -> None:
        """Check every label, reading no image. Raises DataError naming file and row."""
        raise NotImplementedError

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
        if len(bad):
            raise DataError(
                f"{where(int(bad[0]))}: label {labels[bad[0]]} is not in 0..{self.data.num_classes - 1}; "
                f"set data.num_classes to this data set's number of classes, or repair the label"
            )

    def _decode(self, encoded: bytes | Path, where: Callable[[], str], out: np.ndarray) -> None:
        """Decode an image file into ``out`` uint8 [C,H,W], converted to 1 or 3 channels (transparency is dropped)."""
        size = self.data.image_size
        try:
            with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
                if image.mode not in _MODES:
                    raise DataError(
                        f"{where()}: images of PIL mode {image.mode} (more than 8 bits per channel) are not supported; "
                        "convert the data set to 8 bits"
                    )
                if image.size != (size, size) and self.data.resize == "none":
                    raise DataError(
                        f"{where()}: the image is {image.size[0]}x{image.size[1]} pixels, but data.image_size is {size}; "
                        "set data.image_size, or data.resize=crop"
                    )
                mode = "L" if self.data.channels == 1 else "RGB"
                converted = image if image.mode == mode else image.convert(mode)
                array = np.asarray(_fitted(converted, size))
        # PIL has no common base for what a broken file makes it raise
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as e:
            raise DataError(
                f"{where()}: the image cannot be decoded ({e}); it is truncated or not an image file. "
                "Get the file again or remove this row"
            ) from e
        out[:] = array[None] if self.data.channels == 1 else array.transpose(2, 0, 1)


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size`` pixels (bicubic, antialiased), then the centre cut out."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    shorter = min(width, height)
    # at least size: rounding must not leave a side one pixel short
    scaled = max(size, round(width * size / shorter)), max(size, round(height * size / shorter))
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


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
    """Files of the Hugging Face image layout: struct column ``image`` or ``img`` of ``bytes`` and ``path``, integer ``label``.

    Its rows are those of the files in the order of their names. A read decompresses the row groups that it touches, so the
    memory it takes is that of one row group (of encoded images).
    """

    uri: str
    """Directory or URI; empty for a bundled sample, which is found again beside this file on whatever node reads."""
    sample: str
    files: tuple[_ParquetFile, ...]
    image_column: str

    @property
    def storage(self) -> Storage:
        return Storage(self.uri or Path(__file__).resolve().parent / "data" / self.sample)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over each file's SHA-256, in order: it changes with any byte, not with names or places."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(_file_digest(self.storage, file.name))
        return whole.hexdigest()

    def check_labels(self) -> None:
        for file, rows, _ in self._by_file(self.numbers):
            with self._open(file) as parquet:
                labels = self._labels(self._columns(parquet, file, ["label"]), file, 0, rows)
            self._check_label_range(labels, lambda i, file=file, rows=rows: f"{self._path(file)} row {rows[i]}")

    def _by_file(self, numbers: np.ndarray) -> Iterator[tuple[_ParquetFile, np.ndarray, slice]]:
        """Yield each file that sorted row numbers touch, with the rows of that file and which part of ``numbers`` they are."""
        starts = np.cumsum([0, *(f.num_rows for f in self.files)])
        for number, file in enumerate(self.files):
            low, high = np.searchsorted(numbers, starts[number : number + 2])
            if low < high:
                yield file, numbers[low:high] - starts[number], slice(int(low), int(high))

    def _path(self, file: _ParquetFile) -> str:
        return f"{self.storage.uri}/{file.name}"

    def _open(self, file: _ParquetFile) -> pq.ParquetFile:
        return _open_parquet_file(self.storage, file.name)

    def _columns(
        self, parquet: pq.ParquetFile, file: _ParquetFile, names: list[str], group: int | None = None
    ) -> pa.Table:
        try:
            if group is None:
                return parquet.read(columns=names, use_threads=False)
            return parquet.read_row_group(group, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as e:
            part = "" if group is None else f" (row group {group}, from row {sum(file.row_group_rows[:group])} on)"
            raise DataError(f"{self._path(file)}{part}: the Parquet file is corrupt ({e}); get it again") from e

    def _labels(self, table: pa.Table, file: _ParquetFile, first_row: int, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some rows of the file, int64; ``table`` begins at ``first_row``."""
        column = table["label"].take(pa.array(rows - first_row))
        if column.null_count:
            row = rows[column.is_null().to_pylist().index(True)]
            raise DataError(f"{self._path(file)} row {row}: the label is missing; repair or remove this row")
        return column.to_numpy().astype(np.int64)

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        for file, rows, part in self._by_file(self.numbers[indices]):
            self._read_file(file, rows, images[part], labels[part])

    def _read_file(self, file: _ParquetFile, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        starts = np.cumsum([0, *file.row_group_rows])
        with self._open(file) as parquet:
            for group in range(len(file.row_group_rows)):
                low, high = np.searchsorted(rows, starts[group : group + 2])
                if low == high:
                    continue
                table = self._columns(parquet, file, [self.image_column, "label"], group)
                wanted = rows[low:high]
                labels[low:high] = self._labels(table, file, int(starts[group]), wanted)
                self._check_label_range(
                    labels[low:high], lambda i, wanted=wanted: f"{self._path(file)} row {wanted[i]}"
                )
                # flatten, unlike field, makes bytes null where the whole struct is
                encoded = table[self.image_column].combine_chunks().flatten()[self._bytes_index(table)]
                for row, value, out in zip(
                    wanted, encoded.take(wanted - starts[group]).to_pylist(), images[low:high], strict=True
                ):
                    self._decode_row(value, file, int(row), out)

    def _bytes_index(self, table: pa.Table) -> int:
        index: int = table.schema.field(self.image_column).type.get_field_index("bytes")
        return index

    def _decode_row(self, value: bytes | None, file: _ParquetFile, row: int, out: np.ndarray) -> None:
        if not value:
            raise DataError(
                f"{self._path(file)} row {row}: there is no image (no bytes; images outside of the Parquet file are not "
                "read); embed the image or remove this row"
            )
        self._decode(value, lambda: f"{self._path(file)} row {row}", out)


def _open_parquet_file(storage: Storage, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.fs.open_input_file(storage.path(name)))
    except FileNotFoundError:
        raise DataError(
            f"{storage.uri}/{name} does not exist on this machine; every node must reach the data"
        ) from None
    except (pa.ArrowException, OSError) as e:
        raise DataError(
            f"{storage.uri}/{name} is not a readable Parquet file ({e}); it is truncated or corrupt: get it again"
        ) from e


_DIGESTS: dict[tuple[str, int, Any], bytes] = {}
"""SHA-256 of each file read by this process, by path, size and time: a run opens its source once for every split and kind of
targets, and gigabytes need not be read as often."""


def _file_digest(storage: Storage, name: str) -> bytes:
    path = storage.path(name)
    info = storage.fs.get_file_info(path)
    key = f"{storage.uri}/{name}", info.size, info.mtime_ns
    if key not in _DIGESTS:
        digest = hashlib.sha256()
        with storage.fs.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        _DIGESTS[key] = digest.digest()
    return _DIGESTS[key]


def _open_parquet(data: DataConfig, split: SourceSplit, uri: str, sample: str) -> ParquetSource:
    storage = ParquetSource(
        data=data, split=split, num_rows=0, class_names=(), uri=uri, sample=sample, files=(), image_column=""
    ).storage
    names = _split_files(storage, split)
    files: list[_ParquetFile] = []
    image_column, class_names = "", ()
    for name in names:
        with _open_parquet_file(storage, name) as parquet:
            metadata = parquet.metadata
            files.append(
                _ParquetFile(name, tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
            )
            column = _image_column(parquet.schema_arrow, f"{storage.uri}/{name}")
            if image_column and column != image_column:
                raise DataError(
                    f"{storage.uri}/{name}: its image column is {column!r}, that of {names[0]} {image_column!r}"
                )
            image_column, class_names = column, class_names or _class_names(parquet.schema_arrow, data.num_classes)
    return ParquetSource(
        data=data,
        split=split,
        num_rows=sum(f.num_rows for f in files),
        class_names=class_names,
        uri=uri,
        sample=sample,
        files=tuple(files),
        image_column=image_column,
    )


def _split_files(storage: Storage, split: SourceSplit) -> list[str]:
    """Names of a split's Parquet files, sorted. Raises DataError where there is none or one of a numbered set is missing."""
    if not storage.exists():
        raise DataError(
            f"{storage.uri} does not exist; data.source must name a directory with train-*.parquet, test-*.parquet"
        )
    present = [n for n in storage.list() if n.endswith(".parquet")]
    for word in _FILE_NAMES[split]:
        names = [n for n in present if re.match(rf"{word}([-_.]|$)", n)]
        if not names:
            continue
        # name-00001-of-00003.parquet: a file lost in a download would silently be a smaller data set
        for total in {int(m[1]) for n in names if (m := re.search(r"-of-(\d+)\.parquet$", n))}:
            of_set = [n for n in names if re.search(rf"-of-0*{total}\.parquet$", n)]
            if len(of_set) != total:
                raise DataError(
                    f"{storage.uri}: {len(of_set)} of {total} {word}-*-of-*.parquet files are there ({', '.join(of_set)}); "
                    "get the missing ones"
                )
        return names
    wanted = " or ".join(f"{w}-*.parquet" for w in _FILE_NAMES[split][:2])
    raise DataError(
        f"{storage.uri}: no file for the {split} split ({wanted}); "
        + ("there are only " + ", ".join(present[:5]) if present else "the directory has no .parquet file at all")
    )


def _image_column(schema: pa.Schema, where: str) -> str:
    for name in ("image", "img"):
        index = schema.get_field_index(name)
        if index >= 0:
            kind = schema.field(index).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DataError(
                    f"{where}: column {name!r} is {kind}, not a struct of bytes and path (Hugging Face image)"
                )
            break
    else:
        raise DataError(f"{where}: no column 'image' or 'img'; it has {', '.join(schema.names)}")
    label = schema.get_field_index("label")
    if label < 0 or not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{where}: no integer column 'label'; it has {', '.join(schema.names)}")
    return name


def _class_names(schema: pa.Schema, num_classes: int) -> tuple[str, ...]:
    """Class names out of the schema's ``huggingface`` metadata, or the label numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, ValueError, TypeError):
        return tuple(map(str, range(num_classes)))


# --- image folder ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """``DIR/train/CLASS/*`` and ``DIR/test/CLASS/*`` (or ``val``, ``validation``).

    Labels are the positions of the sorted class folders of ``train``. Rows are ordered by a hash of ``CLASS/file``, so that every
    shard holds a mixture of the classes. Files that are not images by their suffix, or hidden, are left out.
    """

    directory: str
    """Of this split."""
    names: tuple[str, ...]
    """CLASS/file of every row."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over path, size and mtime of each file: hashing the content would read a large data set twice.

        So touching a file changes it, and an edit that keeps size and mtime goes unseen.
        """
        digest = hashlib.sha256()
        for name in self.names:
            stat = os.stat(os.path.join(self.directory, name))
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def limited(self, rows: int) -> Self:
        limited = super().limited(rows)
        # The names of the other files would only travel with every task.
        kept = np.searchsorted(self.numbers, limited.numbers)
        return dataclasses.replace(limited, names=tuple(self.names[i] for i in kept))

    def check_labels(self) -> None:
        # fewer, too: labels are positions, so with weights of more classes each would mean another class
        if len(self.class_names) != self.data.num_classes:
            raise DataError(
                f"{Path(self.directory).parent}/train has {len(self.class_names)} class folders, but data.num_classes is "
                f"{self.data.num_classes}; set data.num_classes={len(self.class_names)} (weights of another number of classes "
                "then need train.replace_head), or add the folders that lack: a label is the position of its folder"
            )

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self.check_labels()
        numbers = {name: i for i, name in enumerate(self.class_names)}
        for position, index in enumerate(indices):
            name = self.names[index]
            labels[position] = numbers[name.partition("/")[0]]
            path = Path(self.directory, name)
            self._decode(path, lambda path=path, index=index: f"{path} (row {index})", images[position])


def _open_folder(data: DataConfig, split: SourceSplit, root: str) -> FolderSource:
    if "://" in root:
        raise ConfigError.of("data.source", data.source, "a local directory for folder:; use parquet: for a URI")
    classes = _subdirectories(_split_directory(root, "train"))
    directory = _split_directory(root, split)
    unknown = sorted(set(_subdirectories(directory)) - set(classes))
    if unknown:
        raise DataError(f"{directory}: class folder {unknown[0]!r} is not in train; remove it or add training images")
    names = [
        f"{label}/{file.name}"
        for label in _subdirectories(directory)
        for file in os.scandir(os.path.join(directory, label))
        if not file.name.startswith(".") and os.path.splitext(file.name)[1].lower() in _IMAGE_SUFFIXES
    ]
    if not names:
        raise DataError(f"{directory}: no image in {directory}/CLASS/ ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    return FolderSource(
        data=data,
        split=split,
        num_rows=len(names),
        class_names=tuple(classes),
        directory=directory,
        names=tuple(names),
    )


def _split_directory(root: str, split: SourceSplit) -> str:
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a directory; data.source must name one with train/CLASS/* and test/CLASS/*")
    for word in _FILE_NAMES[split]:
        if os.path.isdir(os.path.join(root, word)):
            return os.path.join(root, word)
    raise DataError(f"{root}: no folder for the {split} split ({' or '.join(_FILE_NAMES[split])})")


def _subdirectories(directory: str) -> list[str]:
    return sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith("."))


# --- torchvision -----------------------------------------------------------------------------------------------------------

_TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10"}


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(Source):
    """MNIST or CIFAR-10 by torchvision. A process that reads holds the whole split in memory (at most 150 MB)."""

    name: str
    root: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all pixels and labels of the split."""
        images, labels = _torchvision_arrays(self.name, self.root, self.split == "train")
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def check_labels(self) -> None:
        labels = _torchvision_arrays(self.name, self.root, self.split == "train")[1]
        self._check_label_range(labels[self.numbers], lambda i: f"{self.place} row {self.numbers[i]}")

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        all_images, all_labels = _torchvision_arrays(self.name, self.root, self.split == "train")
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
            array = np.asarray(_fitted(image, self.data.image_size))
            images[position] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _open_torchvision(data: DataConfig, split: SourceSplit, name: str) -> TorchvisionSource:
    if name not in _TORCHVISION:
        raise ConfigError.of("data.source", data.source, "torchvision:" + " or torchvision:".join(_TORCHVISION))
    root = _absolute(data.root or "~/.cache/defendpp")
    dataset = _torchvision_dataset(name, root, split == "train", data.download)
    return TorchvisionSource(
        data=data,
        split=split,
        num_rows=len(dataset),
        class_names=tuple(map(str, dataset.classes)),
        name=name,
        root=root,
    )


def _torchvision_dataset(name: str, root: str, train: bool, download: bool) -> Any:
    import torchvision.datasets  # takes 2.4 s, so only who needs it pays

    try:
        return getattr(torchvision.datasets, _TORCHVISION[name])(root, train=train, download=download)
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise DataError(
            f"torchvision:{name} is not usable in {root} ({str(e).splitlines()[0]}); set data.download=true, or data.root to "
            "where torchvision's files are"
        ) from e


@functools.lru_cache(maxsize=2)
def _torchvision_arrays(name: str, root: str, train: bool) -> Batch:
    """All images uint8 [n,H,W] or [n,H,W,3] and labels int64 [n]; kept, since a worker reads many shards of one set."""
    dataset = _torchvision_dataset(name, root, train, download=False)
    return np.asarray(dataset.data), np.asarray(dataset.targets, np.int64)
