"""Parquet files of images in the Hugging Face layout: search, opening, digests and schemas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from components.config import DataConfig
from components.errors import DataError
from components.fields import is_text
from pipeline.data.sources.split_names import SourceSplit, names_split, parquet_files, split_of, split_words
from pipeline.runtime.retries import is_access_error
from pipeline.runtime.storage import Storage
from pipeline.runtime.user_files import (
    CHECK_ACCESS,
    LFS_POINTER,
    Listing,
    first_names,
    list_directory,
    printable,
    reason,
)

T = TypeVar("T")

_LEVELS = 3
"""Levels of folders searched for Parquet files: the directory itself, ``data/`` or ``CONFIG/`` in
it, and one level more."""
_MAX_FOLDERS = 1000
"""Folders of one level that are looked into. A directory of more is not of the Hub's layout but,
say, one of class folders."""


@dataclass(frozen=True)
class _Place:
    """A folder of a data set, with its Parquet files and the folders of splits."""

    folder: str
    """Path from the directory that the user gave; empty for that itself."""
    listing: Listing
    splits: dict[str, Listing]
    """Name of each folder that is called as a split and has Parquet files -> what it holds."""
    others: list[str]
    """Names of its other folders."""

    @property
    def files(self) -> list[str]:
        return _parquet(self.listing.files)

    def holds_splits(self, test_split: str) -> bool:
        return bool(self.splits) or any(names_split(name, test_split) for name in _parquet(self.listing.names))


def _parquet(names: Sequence[str]) -> list[str]:
    return [name for name in names if split_of(name)]


def find_parquet(storage: Storage, split: SourceSplit, test_split: str, source: str) -> list[str]:
    """Return the paths of a split's Parquet files, from the directory ``storage``.

    The files are in the directory itself, or in the only folder that has splits, one or two levels
    below (``data``, or a configuration's name). See
    :func:`pipeline.data.sources.split_names.parquet_files` for their names.

    Args:
        source: ``data.source``, for messages.

    Raises:
        DataError: there are none, several folders have splits, or the split is incomplete.
    """
    place = _find_place(storage, test_split, source)
    at = _joined(storage.uri, place.folder)
    _refuse_broken(at, place.listing, test_split)
    for name, listing in place.splits.items():
        _refuse_broken(f"{at}/{name}", listing, test_split)
    folders = {name: _parquet(listing.files) for name, listing in place.splits.items()}
    named = test_split if split == "test" else ""
    return [_joined(place.folder, name) for name in parquet_files(at, split, place.files, folders, named)]


def split_names_in(storage: Storage, test_split: str, source: str) -> list[str]:
    """Return the names of all splits that the directory has, sorted."""
    place = _find_place(storage, test_split, source)
    return sorted({split_of(name) for name in place.files} | set(place.splits))


def _find_place(storage: Storage, test_split: str, source: str) -> _Place:
    """Return the folder that has the splits, or the directory itself if none has."""
    top = _look(storage, "", test_split)
    level = [top]
    for depth in range(1, _LEVELS + 1):
        places = [place for place in level if place.holds_splits(test_split)]
        if len(places) > 1:
            names = [place.folder for place in places]
            raise DataError(
                f"{printable(storage.uri)} has splits in {len(names)} folders, which are data sets or configurations "
                f"of their own: {first_names(names)}. Give the one that you mean as --data.source, for example "
                f"{printable(f'{source}/{names[0]}')}"
            )
        if places:
            return places[0]
        if depth == _LEVELS:
            break
        below = [_joined(place.folder, name) for place in level for name in place.others]
        level = [_look(storage, folder, test_split) for folder in below] if len(below) <= _MAX_FOLDERS else []
    return top


def _look(storage: Storage, folder: str, test_split: str) -> _Place:
    """List a folder, and the folders in it that have the name of a split."""
    words = split_words(test_split)
    try:
        listing = _listing(storage, folder)
    except DataError:
        if not folder:
            raise
        listing = Listing()  # A folder beside the splits does not matter.
    inner = {name: _listing(storage, _joined(folder, name)) for name in listing.folders if name.lower() in words}
    return _Place(
        folder=folder,
        listing=listing,
        splits={name: found for name, found in inner.items() if _parquet(found.names)},
        others=[name for name in listing.folders if name not in inner],
    )


def _joined(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)


def _refuse_broken(place: str, listing: Listing, test_split: str) -> None:
    """Refuse a broken entry with the name of a Parquet file, or a name that Arrow cannot open.

    A part of a split would be missing without notice if it were left out.
    """
    broken = [name for name in listing.broken if split_of(name) or name.lower() in split_words(test_split)]
    folders = [name for name in _parquet(listing.folders) if names_split(name, test_split)]
    unreadable = [name for name in _parquet(listing.files) if not is_text(name)]
    for names, fault in (
        (broken, "neither a file nor a folder (a link to nothing, a pipe, a socket or a device)"),
        (folders, "a folder, not a file"),
        (unreadable, "not a name in UTF-8"),
    ):
        if names:
            more = f" (the first of {len(names)})" if len(names) > 1 else ""
            raise DataError(f"{printable(f'{place}/{names[0]}')} is {fault}{more}; replace, rename or remove it")


def _listing(storage: Storage, folder: str) -> Listing:
    """List a folder of the storage. Raises DataError."""
    if storage.is_local:
        # Arrow's own listing leaves out broken links, and fails at a name that is not UTF-8.
        return list_directory(storage.path(folder))
    selector = pafs.FileSelector(storage.path(folder))
    infos = access(storage, _joined(storage.uri, folder), lambda: storage.fs.get_file_info(selector), "listed")
    visible = sorted((info.base_name, info.type) for info in infos if not info.base_name.startswith("."))
    return Listing(
        files=[name for name, kind in visible if kind == pafs.FileType.File],
        folders=[name for name, kind in visible if kind == pafs.FileType.Directory],
    )


def open_parquet_file(storage: Storage, name: str) -> pq.ParquetFile:
    """Open a Parquet file and read its footer.

    Raises:
        DataError: the file is gone, cannot be reached, or is no Parquet file.
    """

    def opened() -> pq.ParquetFile:
        file = storage.fs.open_input_file(storage.path(name))
        try:
            parquet = pq.ParquetFile(file)
            _ = parquet.schema_arrow  # A schema that Arrow cannot represent fails here.
            rows = row_counts(parquet)
            # An image takes a byte at least, so a damaged number must not make arrays of its size.
            if min(rows, default=0) < 0 or sum(rows) > file.size():
                raise pa.ArrowInvalid(f"its footer says {sum(rows)} rows")
            return parquet
        except (pa.ArrowException, OSError) as e:
            if not is_access_error(e) and file.read_at(len(LFS_POINTER), 0) == LFS_POINTER:
                raise DataError(
                    f"{printable(f'{storage.uri}/{name}')} is a Git LFS pointer, not the file itself; run `git lfs "
                    "pull` where the data set was cloned"
                ) from None
            raise

    return access(storage, f"{storage.uri}/{name}", opened)


def row_counts(parquet: pq.ParquetFile) -> tuple[int, ...]:
    """Return the number of rows in each row group."""
    metadata = parquet.metadata
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def access(storage: Storage, place: str, action: Callable[[], T], done: str = "read") -> T:
    """Return what ``action`` returns, and repeat it while the storage does not answer.

    Args:
        place: the file or folder that ``action`` reads, for messages.
        done: "read" or "listed", for messages.

    Raises:
        DataError: the place is gone or cannot be reached, or its content is no Parquet.
    """
    try:
        return storage.with_retries(action)
    except FileNotFoundError:
        raise DataError(f"{printable(place)} does not exist on this machine; every node must reach the data") from None
    except (pa.ArrowException, OSError, UnicodeError) as e:
        if done != "read" or is_access_error(e):
            raise DataError(f"{printable(place)} cannot be {done} ({reason(e)}); {CHECK_ACCESS}") from e
        raise DataError(
            f"{printable(place)} is not a readable Parquet file ({reason(e)}); it is truncated or corrupt: get it again"
        ) from e


_DIGESTS: dict[tuple[str, int, Any], bytes] = {}
"""SHA-256 of each file read by this process, by path, size and time: a run opens its source once
for every split and kind of targets, and gigabytes need not be read as often."""


def file_digest(storage: Storage, name: str) -> bytes:
    """Return the SHA-256 of a file. Raises DataError."""
    path = storage.path(name)

    def digest() -> bytes:
        info = storage.fs.get_file_info(path)
        key = f"{storage.uri}/{name}", info.size, info.mtime_ns
        if key not in _DIGESTS:
            sha256 = hashlib.sha256()
            with storage.fs.open_input_stream(path) as stream:
                while chunk := stream.read(1 << 20):
                    sha256.update(chunk)
            _DIGESTS[key] = sha256.digest()
        return _DIGESTS[key]

    return access(storage, f"{storage.uri}/{name}", digest)


_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels")
_LABEL_LIKE = ("fine_label", "coarse_label", "class", "class_id", "class_label", "cls", "category", "target")
"""Names of label columns on the Hub. Those of the second line count where none of the first is
there, and only one of them is."""


def columns_of(schema: pa.Schema, data: DataConfig, where: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column.

    Raises:
        DataError: there is no such column, there are several, or it is of another type.
    """
    images = {f.name: f.type for f in schema if _is_image(f.type)}
    labels = {f.name: f.type for f in schema if pa.types.is_integer(f.type)}
    classes = [name for name in labels if class_names_of(schema, name)]
    image = data.image_column or next((name for name in _IMAGE_NAMES if name in schema.names), "")
    label = data.label_column or next((name for name in _LABEL_NAMES if name in schema.names), "")
    like = [name for name in labels if name in _LABEL_LIKE]
    return (
        _column(schema, where, "image", image, images, list(images)),
        _column(schema, where, "label", label, labels, like or classes),
    )


def _is_image(kind: pa.DataType) -> bool:
    """Return whether a type is the Hub's for images, a struct with the file in ``bytes``."""
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content) or pa.types.is_binary_view(content))


def _shown(kind: pa.DataType) -> str:
    return printable(str(kind)[:60])


_TYPES = {"image": "a struct of bytes and path (Hugging Face image)", "label": "integers"}


def _column(
    schema: pa.Schema, where: str, what: str, name: str, fitting: dict[str, pa.DataType], candidates: list[str]
) -> str:
    """Return the column ``name``, or the only candidate if ``name`` is empty."""
    columns = ", ".join(f"{printable(f.name)} ({_shown(f.type)})" for f in schema)
    setting = f"name the column with --data.{what}-column"
    if name:
        if schema.names.count(name) != 1:
            count = "no column" if name not in schema.names else "more than one column"
            raise DataError(f"{where}: {count} {name!r}; it has {columns}")
        if name not in fitting:
            raise DataError(
                f"{where}: column {name!r} is {_shown(schema.field(name).type)}, not {_TYPES[what]}; {setting}, or "
                f"convert it. It has {columns}"
            )
        return name
    if len(candidates) != 1:
        found = "no column" if not candidates else f"{' and '.join(map(repr, candidates))}: more than one column"
        usual = " or ".join(map(repr, _IMAGE_NAMES if what == "image" else _LABEL_NAMES))
        raise DataError(f"{where}: {found} of {what}s ({usual}, {_TYPES[what]}); {setting}. It has {columns}")
    return candidates[0]


def class_names_of(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the class names in the schema's ``huggingface`` metadata, or ()."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        # JSON may escape half a surrogate pair, which no report can hold.
        return tuple(str(name).encode(errors="replace").decode() for name in features[label]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
