"""A user's directories and files, with one clear error for each answer of the file system.

A file name that is not UTF-8 contains surrogates in Python, which reports, databases and terminals
refuse. A pipe or a device has no end. Both are found in the listing, before a file is opened.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from components.errors import DataError, first_line
from pipeline.runtime.retries import with_retries

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the pointer that `git clone` leaves in the place of a Git LFS file."""

CHECK_ACCESS = "check the connection and your access to it, then run again"
"""Remedy for a file that exists, but cannot be reached."""


@dataclass
class Listing:
    """Sorted names in a directory, without hidden ones."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Entries that are neither: a link to nothing or to itself, a pipe, a socket, a device."""

    @property
    def names(self) -> list[str]:
        """All names."""
        return [*self.files, *self.folders, *self.broken]


def list_directory(path: str) -> Listing:
    """List a local directory. A link counts as its target.

    Raises:
        DataError: the directory cannot be listed.
    """

    def look() -> Listing:
        listing = Listing()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                kind = listing.broken
                with contextlib.suppress(OSError):  # A link may lead back to itself.
                    kind = listing.folders if entry.is_dir() else listing.files if entry.is_file() else kind
                kind.append(entry.name)
        return listing

    try:
        return with_retries(look, printable(path))
    except OSError as e:
        raise DataError(f"{printable(path)} cannot be listed ({reason(e)}); {CHECK_ACCESS}") from e


def read_file(path: str) -> bytes:
    """Return the content of a local file.

    Raises:
        DataError: the file is gone or cannot be read.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    try:
        return with_retries(read, printable(path))
    except OSError as e:
        raise DataError(
            f"{printable(path)} cannot be read ({reason(e)}); restore it, or remove it and run again"
        ) from e


def printable(name: str) -> str:
    """Return a name with its line breaks and its bytes that are not UTF-8 escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def reason(error: BaseException) -> str:
    """Return the reason of an error, in one printable line."""
    return printable(error.strerror if isinstance(error, OSError) and error.strerror else first_line(error))


def first_names(names: Sequence[str]) -> str:
    """Return the first five of some names, printable, and dots if there are more."""
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
