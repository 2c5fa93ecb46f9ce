"""Files on any storage: a local path or a URI of pyarrow or fsspec (``s3://bucket/path``).

One small class gives every stage the same guarantees. A file is whole or absent. Operations are
retried while the storage does not answer. A full disk or an unreachable bucket is one clear error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from components.errors import ConfigError, DataError, UserError, first_line
from components.fields import PLACE
from pipeline.runtime.redaction import check_no_secret
from pipeline.runtime.retries import with_retries

T = TypeVar("T")

HALF_WRITTEN_S = 3600.0
"""Age at which a temporary file belongs to a dead process, even if two hosts' clocks differ."""


class StorageError(UserError):
    """The storage could not be read or written. What was already written is kept."""


class Storage:
    """A directory on some file system. Picklable: workers open their own connection.

    Args:
        uri: absolute or ``~`` path, or URI (``file://``, ``s3://``, ``gs://``, or any fsspec
            protocol), with pyarrow's options after a ``?``
            (``s3://bucket/path?region=eu-west-1&endpoint_override=minio:9000``).

    Raises:
        ConfigError: the path is relative (and so another place on each node), the protocol is
            unknown, or the URI has a password or key, which every record would then contain.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        self._query = ""
        if _is_uri(text):
            check_no_secret(text)
            if not text.startswith("file://"):
                text, mark, options = text.partition("?")
                self._query = mark + options
        else:
            text = os.path.expanduser(text)
            if not os.path.isabs(text):
                raise ConfigError.of("storage", text, PLACE[1])
            text = os.path.normpath(text)
        self.uri = text.rstrip("/") or "/"
        """The URI without its options, for messages."""
        self.fs, self.root = _resolve(self.full_uri)

    @property
    def full_uri(self) -> str:
        """URI that opens this directory again, options included."""
        return self.uri + self._query

    @property
    def parent(self) -> Storage:
        """The directory that holds this one. Raises as :class:`Storage`."""
        return split_uri(self.full_uri)[0]

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.full_uri,)

    def __repr__(self) -> str:
        return f"Storage({self.full_uri!r})"

    def __truediv__(self, name: str) -> Self:
        below = type(self).__new__(type(self))
        # The whole tree shares a connection: opening one takes an object store's round trips.
        below.__dict__.update(self.__dict__)
        below.uri, below.root = f"{self.uri.rstrip('/')}/{name}", self.path(name)
        return below

    @property
    def is_local(self) -> bool:
        """Tell whether the directory is on this machine's file system."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def local_root(self) -> Path:
        """The directory as a local path. Raises StorageError if it is not local."""
        if not self.is_local:
            raise StorageError(f"{self.uri} is not on this machine's file system")
        return Path(self.root)

    def path(self, name: str) -> str:
        """Return the path of a file below this directory, for use with ``self.fs``.

        Raises:
            StorageError: the name, which may be from another's record, leads out of the directory.
        """
        if ".." in name.split("/"):
            raise StorageError(f"{name!r} leads out of {self.uri}: a name below a storage has no '..'")
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def join(self, name: str) -> str:
        """Return the URI of a file or directory below, with the options that opening it needs."""
        return (self / name).full_uri

    def with_retries(self, action: Callable[[], T], patience_s: float | None = None) -> T:
        """Return what ``action`` returns, repeated as by :func:`retries.with_retries`."""
        return with_retries(action, f"storage {self.uri}", patience_s)

    @contextlib.contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        """Turn the errors of a file system into one StorageError."""
        try:
            yield
        except FileNotFoundError:
            raise StorageError(f"{(self / name).uri} does not exist; check the path") from None
        except (OSError, pa.ArrowException) as e:
            raise StorageError(f"{(self / name).uri} could not be {done}: {e}") from e

    def exists(self, name: str = "") -> bool:
        """Return whether there is a file or directory of this name."""
        path = self.path(name)
        with self._errors(name, "read"):
            return bool(self.with_retries(lambda: self.fs.get_file_info(path)).type != pafs.FileType.NotFound)

    def list(self, name: str = "") -> list[str]:
        """Return the sorted names in a directory, or [] if there is none."""
        # Names that begin with a dot are files that are being written.
        return sorted(i.base_name for i in self._infos(name) if not i.base_name.startswith("."))

    def _infos(self, name: str) -> Sequence[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        with self._errors(name, "listed"):
            return list(self.with_retries(lambda: self.fs.get_file_info(selector)))

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file. Raises StorageError."""
        path = self.path(name)

        def read() -> bytes:
            with self.fs.open_input_stream(path) as stream:
                return bytes(stream.read())

        with self._errors(name, "read"):
            return self.with_retries(read)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file for random access."""
        path = self.path(name)
        with self._errors(name, "read"), self.with_retries(lambda: self.fs.open_input_file(path)) as file:
            yield file

    def write_bytes(self, name: str, data: bytes | pa.Buffer, patience_s: float | None = None) -> None:
        """Write a whole file or nothing, under a temporary name first or as one object."""
        self._write(name, data, patience_s, anew=False)

    def write_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one of that name. Return whether it was written.

        This is atomic on a local or network file system. pyarrow has no such operation for object
        stores: if two processes write at the same moment, the later file stays. Read it to see.
        """
        if not self.is_local:
            if self.exists(name):
                return False
            self.write_bytes(name, data)
            return True
        return self._write(name, data, None, anew=True)

    def _write(self, name: str, data: bytes | pa.Buffer, patience_s: float | None, *, anew: bool) -> bool:
        path = self.path(name)
        try:
            return self.with_retries(lambda: self._write_once(path, data, anew), patience_s)
        except (OSError, pa.ArrowException) as e:
            raise StorageError(
                f"{(self / name).uri} could not be written: {e}. What was written before is kept: "
                "make room or give another storage, then run the same command again to continue"
            ) from e

    def _write_once(self, path: str, data: bytes | pa.Buffer, anew: bool) -> bool:
        """Write a file under a temporary name and move it. Return False if ``anew`` and it exists.

        ``anew`` is for local files only.
        """
        parent, _, base = path.rpartition("/")
        temporary = path if self._is_object_store else f"{parent}/.{base}.{secrets.token_hex(4)}.tmp"
        try:
            if self.is_local:
                os.makedirs(parent, exist_ok=True)
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # Otherwise a power cut can leave an empty file.
                if not anew:
                    os.replace(temporary, path)
                    return True
                try:
                    link_anew(temporary, path)
                    return True
                except FileExistsError:
                    return False
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
            else:
                if not self._is_object_store:
                    self.fs.create_dir(parent, recursive=True)
                with self.fs.open_output_stream(temporary) as stream:
                    stream.write(data)
                if temporary != path:
                    self.fs.move(temporary, path)
                return True
        except BaseException:  # A cancelled task must leave nothing, too.
            if temporary != path:
                with contextlib.suppress(OSError):
                    self.fs.delete_file(temporary)
            raise

    @property
    def _is_object_store(self) -> bool:
        """Tell whether an object appears under its name only once it is complete."""
        return bool(re.search(r"\b(s3|s3a|gcs|gs|abfs|abfss|adl|az)\b", self.fs.type_name))

    def delete_stale(self, directory: str, older_than_s: float) -> None:
        """Delete the temporary files that killed processes left in a directory.

        Another process may be writing a file that changed in the last ``older_than_s`` seconds.
        """
        if self._is_object_store:
            return
        for info in self._infos(directory):
            half_written = info.base_name.startswith(".") and info.base_name.endswith(".tmp")
            if half_written and info.mtime and time.time() - info.mtime.timestamp() > older_than_s:
                with contextlib.suppress(OSError):  # Another process may have deleted it.
                    self.fs.delete_file(info.path)

    def read_json(self, name: str) -> Any:
        """Return the value in a JSON file. Raises StorageError."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as e:
            raise StorageError(
                f"{(self / name).uri} is not valid JSON ({e}); delete it and run the same command again"
            ) from e

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as a JSON file, whole or not at all."""
        self.write_bytes(name, json.dumps(value, indent=1, sort_keys=True).encode())

    def delete(self, name: str, patience_s: float | None = None) -> None:
        """Delete a file, if there is one."""
        path = self.path(name)
        with self._errors(name, "deleted"), contextlib.suppress(FileNotFoundError):
            self.with_retries(lambda: self.fs.delete_file(path), patience_s)

    def check_writable(self) -> None:
        """Write and delete a small file, before hours of compute are spent, without retries.

        Raises:
            StorageError: the storage cannot be written. The message has the system's reason.
        """
        name = f"write-test-{secrets.token_hex(4)}"
        try:
            self.write_bytes(name, b"x" * 4096, patience_s=0.0)
            self.delete(name)
        except NotImplementedError:
            raise StorageError(
                f"storage {self.uri} is not writable: its protocol can only be read. Give another one with --storage"
            ) from None
        except StorageError as e:
            raise StorageError(
                f"storage {self.uri} is not writable: {e.__cause__ or e}. Give another one with --storage"
            ) from e


def read_arrays(storage: Storage, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file, or {} if there is no such file.

    Raises:
        DataError: the file is corrupt.
    """
    if not storage.exists(name):
        return {}
    try:
        with np.load(io.BytesIO(storage.read_bytes(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{storage.uri}/{name} is corrupt ({e}); delete it and run the same command again") from e


def link_anew(source: str, path: str) -> None:
    """Give a whole file a second name, which must be new.

    On a file system without hard links (exFAT, some network mounts) the file is copied, and another
    process may see a part of it.

    Raises:
        FileExistsError: the name exists.
        OSError: the file cannot be linked or copied.
    """
    try:
        os.link(source, path)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        with open(source, "rb") as file, open(path, "xb") as copy:
            copy.write(file.read())


def _is_uri(text: str) -> bool:
    return re.match(r"^[a-z][a-z0-9+.-]*://", text) is not None


def split_uri(file: str | os.PathLike[str]) -> tuple[Storage, str]:
    """Split the path or URI of a file into the directory that holds it and its name.

    The directory has the options of the URI. A URI without a directory is returned whole, with an
    empty name. Raises as :class:`Storage`.
    """
    text = os.fspath(file)
    if not _is_uri(text):
        path = Path(text).expanduser().absolute()
        return Storage(path.parent), path.name
    check_no_secret(text)
    text, _, options = (text, "", "") if text.startswith("file://") else text.partition("?")
    protocol, _, below = text.rstrip("/").partition("://")
    parent, _, name = below.rpartition("/")
    if not parent:
        parent, name = below, ""
    return Storage(f"{protocol}://{parent}{'?' * bool(options)}{options}"), name


def join_uri(root: str, name: str) -> str:
    """Return the URI of a file or directory below ``root``, with the options of ``root``."""
    return Storage(root).join(name)


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI, and the path in it.

    Raises:
        ConfigError: there is no such place.
        StorageError: it cannot be reached.
    """
    if uri.startswith("/"):
        return pafs.LocalFileSystem(), uri
    scheme, _, rest = uri.partition("://")
    if not rest:
        raise ConfigError.of("storage", uri, PLACE[1])
    if scheme in ("file", "local") and not rest.startswith("/"):
        raise ConfigError.of("storage", uri, f"absolute: {scheme}:///{rest} (three slashes)")
    allowed, reason = "a path or a URI of pyarrow or fsspec", ""
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        return fs, root
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        if not str(e).startswith("Unrecognized filesystem"):
            reason = first_line(e)
        # fsspec may know the protocol, but would take pyarrow's options for a part of the path.
        if reason and "?" in uri:
            raise ConfigError.of("storage", uri, f"{allowed} ({reason})") from None
    except OSError as e:
        raise StorageError(f"storage {uri} cannot be opened: {first_line(e)}") from e
    except ImportError as e:
        raise ConfigError.of("storage", uri, f"{allowed} ({e})") from None
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root
    except OSError as e:
        raise StorageError(f"storage {uri} cannot be opened: {first_line(e)}") from e
    except Exception as e:  # A protocol that needs more than a URI raises TypeError, AttributeError, ...
        raise ConfigError.of("storage", uri, f"{allowed} ({reason or first_line(e)})") from None
