"""Storages that misbehave, or that are not local."""

from __future__ import annotations

from typing import Any

import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from pipeline.runtime.storage import Storage


class FsspecStorage(Storage):
    """A local directory that is accessed through fsspec, like remote file systems."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs = pafs.PyFileSystem(pafs.FSSpecHandler(LocalFileSystem()))


class Flaky(LocalFileSystem):
    """A file system whose next ``failures`` calls lose the connection."""

    failures = 0
    error: OSError = OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Couldn't connect")

    def _maybe_fail(self) -> None:
        if type(self).failures:
            type(self).failures -= 1
            raise self.error

    def info(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_fail()
        return super().info(*args, **kwargs)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_fail()
        return super().open(*args, **kwargs)
