"""Parquet files as a source of images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config import DataConfig
from components.errors import DataError
from pipeline.data import hub as hugging_face
from pipeline.data.sources.base import Source
from pipeline.data.sources.decode import decode
from pipeline.data.sources.parquet_files import (
    access,
    class_names_of,
    columns_of,
    file_digest,
    find_parquet,
    open_parquet_file,
    row_counts,
    split_names_in,
)
from pipeline.data.sources.split_names import WORDS, SourceSplit
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_files import first_names, printable

SAMPLES = {"mnist": "mnist-sample"}
"""Bundled samples: name -> directory below pipeline/data."""


@dataclass(frozen=True)
class _ParquetFile:
    name: str
    row_group_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.row_group_rows)


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Source):
    """Files of the Hugging Face image layout.

    They have a struct column of ``bytes`` and ``path``, and a column of integer labels. Rows are in
    the order of the files' names. Reading takes the memory of one row group of encoded images.
    """

    uri: str
    """Directory or URI; empty for a bundled sample, which each node finds beside this file."""
    sample: str
    hub: str = ""
    """hf:ORG/NAME@COMMIT[/CONFIG] of files from the Hugging Face Hub; a node that lacks ``uri`` gets
    them there."""
    files: tuple[_ParquetFile, ...]
    image_column: str
    label_column: str

    @property
    def storage(self) -> Storage:
        """The directory of the files."""
        return _directory_of(self.uri, self.sample, self.hub)

    def describe(self) -> dict[str, Any]:
        """Return the source as JSON types, with the commit of files from the Hugging Face Hub."""
        return {**super().describe(), **({"resolved": self.hub} if self.hub else {})}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over each file's SHA-256, in order. It does not depend on names and places."""
        whole = hashlib.sha256()
        # Without these settings the columns follow from the files.
        chosen = f"{self.data.image_column}\0{self.data.label_column}"
        if chosen != "\0":
            whole.update(chosen.encode())
        for file in self.files:
            whole.update(file_digest(self.storage, file.name))
        return whole.hexdigest()

    def labels(self) -> np.ndarray:
        """Return all labels, int64 [num_rows], from the label column alone."""
        parts = [np.empty(0, np.int64)]
        for file, rows, _ in self._by_file(self.numbers):
            with open_parquet_file(self.storage, file.name) as parquet:
                parts.append(self._labels(self._columns(parquet, file, [self.label_column]), file, 0, rows))
        return np.concatenate(parts)

    def _unlabelled(self) -> str:
        text = super()._unlabelled()
        if self.split == "train":
            return text
        others = [
            name
            for name in split_names_in(self.storage, self.data.test_split, self.data.source)
            if self._has_labels(name)
        ]
        others.sort(key=lambda name: name.lower() in WORDS["train"])
        return f"{text}: set --data.test-split to a split that has labels ({first_names(others)})" if others else text

    def _has_labels(self, split: str) -> bool:
        """Return whether another split of the same directory has labels."""
        try:
            other = open_parquet(
                dataclasses.replace(self.data, test_split=split, test_limit=0), "test", self.uri, self.sample, self.hub
            )
            return bool((other.labels() >= 0).any())
        except DataError:
            return False

    def _row_place(self, position: int) -> str:
        ((file, rows, _),) = self._by_file(self.numbers[position : position + 1])
        return f"{self._path(file)} row {rows[0]}"

    def _by_file(self, numbers: np.ndarray) -> Iterator[tuple[_ParquetFile, np.ndarray, slice]]:
        """Yield each file of sorted row numbers, with its rows and their part of ``numbers``."""
        starts = np.cumsum([0, *(f.num_rows for f in self.files)])
        for number, file in enumerate(self.files):
            low, high = np.searchsorted(numbers, starts[number : number + 2])
            if low < high:
                yield file, numbers[low:high] - starts[number], slice(int(low), int(high))

    def _path(self, file: _ParquetFile) -> str:
        return printable(f"{self.storage.uri}/{file.name}")

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
        return access(self.storage, f"{self._path(file)}{part}", read)

    def _labels(self, table: pa.Table, file: _ParquetFile, first_row: int, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some rows of the file, int64; ``table`` begins at ``first_row``."""
        column = table[self.label_column].take(pa.array(rows - first_row))
        if column.null_count:
            row = rows[column.is_null().to_pylist().index(True)]
            raise DataError(f"{self._path(file)} row {row}: the label is missing; repair or remove this row")
        labels: np.ndarray = column.to_numpy().astype(np.int64)
        return labels

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._check_class_count()
        for file, rows, part in self._by_file(self.numbers[indices]):
            self._read_file(file, rows, images[part], labels[part])

    def _read_file(self, file: _ParquetFile, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        starts, path = np.cumsum([0, *file.row_group_rows]), self._path(file)
        with open_parquet_file(self.storage, file.name) as parquet:
            for group in range(len(file.row_group_rows)):
                low, high = np.searchsorted(rows, starts[group : group + 2])
                if low == high:
                    continue
                table = self._columns(parquet, file, [self.image_column, self.label_column], group)
                group_rows = rows[low:high]
                places = [f"{path} row {row}" for row in group_rows]
                labels[low:high] = self._labels(table, file, int(starts[group]), group_rows)
                self._check_label_range(labels[low:high], places.__getitem__)
                column = table[self.image_column]
                for row, place, out in zip(group_rows, places, images[low:high], strict=True):
                    encoded = column[int(row - starts[group])]
                    self._decode_row(encoded["bytes"].as_py() if encoded.is_valid else None, place, out)

    def _decode_row(self, value: bytes | None, where: str, out: np.ndarray) -> None:
        if not value:
            raise DataError(
                f"{where}: there is no image (no bytes; images outside of the Parquet file are not "
                "read); embed the image or remove this row"
            )
        decode(self.data, value, where, out)


@functools.lru_cache(maxsize=8)
def _directory_of(uri: str, sample: str, hub: str) -> Storage:
    """Open the directory of a source once in each process, since every row group needs it."""
    if hub and not Path(uri).is_dir():  # Another node's cache.
        uri = hugging_face.snapshot(hub).directory
    return Storage(uri or Path(__file__).resolve().parents[1] / sample)


def open_parquet(data: DataConfig, split: SourceSplit, uri: str, sample: str, hub: str = "") -> ParquetSource:
    """Open a split of the directory ``uri``, or of a bundled sample. Raises DataError."""
    storage = _directory_of(uri, sample, hub)
    if not storage.exists():
        raise DataError(
            f"{printable(storage.uri)} does not exist; --data.source must name a directory with train-*.parquet, "
            "test-*.parquet"
        )
    names = find_parquet(storage, split, data.test_split, data.source)
    files: list[_ParquetFile] = []
    columns = "", ""
    class_names: tuple[str, ...] = ()
    for name in names:
        where = printable(f"{storage.uri}/{name}")
        with open_parquet_file(storage, name) as parquet:
            files.append(_ParquetFile(name, row_counts(parquet)))
            pair = columns_of(parquet.schema_arrow, data, where)
            if len(files) > 1 and pair != columns:
                raise DataError(f"{where}: its columns of images and labels are {pair}, those of {names[0]} {columns}")
            columns = pair
            named = class_names_of(parquet.schema_arrow, columns[1])
            if class_names and named and named != class_names:
                raise DataError(f"{where}: its classes are not those of {names[0]}; they are of two data sets")
            class_names = class_names or named
    return ParquetSource(
        data=data,
        split=split,
        num_rows=sum(f.num_rows for f in files),
        class_names=class_names or tuple(map(str, range(data.num_classes))),
        uri=uri,
        sample=sample,
        hub=hub,
        files=tuple(files),
        image_column=columns[0],
        label_column=columns[1],
    )
