"""A file is whole or absent, on a local disk and behind a URI; errors name the place and the remedy."""

from __future__ import annotations

import errno
import os
import pickle
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.local import LocalFileSystem

from components.errors import ConfigError
from pipeline.storage import Storage, StorageError


class FsspecStorage(Storage):
    """A local directory reached as any file system of fsspec is, not by pyarrow's own local one."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs = pafs.PyFileSystem(pafs.FSSpecHandler(LocalFileSystem()))


@pytest.fixture(params=["path", "file", "fsspec"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "fsspec":
        return FsspecStorage(str(tmp_path / "run"))
    return Storage(f"file://{tmp_path}/run" if request.param == "file" else tmp_path / "run")


def test_write_read_list_delete(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("a/b.json")
    assert storage.list("a") == []
    storage.write_json("a/b.json", {"z": 1, "a": [1.5]})
    storage.write_bytes("a/c", b"123")
    storage.write_bytes("a/c", b"45")
    assert storage.exists("a")
    assert storage.exists("a/b.json")
    assert storage.read_json("a/b.json") == {"z": 1, "a": [1.5]}
    assert (storage / "a").read_bytes("c") == b"45"
    assert storage.list() == ["a"]
    assert storage.list("a") == ["b.json", "c"]
    assert sorted(os.listdir(tmp_path / "run" / "a")) == ["b.json", "c"]  # nothing temporary is left
    storage.delete("a/c")
    storage.delete("a/c")
    assert storage.list("a") == ["b.json"]


def test_pickle(storage: Storage) -> None:
    storage.write_bytes("a", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert type(again) is type(storage)
    assert again.uri == storage.uri
    assert again.read_bytes("a") == b"1"


def test_memory_uri() -> None:
    storage = Storage("memory://bucket/run")
    storage.write_bytes("a/b", b"1")
    assert Storage("memory://bucket").read_bytes("run/a/b") == b"1"
    assert not storage.is_local
    with pytest.raises(StorageError, match="not on this machine"):
        _ = storage.local_root


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"{tmp_path}/a could not be written.*{os.strerror(number)}.*to continue"):
        storage.write_bytes("a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read_bytes("a") == b"old"


def test_read_errors(storage: Storage) -> None:
    with pytest.raises(StorageError, match="nothing does not exist"):
        storage.read_bytes("nothing")
    storage.write_bytes("broken.json", b'{"a": ')
    with pytest.raises(StorageError, match="not valid JSON"):
        storage.read_json("broken.json")


def test_check_writable(tmp_path: Path) -> None:
    Storage(tmp_path / "new").check_writable()
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is not writable"):
        Storage(tmp_path / "file" / "below").check_writable()


def test_delete_stale(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("a/whole", b"1")
    directory = tmp_path / "run" / "a"
    for name in (".old.0123.tmp", ".new.0123.tmp"):
        (directory / name).write_bytes(b"half")
    os.utime(directory / ".old.0123.tmp", (time.time() - 100,) * 2)
    storage.delete_stale("a", older_than_s=60)
    assert sorted(os.listdir(directory)) == [".new.0123.tmp", "whole"]
    storage.delete_stale("nothing", older_than_s=60)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/a/../b").uri == f"{tmp_path}/b"
    assert Storage(tmp_path / "a").local_root == tmp_path / "a"
    for bad in ("relative/path", "nosuchprotocol://bucket/path"):
        with pytest.raises(ConfigError, match="storage="):
            Storage(bad)
