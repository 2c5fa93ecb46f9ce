"""A folder of image files per class as a source of images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from components.config import DataConfig
from components.errors import ConfigError, DataError
from components.fields import is_text
from pipeline.data.sources.base import Source
from pipeline.data.sources.decode import decode
from pipeline.data.sources.split_names import WORDS, SourceSplit, choose_word, ordered_classes, split_words
from pipeline.runtime.user_files import Listing, first_names, list_directory, printable, read_file, reason

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """``DIR/train/CLASS/**`` and ``DIR/test/CLASS/**`` (or ``val``, or ``data.test_split``).

    Images of a class may be in folders below its own, at any depth, as torchvision and timm read
    them. Labels are the positions of the class folders of ``train``, or of the test split if there
    is no ``train``, in the order of ``data.class_order``. Rows are ordered by a hash of
    ``CLASS/file``, so that every shard has a mixture of the classes. Hidden files, and files
    without the suffix of an image, are left out.
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
        """SHA-256 over path, size and mtime of each file. Their content would take too long.

        Touching a file changes the hash. An edit that keeps size and mtime does not.
        """
        digest = hashlib.sha256()
        # A label is the position of a training folder, which may have no image of this split.
        if self.split == "test" or self.data.allow_empty_classes:
            digest.update("\0".join(self.class_names).encode())
        for name in self.names:
            status = self._stat(name)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check_files(self) -> None:
        """Check that no file is empty or locked. Raises DataError."""
        empty, locked = [], []
        for name in self.names:
            status = self._stat(name)
            if status.st_size == 0:
                empty.append(name)
            # On a network's file system each call takes its time, so only files that are not open
            # to everybody are asked about.
            if not status.st_mode & stat.S_IROTH and not os.access(f"{self.directory}/{name}", os.R_OK):
                locked.append(name)
        for names, fault in ((empty, "is empty"), (locked, "cannot be read by this user")):
            if names:
                raise DataError(_first_of(self.directory, names, f"{fault}; get the file again or remove it"))

    def _stat(self, name: str) -> os.stat_result:
        """Return the size and times of a file. Raises DataError."""
        try:
            return os.stat(f"{self.directory}/{name}")
        except OSError as e:
            raise DataError(
                f"{printable(f'{self.directory}/{name}')} was listed, but cannot be looked at now ({reason(e)}); "
                "restore it, or run again when nothing changes the data set"
            ) from e

    def limited(self, rows: int) -> Self:
        """Return this source with ``rows`` of its images, without the names of the others."""
        limited = super().limited(rows)
        # The names of the other files would only travel with every task.
        positions = np.searchsorted(self.numbers, limited.numbers)
        return dataclasses.replace(limited, names=tuple(self.names[i] for i in positions))

    def labels(self) -> np.ndarray:
        """Return all labels, the positions of the class folders, int64 [num_rows]."""
        return self._labels_of(self.names)

    def _labels_of(self, names: Sequence[str]) -> np.ndarray:
        numbers = {name: i for i, name in enumerate(self.class_names)}
        return np.array([numbers[name.partition("/")[0]] for name in names], np.int64)

    @property
    def _classes_place(self) -> str:
        return printable(self.classes_directory)

    def _check_class_count(self) -> None:
        """Refuse a folder without images as a class, before its number becomes the advice."""
        if len(self.class_names) != self.data.num_classes:
            empty = [label for label in self.class_names if not _holds_image(self.classes_directory, label)]
            if empty:
                raise DataError(
                    f"{self._classes_place} has {len(self.class_names)} folders, and {len(empty)} of them hold no "
                    f"image ({first_names(empty)}), but data.num_classes is {self.data.num_classes}; each folder there "
                    "must be a class, with its images below it"
                )
        super()._check_class_count()

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._check_class_count()
        labels[:] = self._labels_of([self.names[i] for i in indices])
        for index, out in zip(indices, images, strict=True):
            path = f"{self.directory}/{self.names[index]}"
            decode(self.data, read_file(path), f"{printable(path)} (row {index})", out)


def open_folder(data: DataConfig, split: SourceSplit, root: str) -> FolderSource:
    """Open the images of a split below a directory. Raises DataError, ConfigError."""
    if "://" in root:
        raise ConfigError.of("data.source", data.source, "a local directory for folder:; use parquet: for a URI")
    if not os.path.isdir(root):
        raise DataError(
            f"{printable(root)} is not a directory; --data.source must name one with train/CLASS/* and test/CLASS/*"
        )
    top = list_directory(root)
    directory = _split_directory(root, top, split, data.test_split if split == "test" else "")
    listing = list_directory(directory)
    classes_directory, folders = directory, listing.folders
    # A network's labels follow the training folders, if there are any.
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
    """Return the folder of a split in ``root``, whose listing is given.

    Raises:
        DataError: there is no such folder, there are two, or it is a broken link.
    """
    folders = listing.folders
    # Without the broken ones, another split would silently take the place of a broken link.
    word = choose_word(root, split, [*folders, *listing.broken], test_split)
    if word in listing.broken:
        raise DataError(f"{printable(f'{root}/{word}')} is no folder but a broken link; replace or remove it")
    if word is None:
        names = test_split or " or ".join(WORDS[split])
        there = f"; there are only {first_names(folders)}" if folders else ""
        remedy = ". Name one of them with --data.test-split" if split == "test" and folders else ""
        parent, name = os.path.split(root)
        if name.lower() in split_words():
            remedy = f". If these are classes, use --data.source folder:{printable(parent)} --data.test-split {name}"
        raise DataError(f"{printable(root)}: no folder for the {split} split ({printable(names)}){there}{remedy}")
    return os.path.join(root, word)


def _check_class_folders(directory: str, listing: Listing, classes_directory: str, folders: Sequence[str]) -> None:
    """Refuse folders of a split that are unknown in the training split, and a single folder."""
    unknown = sorted(set(listing.folders) - set(folders))
    if unknown and len(unknown) < len(listing.folders):
        number = f"{len(unknown)} class folders are" if len(unknown) > 1 else "1 class folder is"
        raise DataError(
            f"{printable(directory)}: {number} not in {printable(os.path.basename(classes_directory))} "
            f"({first_names(unknown)}); remove them or add training images"
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
            + ". Move each image into a folder named by its class, or name another split with --data.test-split"
        )
        if lists:
            text += f". {printable(lists[0])} seems to name the class of each image, as Tiny ImageNet's does"
        raise DataError(text)


def _no_image(directory: str, listing: Listing) -> str:
    """Return the message for a split without images in class folders."""
    text = f"{printable(directory)}: no image in {printable(directory)}/CLASS/ ({', '.join(sorted(_IMAGE_SUFFIXES))})"
    beside = [name for name in listing.files if _suffix(name) in _IMAGE_SUFFIXES]
    if beside:
        text += f"; {len(beside)} images lie beside the class folders: move each into the folder of its class"
    elif any(_suffix(name) == ".parquet" for name in listing.files):
        text += "; it has Parquet files, which --data.source parquet:DIR reads"
    return text


def _first_of(directory: str, names: Sequence[str], fault: str) -> str:
    """Return a message about the first of some files with the same fault, and their number."""
    more = f" (the first of {len(names)})" if len(names) > 1 else ""
    return f"{printable(f'{directory}/{names[0]}')}{more} {fault}"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _left_out(listing: Listing, suffixes: Sequence[str]) -> str:
    """Return which files of a split are left out, in words, or "".

    They have the suffix of no image, or lie beside the class folders, whose suffixes are given.
    """
    kinds = [suffix or "without suffix" for suffix in suffixes if suffix not in _IMAGE_SUFFIXES]
    kinds += [f"{_suffix(name) or 'without suffix'} beside the class folders" for name in listing.files]
    if not kinds:
        return ""
    counted = ", ".join(f"{printable(kind)} {count}" for kind, count in sorted(Counter(kinds).items()))
    return f"{len(kinds)} file{'s' if len(kinds) > 1 else ''} left out ({counted})"


def _files_below(directory: str, folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files below ``folders``, and the entries that are neither files nor folders.

    Raises:
        DataError: a folder cannot be listed, or a link leads back to a folder that contains it.
    """
    files, broken = [], []
    # Each with its path, free of links, and those of the folders on the way to it. Only a link
    # needs the slow os.path.realpath.
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
    """Return whether there is an image in a folder or below it."""
    return any(_suffix(name) in _IMAGE_SUFFIXES for name in _files_below(directory, [folder])[0])
