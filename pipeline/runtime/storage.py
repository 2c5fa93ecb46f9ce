"""Files of a run on any storage: a local path or a URI that pyarrow or fsspec knows (``s3://bucket/path``).

One small class gives every stage the same guarantees. A file is whole or absent. A storage that does not answer is asked
again for RETRY_S seconds. A full disk or an unreachable bucket is one clear error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from components.errors import ConfigError, UserError, first_line
from pipeline.runtime.console import say
from pipeline.runtime.redaction import check_no_secret

T = TypeVar("T")

RETRY_S = 180.0
"""How long an operation is repeated while the storage fails for a reason that may pass."""
HALF_WRITTEN_S = 3600.0
"""A temporary file that has not grown for so long belongs to a process that is gone, whatever two hosts' clocks say."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
PASSING_ERRNO = {
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EINTR", "EIO", "EREMOTEIO", "ESTALE", "EPIPE", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN"),
    )
    if hasattr(errno, name)
}
PASSING_TEXT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT|REQUEST_LIMIT_EXCEEDED"
    r"|curlCode: (?!60\b|51\b)|HTTP (?:response code|status):? (?:429|5\d\d)|(?:timed? ?out|temporarily|try again)",
    re.IGNORECASE,
)
"""Object stores say in words what went wrong. (curl's 51 and 60 are certificates, which do not mend themselves.)"""
STORE_TEXT = re.compile(r"AWS Error|curlCode|google::cloud|Azure")
"""What errors of Arrow's object stores have in their text; they have no error number."""


class StorageError(UserError):
    """The storage could not be read or written; what was already written is kept."""


def may_pass(error: BaseException) -> bool:
    """Tell whether an error of a file system may be gone in a moment (a lost connection, an overloaded server)."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING_ERRNO
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(PASSING_TEXT.search(str(error)))


def is_access(error: BaseException) -> bool:
    """Tell whether an error is about reaching a file, not about what is in it. Arrow raises OSError for both."""
    by_system = isinstance(error, OSError) and error.errno is not None
    return by_system or may_pass(error) or bool(STORE_TEXT.search(str(error)))


def patiently(action: Callable[[], T], place: str, patience_s: float | None = None) -> T:
    """Return what ``action`` returns. It is repeated for RETRY_S (or ``patience_s``) seconds while it fails for a reason
    that may pass; a message says so once.

    Args:
        place: what does not answer then, for the message.
    """
    deadline = time.monotonic() + (RETRY_S if patience_s is None else patience_s)
    pause, announced = FIRST_PAUSE_S, False
    while True:
        try:
            return action()
        except (OSError, pa.ArrowException) as e:
            if not may_pass(e) or time.monotonic() + pause > deadline:
                raise
            if not announced:
                say(f"{place} does not answer ({e}); it is asked again for up to {RETRY_S:.0f} s")
                announced = True
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


class Storage:
    """A directory on some file system. Picklable: workers open their own connection.

    Args:
        uri: absolute or ``~`` path, or URI (``file://``, ``s3://``, ``gs://``, or any fsspec protocol), with pyarrow's
            options behind a ``?`` (``s3://bucket/path?region=eu-west-1&endpoint_override=minio:9000``).

    Raises:
        ConfigError: a relative path (it would mean another place on every node), an unknown protocol, or a URI with a
            password or key, which would stand in every record.
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
                raise ConfigError.of("storage", text, "an absolute path, a ~ path or a URI such as s3://bucket/path")
            text = os.path.normpath(text)
        self.uri = text.rstrip("/") or "/"
        """For people: without the options."""
        self.fs, self.root = _resolve(self.full_uri)

    @property
    def full_uri(self) -> str:
        """URI that opens this directory again, options included."""
        return self.uri + self._query

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.full_uri,)

    def __repr__(self) -> str:
        return f"Storage({self.full_uri!r})"

    def __truediv__(self, name: str) -> Self:
        below = type(self).__new__(type(self))
        # one connection serves the whole tree: opening one costs an object store a round trip or two
        below.__dict__.update(self.__dict__)
        below.uri, below.root = f"{self.uri.rstrip('/')}/{name}", self.path(name)
        return below

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
        """Path of a file below this directory, for use with ``self.fs``.

        Raises:
            StorageError: the name leads out of the directory. Names come from records, which others may have written.
        """
        if ".." in name.split("/"):
            raise StorageError(f"{name!r} leads out of {self.uri}: a name below a storage has no '..'")
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def join(self, name: str) -> str:
        """URI of a file or directory below, options included, for what opens it by itself."""
        return (self / name).full_uri

    def patiently(self, action: Callable[[], T], patience_s: float | None = None) -> T:
        """Return what ``action`` returns, as :func:`patiently` does."""
        return patiently(action, f"storage {self.uri}", patience_s)

    @contextlib.contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        """Turn what a file system raises into one StorageError."""
        try:
            yield
        except FileNotFoundError:
            raise StorageError(f"{self.uri}/{name} does not exist; check the path") from None
        except (OSError, pa.ArrowException) as e:
            raise StorageError(f"{self.uri}/{name} could not be {done}: {e}") from e

    def exists(self, name: str = "") -> bool:
        path = self.path(name)
        with self._errors(name, "read"):
            return self.patiently(lambda: self.fs.get_file_info(path)).type != pafs.FileType.NotFound

    def list(self, name: str = "") -> list[str]:
        """Names of the files and directories directly below, sorted; empty where there is no such directory."""
        # names that begin with a dot are files half written
        return sorted(i.base_name for i in self._infos(name) if not i.base_name.startswith("."))

    def _infos(self, name: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        with self._errors(name, "listed"):
            return list(self.patiently(lambda: self.fs.get_file_info(selector)))

    def read_bytes(self, name: str) -> bytes:
        path = self.path(name)

        def read() -> bytes:
            with self.fs.open_input_stream(path) as stream:
                return bytes(stream.read())

        with self._errors(name, "read"):
            return self.patiently(read)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file for random access."""
        path = self.path(name)
        with self._errors(name, "read"), self.patiently(lambda: self.fs.open_input_file(path)) as file:
            yield file

    def write_bytes(self, name: str, data: bytes | pa.Buffer, patience_s: float | None = None) -> None:
        """Write a whole file or nothing: to a temporary name and then moved, or as one object on an object store."""
        self._write(name, data, patience_s, anew=False)

    def write_if_absent(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one of that name. Returns whether it was written.

        Atomic on a local or network file system. An object store has no such operation that pyarrow offers: of two that
        write in the same moment the later stands there, so ask again who did.
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
            return self.patiently(lambda: self._write_once(path, data, anew), patience_s)
        except (OSError, pa.ArrowException) as e:
            raise StorageError(
                f"{self.uri}/{name} could not be written: {e}. What was written before is kept: "
                "make room or give another storage, then run the same command again to continue"
            ) from e

    def _write_once(self, path: str, data: bytes | pa.Buffer, anew: bool) -> bool:
        """Write a file by way of another name. Returns whether it was written: not if ``anew`` (local alone) and there is one."""
        parent, _, base = path.rpartition("/")
        temporary = path if self._is_object_store else f"{parent}/.{base}.{secrets.token_hex(4)}.tmp"
        try:
            if self.is_local:
                os.makedirs(parent, exist_ok=True)
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut leaves an empty file under the final name
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
        except BaseException:  # a task that is cancelled while it writes leaves nothing either
            if temporary != path:
                with contextlib.suppress(OSError):
                    self.fs.delete_file(temporary)
            raise

    @property
    def _is_object_store(self) -> bool:
        """Whether an object appears under its name only when it is complete (and directories do not exist)."""
        return bool(re.search(r"\b(s3|s3a|gcs|gs|abfs|abfss|adl|az)\b", self.fs.type_name))

    def delete_stale(self, directory: str, older_than_s: float) -> None:
        """Delete files half written below a directory by processes that were killed, so that they do not fill the disk.

        ``older_than_s`` seconds without a change tell them from those that another process is writing now.
        """
        if self._is_object_store:  # there are none: an object appears when it is complete
            return
        for info in self._infos(directory):
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

    def delete(self, name: str, patience_s: float | None = None) -> None:
        """Delete a file; not an error where there is none."""
        path = self.path(name)
        with self._errors(name, "deleted"), contextlib.suppress(FileNotFoundError):
            self.patiently(lambda: self.fs.delete_file(path), patience_s)

    def check_writable(self) -> None:
        """Write and delete a small file, before hours of compute are spent. Does not wait for what does not answer.

        Raises:
            StorageError: naming the storage and the system's reason.
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


def link_anew(source: str, path: str) -> None:
    """Give a whole file a second name that must be new. Raises FileExistsError, OSError.

    A file system without hard links (exFAT, some network mounts) gets a copy, which another process may see half written.
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

    Args:
        file: a path, also a relative or ``~`` one, or a URI, which may have options behind a ``?``.

    Returns:
        The directory, with those options, and the name. Of a URI without a directory the first is all of it, the name empty.

    Raises:
        ConfigError: as :class:`Storage`.
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
    """URI of a file or directory below ``root``, which may have options behind a ``?``."""
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
        raise ConfigError.of("storage", uri, "an absolute path, a ~ path or a URI such as s3://bucket/path")
    if scheme in ("file", "local") and not rest.startswith("/"):
        raise ConfigError.of("storage", uri, f"absolute: {scheme}:///{rest} (three slashes)")
    allowed, reason = "a path or a URI of pyarrow or fsspec", ""
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        return fs, root
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        if not str(e).startswith("Unrecognized filesystem"):
            reason = first_line(e)
        # fsspec may open what pyarrow does not, but would take pyarrow's options for a part of the path.
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
    except Exception as e:  # A protocol that takes more than a URI raises a TypeError, an AttributeError, ...
        raise ConfigError.of("storage", uri, f"{allowed} ({reason or first_line(e)})") from None
