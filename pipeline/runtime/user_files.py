"""Reading of a user's own directories and files: one clear error for whatever the file system answers.

A file whose name is not UTF-8 reaches Python with surrogates in its name, which no report, database or terminal can hold. A pipe
or a device never ends when it is read. So both are found in the listing, before anything is opened.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from components.errors import DataError
from pipeline.runtime.storage import patiently

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that `git clone` has left in the place of a file kept by Git LFS."""

CHECK_ACCESS = "check the connection and your access to it, then run again"
"""The remedy for what exists, but cannot be reached."""


@dataclass
class Listing:
    """Names in a directory, sorted; hidden ones are left out."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What is neither a file nor a folder: a link to nothing or to itself, a pipe, a socket, a device."""

    @property
    def names(self) -> list[str]:
        return [*self.files, *self.folders, *self.broken]


def list_directory(path: str) -> Listing:
    """List a local directory; links count as what they lead to.

    Raises:
        DataError: it cannot be listed.
    """

    def look() -> Listing:
        listing = Listing()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                kind = listing.broken
                with contextlib.suppress(OSError):  # of a link that leads back to itself
                    kind = listing.folders if entry.is_dir() else listing.files if entry.is_file() else kind
                kind.append(entry.name)
        return listing

    try:
        return patiently(look, printable(path))
    except OSError as e:
        raise DataError(f"{printable(path)} cannot be listed ({reason(e)}); {CHECK_ACCESS}") from e


def read_file(path: str) -> bytes:
    """Return the content of a local file.

    Raises:
        DataError: it cannot be read, or is gone.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    try:
        return patiently(read, printable(path))
    except OSError as e:
        raise DataError(
            f"{printable(path)} cannot be read ({reason(e)}); restore it, or remove it and run again"
        ) from e


def printable(name: str) -> str:
    """Return a name as a message shows it: line breaks and bytes that are not UTF-8 are escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def reason(error: BaseException) -> str:
    """Return what an error says, in one printable line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def first_names(names: Sequence[str], count: int = 5) -> str:
    """Return the first of some names, printable, and dots where there are more."""
    return ", ".join(map(printable, names[:count])) + (", ..." if len(names) > count else "")
