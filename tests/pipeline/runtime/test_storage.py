"""A file is whole or absent, on a local disk and behind a URI; errors name the place and the remedy."""

from __future__ import annotations

import errno
import os
import pickle
import re
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from storages import Flaky, FsspecStorage

from components.errors import ConfigError, UserError
from pipeline.runtime import retries
from pipeline.runtime.storage import Storage, StorageError, split_uri


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


@pytest.mark.parametrize("operation", ["exists", "list", "read_bytes", "write_bytes"])
@pytest.mark.parametrize("error", [Flaky.error, OSError(errno.ECONNRESET, "reset"), OSError(errno.ESTALE, "stale")])
def test_a_storage_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], operation: str, error: OSError
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(Flaky, "error", error)
    storage = Storage(tmp_path)
    storage.fs = pafs.PyFileSystem(pafs.FSSpecHandler(Flaky()))
    storage.write_bytes("a", b"1")
    arguments = {"list": [], "write_bytes": ["a", b"2"]}.get(operation, ["a"])
    monkeypatch.setattr(Flaky, "failures", 3)
    getattr(storage, operation)(*arguments)
    assert Flaky.failures == 0
    assert capsys.readouterr().out.count("does not answer") == 1, "said once"
    monkeypatch.setattr(retries, "RETRY_S", 0.05)
    monkeypatch.setattr(Flaky, "failures", 1000)
    with pytest.raises(StorageError, match=f"{tmp_path}.*{re.escape(str(error))}"):
        getattr(storage, operation)(*arguments)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no"), OSError(errno.ENOSPC, "full"), OSError("AWS Error ACCESS_DENIED")]
)
def test_what_does_not_pass_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(Flaky, "error", error)
    monkeypatch.setattr(Flaky, "failures", 1)
    storage = Storage(tmp_path)
    storage.fs = pafs.PyFileSystem(pafs.FSSpecHandler(Flaky()))
    with pytest.raises(StorageError):
        storage.exists("a")
    assert Flaky.failures == 0


def test_options_of_a_uri_are_no_part_of_the_path() -> None:
    storage = Storage("s3://bucket/dir?region=eu-west-1&endpoint_override=127.0.0.1:1&scheme=http")
    below = storage / "models" / "a"
    assert (storage.root, below.root) == ("bucket/dir", "bucket/dir/models/a")
    assert below.uri == "s3://bucket/dir/models/a"
    assert below.full_uri == "s3://bucket/dir/models/a?region=eu-west-1&endpoint_override=127.0.0.1:1&scheme=http"
    assert storage.join("models/a") == below.full_uri
    for again in (Storage(below.full_uri), pickle.loads(pickle.dumps(below))):
        assert again.root == below.root
        assert again.fs.region == "eu-west-1"


@pytest.mark.parametrize(
    ("file", "directory", "name"),
    [
        ("/a/b/x.pth", "/a/b", "x.pth"),
        ("/a/b/x?y#z.pth", "/a/b", "x?y#z.pth"),
        ("/x.pth", "/", "x.pth"),
        ("~/x.pth", "{home}", "x.pth"),
        ("x.pth", "{here}", "x.pth"),
        ("file:///a/x.pth", "file:///a", "x.pth"),
        ("memory://b/c/x.pth", "memory://b/c", "x.pth"),
        ("memory://x.pth", "memory://x.pth", ""),
        (
            "s3://b/c/x.pth?endpoint_override=minio:9000&region=x",
            "s3://b/c?endpoint_override=minio:9000&region=x",
            "x.pth",
        ),
        (
            "s3://b/x.pth?endpoint_override=http://m:9000&region=x",
            "s3://b?endpoint_override=http://m:9000&region=x",
            "x.pth",
        ),
        ("s3://b?region=x", "s3://b?region=x", ""),
    ],
)
def test_a_files_uri_is_its_directory_and_its_name(file: str, directory: str, name: str) -> None:
    storage, file_name = split_uri(file)
    assert (storage.full_uri, file_name) == (directory.format(home=Path.home(), here=os.getcwd()), name)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter2@bucket/dir",
        "s3://bucket/dir?access_key=AKIAEXAMPLE&secret_key=hunter2",
        "abfss://container@account/dir?sas_token=hunter2",
        "ftp://user:hunter2@host/dir",
    ],
)
def test_a_uri_with_a_password_is_refused_without_repeating_it(uri: str) -> None:
    for opened in (Storage, split_uri):
        with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
            opened(uri)
        assert "hunter2" not in str(caught.value)


def test_the_directory_above_opens_with_the_same_options() -> None:
    run = Storage("s3://bucket/team/runs/mnist-0a1b?endpoint_override=minio:9000&region=x")
    assert run.parent.full_uri == "s3://bucket/team/runs?endpoint_override=minio:9000&region=x"
    assert run.parent.parent.uri == "s3://bucket/team"
    assert Storage("/data/runs").parent.parent.uri == "/"


def test_a_file_at_the_top_has_one_slash() -> None:
    with pytest.raises(StorageError, match=r"^/nope\.json does not exist; check the path$"):
        Storage("/").read_json("nope.json")


def test_names_do_not_lead_out_of_a_storage(storage: Storage) -> None:
    for act in (storage.read_bytes, storage.exists, storage.list, lambda name: storage / name):
        with pytest.raises(StorageError, match=r"'\.\./other' leads out of"):
            act("../other")


def test_a_file_is_created_by_one(storage: Storage) -> None:
    assert storage.write_if_absent("a/b", b"1")
    assert not storage.write_if_absent("a/b", b"2")
    assert storage.read_bytes("a/b") == b"1"
    assert storage.list("a") == ["b"]


def test_of_a_file_that_is_there_and_of_one_that_cannot_be_nothing_is_left(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for _ in range(2):
        storage.write_if_absent("file", b"1")
    with pytest.raises(StorageError, match="file/below could not be written"):
        storage.write_if_absent("file/below", b"2")
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Storage(tmp_path).write_bytes("a", b"1")
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/x?endpoint=minio:9000", "Unexpected query parameter in S3 URI: 'endpoint'"),
        ("gs://bucket/x?foo=1", "Unexpected query parameter in GCS URI: 'foo'"),
        ("abfs://container/x", "AzureOptions doesn't contain a valid account name"),
        ("file://data/x", "file:///data/x (three slashes)"),
        ("local://data/x", "local:///data/x (three slashes)"),
        ("s3://", "an absolute path, a ~ path or a URI"),
        ("memory://", "an absolute path, a ~ path or a URI"),
        ("dir://a", "a URI of pyarrow or fsspec"),
        ("github://a", "a URI of pyarrow or fsspec"),
        ("generic://a", "a URI of pyarrow or fsspec"),
        ("ftp://127.0.0.1:1/d", "Connection refused"),
        ("zip://", "an absolute path, a ~ path or a URI"),
        ("zip://a", "Is a directory"),
        ("http://127.0.0.1:1/d", "only be read. Give another one with --storage"),
        ("hdfs://127.0.0.1:1/d", "cannot be opened"),
    ],
)
def test_a_uri_that_cannot_be_a_storage_is_one_error_of_one_line(
    uri: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        Storage(uri).check_writable()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/a/../b").uri == f"{tmp_path}/b"
    assert Storage(tmp_path / "a").local_root == tmp_path / "a"
    for bad in ("relative/path", "nosuchprotocol://bucket/path"):
        with pytest.raises(ConfigError, match="storage is"):
            Storage(bad)
