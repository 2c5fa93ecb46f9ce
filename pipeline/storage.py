"""Files of a run on any storage: a local path or a URI that pyarrow or fsspec knows (``s3://bucket/path``).

One small class, so that every stage has the same guarantees: a file is whole or absent, and a full disk or an
unreachable bucket is one clear error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from components.errors import ConfigError, UserError


class StorageError(UserError):
    """The storage could not be read or written; what was already written is kept."""


class Storage:
    """A directory on some file system. Picklable: workers open their own connection.

    Args:
        uri: absolute or ``~`` path, or URI (``file://``, ``s3://``, ``gs://``, or any fsspec protocol).

    Raises:
        ConfigError: a relative path (it would mean another place on every node), or an unknown protocol.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if not re.match(r"^[a-z][a-z0-9+.-]*://", text):
            text = os.path.expanduser(text)
            if not os.path.isabs(text):
                raise ConfigError.of("storage", text, "an absolute path, a ~ path or a URI such as s3://bucket/path")
            text = os.path.normpath(text)
        self.uri = text.rstrip("/") or "/"
        self.fs, self.root = _resolve(self.uri)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __truediv__(self, name: str) -> Storage:
        return type(self)(f"{self.uri}/{name}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def local_root(self) -> Path:
        """The directory as a local path. Only where ``is_local``."""
        if not self.is_local:
            raise StorageError(f"{self.uri} is not on this machine's file system")
        return Path(self.root)

    def path(self, name: str) -> str:
        """Path of a file below this directory, for use with ``self.fs``."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def list(self, name: str = "") -> list[str]:
        """Names of the files and directories directly below, sorted; empty where there is no such directory."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        # names that begin with a dot are files half written
        return sorted(i.base_name for i in self.fs.get_file_info(selector) if not i.base_name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        try:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            raise StorageError(f"{self.uri}/{name} does not exist") from None
        except OSError as e:
            raise StorageError(f"{self.uri}/{name} could not be read: {e}") from e

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """A file to seek in, for who needs a part of it."""
        try:
            with self.fs.open_input_file(self.path(name)) as file:
                yield file
        except FileNotFoundError:
            raise StorageError(f"{self.uri}/{name} does not exist") from None
        except OSError as e:
            raise StorageError(f"{self.uri}/{name} could not be read: {e}") from e

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file or nothing: to a temporary name and then moved, or as one object on an object store."""
        path = self.path(name)
        parent, _, base = path.rpartition("/")
        temporary = path if self._is_object_store else f"{parent}/.{base}.{secrets.token_hex(4)}.tmp"
        try:
            if self.is_local:
                os.makedirs(parent, exist_ok=True)
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut leaves an empty file under the final name
                os.replace(temporary, path)
            else:
                if not self._is_object_store:
                    self.fs.create_dir(parent, recursive=True)
                with self.fs.open_output_stream(temporary) as stream:
                    stream.write(data)
                if temporary != path:
                    self.fs.move(temporary, path)
        except OSError as e:
            if temporary != path:
                with contextlib.suppress(OSError):
                    self.fs.delete_file(temporary)
            raise StorageError(
                f"{self.uri}/{name} could not be written: {e}. What was written before is kept: "
                "make room or give another storage, then run the same command again to continue"
            ) from e

    @property
    def _is_object_store(self) -> bool:
        """Whether an object appears under its name only when it is complete (and directories do not exist)."""
        return bool(re.search(r"\b(s3|s3a|gcs|gs|abfs|abfss|adl|az)\b", self.fs.type_name))

    def delete_stale(self, directory: str, older_than_s: float) -> None:
        """Delete files half written below a directory by processes that were killed, so that they do not fill the disk.

        ``older_than_s`` seconds without a change tell them from those that another process is writing now.
        """
        selector = pafs.FileSelector(self.path(directory), allow_not_found=True)
        for info in self.fs.get_file_info(selector):
            half_written = info.base_name.startswith(".") and info.base_name.endswith(".tmp")
            if half_written and info.mtime and time.time() - info.mtime.timestamp() > older_than_s:
                with contextlib.suppress(OSError):  # another process may have been quicker
                    self.fs.delete_file(info.path)

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as e:
            raise StorageError(
                f"{self.uri}/{name} is not valid JSON ({e}); delete it and run the same command again"
            ) from e

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json.dumps(value, indent=1, sort_keys=True).encode())

    def delete(self, name: str) -> None:
        """Delete a file; not an error where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def check_writable(self) -> None:
        """Write and delete a small file, before hours of compute are spent.

        Raises:
            StorageError: naming the storage and the system's reason.
        """
        name = f"write-test-{secrets.token_hex(4)}"
        try:
            self.write_bytes(name, b"x" * 4096)
            self.delete(name)
        except (StorageError, OSError) as e:
            raise StorageError(
                f"storage {self.uri} is not writable: {e.__cause__ or e}. Give another one with --storage"
            ) from e


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    if uri.startswith("/"):
        return pafs.LocalFileSystem(), uri
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        return fs, root
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass  # not one of pyarrow's own protocols
    except OSError as e:
        raise StorageError(f"storage {uri} cannot be opened: {e}") from e
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root
    except (ValueError, ImportError) as e:
        raise ConfigError.of("storage", uri, f"a path or a URI of pyarrow or fsspec ({e})") from None
