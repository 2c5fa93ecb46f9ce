"""Whatever lies in a user's directory is read as torchvision reads it, or refused by one error that names it."""

from __future__ import annotations

import errno
import os
import socket
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import IMAGE, PNG, folders, hub, outcome, write_parquet
from storages import Flaky

from components.config import DataConfig
from components.errors import ConfigError, DataError, UserError
from pipeline.data.sources.base import Source
from pipeline.data.sources.open import check_source, open_source
from pipeline.runtime import retries
from pipeline.runtime.user_files import reason

# -- what is no file ------------------------------------------------------------------------------


def link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def socket_at(path: Path) -> None:
    # the address of a socket is at most 107 bytes long
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(before)


NO_FILE: dict[str, Callable[[Path], None]] = {
    "link to nothing": link("gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "socket": socket_at,
    "device": link("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", ["a/sub/9.png", "a/9", "c"])
def test_what_is_no_file_is_refused_in_a_folder(tmp_path: Path, kind: str, name: str) -> None:
    data = folders(tmp_path, *(f"{split}/{label}/0.png" for split in ("train", "test") for label in "ab"))
    (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
    NO_FILE[kind](tmp_path / "train" / name)
    with pytest.raises(DataError, match=rf"/train/{name} is neither a file nor a folder"):
        check_source(data)
    check_source(data, trains=False)
    NO_FILE[kind](tmp_path / "train" / "a" / "zz.jpg")
    with pytest.raises(DataError, match=r"\(the first of 2\) is neither"):
        check_source(data)


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", ["train-00001-of-00002.parquet", "test/0001.parquet", "other.parquet"])
def test_what_is_no_file_is_refused_among_parquet_files(tmp_path: Path, kind: str, name: str) -> None:
    data = hub(tmp_path, "train-00000-of-00001.parquet", "test/0000.parquet")
    NO_FILE[kind](tmp_path / name)
    with pytest.raises(DataError, match=rf"/{name} is neither a file nor a folder .*; replace, rename or remove it"):
        check_source(data)


def test_a_broken_link_to_a_split_is_named(tmp_path: Path) -> None:
    data = folders(tmp_path, "train/a/0.png", "train/b/0.png")
    (tmp_path / "test").symlink_to("gone")
    (tmp_path / "val").symlink_to("train")  # must not take the place of test
    with pytest.raises(DataError, match=r"/test is no folder but a broken link"):
        check_source(data)
    (tmp_path / "test").unlink()
    (tmp_path / "train").rename(tmp_path / "moved")
    (tmp_path / "val").unlink()
    (tmp_path / "val").symlink_to("moved")
    check_source(data, trains=False)
    (tmp_path / "train").symlink_to("gone")  # the order of its classes may be another
    with pytest.raises(DataError, match=r"/train is no folder but a broken link"):
        check_source(data, trains=False)
    data = hub(tmp_path / "p", "validation.parquet")
    (tmp_path / "p" / "test").symlink_to("gone")
    with pytest.raises(DataError, match=r"/p/test is neither a file nor a folder"):
        check_source(data, trains=False)


def test_a_folder_is_no_parquet_file(tmp_path: Path) -> None:
    data = hub(tmp_path, "train.parquet", "test.parquet/part-00000.parquet")
    with pytest.raises(DataError, match=r"/test\.parquet is a folder, not a file; replace, rename or remove"):
        check_source(data)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    folders(tmp_path / "real", "a/0.png", "b/0.png")
    (tmp_path / "data" / "val").mkdir(parents=True)
    for label in ("a", "b"):
        (tmp_path / "data" / "val" / label).symlink_to(tmp_path / "real" / label)
    (tmp_path / "data" / "val" / "a" / "1.png").symlink_to(tmp_path / "real" / "b" / "0.png")
    data = DataConfig(source=f"folder:{tmp_path}/data", num_classes=2)
    assert check_source(data, trains=False)[0].startswith("test: 3 images")


def test_folders_below_the_third_level_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = hub(tmp_path, "a/b/c/d/test.parquet")
    scandir, listed = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    assert "no file for the test split" in outcome(data)
    assert {path.removeprefix(str(tmp_path)) for path in listed} == {"", "/a", "/a/b"}


def test_a_plain_file_called_train_is_no_split(tmp_path: Path) -> None:
    data = folders(tmp_path, "test/a/0.png", "test/b/0.png")
    (tmp_path / "train").write_bytes(b"a list of files")
    assert outcome(data) == "read"
    (tmp_path / "train").unlink()
    (tmp_path / "train").symlink_to("gone")
    assert "/train is no folder but a broken link" in outcome(data)


def test_files_are_checked_without_keeping_what_is_known_of_each(tmp_path: Path) -> None:
    data = folders(tmp_path, *(f"test/{label}/{i}.png" for label in "ab" for i in range(1000)))
    source = open_source(data, "test")
    tracemalloc.start()
    try:
        source.check_files()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_file_that_vanishes_or_is_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path, "val/a/0.png", "val/b/0.png", "val/b/1.png")
    (tmp_path / "val" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"val/b/1\.png is empty; get the file again"):
        check_source(data, trains=False)
    (tmp_path / "val" / "b" / "1.png").write_bytes(PNG)
    source = open_source(data, "test")
    (tmp_path / "val" / "b" / "1.png").unlink()
    for look in (lambda: source.fingerprint, source.check_files):
        with pytest.raises(DataError, match=r"val/b/1\.png was listed, but cannot be looked at now \(No such file"):
            look()
    (tmp_path / "val" / "b" / "1.png").mkdir()
    with pytest.raises(DataError, match=r"val/b/1\.png cannot be read \(Is a directory\)"):
        source.read(np.arange(3))
    (tmp_path / "val" / "b" / "1.png").rmdir()
    # these tests may run as root, who may read everything
    (tmp_path / "val" / "a" / "0.png").chmod(0o600)
    monkeypatch.setattr(os, "access", lambda path, mode: "/a/" not in path)
    with pytest.raises(DataError, match=r"val/a/0\.png cannot be read by this user"):
        check_source(data, trains=False)


def test_a_parquet_file_that_vanishes_is_named(tmp_path: Path) -> None:
    data = hub(tmp_path, "test.parquet")
    source = open_source(data, "test")
    (tmp_path / "test.parquet").unlink()
    for look in (lambda: source.fingerprint, source.labels, lambda: source.read(np.arange(1))):
        with pytest.raises(DataError, match=r"/test\.parquet does not exist on this machine"):
            look()
    (tmp_path / "test.parquet").mkdir()
    for look in (lambda: source.fingerprint, source.labels):
        with pytest.raises(DataError, match=r"/test\.parquet (cannot be read|is not a readable Parquet file) \("):
            look()


class Remote(Flaky):
    """A file system of fsspec, remote://PATH, whose connection may also be lost within a file."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("remote://")))

    def open(self, *args: Any, **kwargs: Any) -> Any:
        file = super().open(*args, **kwargs)
        read = file.read

        def reading(*sizes: int) -> bytes:
            self._maybe_fail()
            return bytes(read(*sizes))

        file.read = reading
        return file


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Parquet files on a file system that fails as often as ``Remote.failures`` says."""
    fsspec.register_implementation("remote", Remote, clobber=True)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(Remote, "failures", 0)
    data = hub(tmp_path, "train.parquet", "test.parquet")
    return replace(data, source=data.source.replace("parquet:", "parquet:remote://"))


ACTS: dict[str, Callable[[DataConfig, Source], object]] = {
    "open": lambda data, _: open_source(data, "test"),
    "labels": lambda _, source: source.labels(),
    "fingerprint": lambda _, source: source.fingerprint,
    "read": lambda _, source: source.read(np.arange(1)),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_remote_data_set_that_does_not_answer_is_asked_again(
    act: str, remote: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(remote, "test")
    monkeypatch.setattr(Remote, "failures", 2)
    ACTS[act](remote, source)
    assert Remote.failures == 0
    assert "does not answer" in capsys.readouterr().out


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached"),
        OSError("AWS Error ACCESS_DENIED during GetObject operation: Access Denied"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError("no answer"),
    ],
)
def test_a_data_set_that_cannot_be_reached_is_not_called_corrupt(
    act: str, error: OSError, remote: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(remote, "test")
    monkeypatch.setattr(retries, "RETRY_S", 0.02)
    monkeypatch.setattr(Remote, "error", error)
    monkeypatch.setattr(Remote, "failures", 1000)
    with pytest.raises(UserError, match=reason(error)) as caught:
        ACTS[act](remote, source)
    assert "corrupt" not in str(caught.value)
    if act != "open":
        assert "check the connection and your access" in str(caught.value)


def test_local_files_on_a_disk_that_fails_for_a_moment_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    data = folders(tmp_path, "val/a/0.png", "val/b/0.png")
    scandir, errors = os.scandir, [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def stale(path: str) -> Any:
        if errors:
            raise errors.pop()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    assert outcome(data) == "read"
    assert not errors


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folders(tmp_path, "val/a/0.png", "val/b/0.png")
    scandir = os.scandir

    def refused(path: str) -> Any:
        if path.endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"/val/b cannot be listed \(Permission denied\)"):
        check_source(data, trains=False)
    data = hub(tmp_path / "p", "data/test.parquet", "b/test.parquet")  # not readable: not a configuration
    assert outcome(data) == "read"
    monkeypatch.setattr(os, "scandir", lambda path: refused("/b" if path.endswith("/test") else path))
    with pytest.raises(DataError, match=r"/test cannot be listed \(Permission denied\)"):
        check_source(hub(tmp_path / "q", "test/0000.parquet"), trains=False)


def test_a_split_whose_only_file_is_broken_is_named(tmp_path: Path) -> None:
    data = hub(tmp_path, "data/train.parquet")
    (tmp_path / "data" / "test").mkdir()
    (tmp_path / "data" / "test" / "0000.parquet").symlink_to("gone")
    with pytest.raises(DataError, match=r"/data/test/0000\.parquet is neither a file nor a folder"):
        check_source(data, trains=False)


@pytest.mark.parametrize("source", ["parquet:{}/x.parquet", "folder:{}/x.parquet", "parquet:{}/" + "n" * 300])
def test_a_source_that_is_no_directory(tmp_path: Path, source: str) -> None:
    hub(tmp_path, "x.parquet")
    with pytest.raises(UserError, match=r"(cannot be listed|is not a directory|File name too long)"):
        open_source(DataConfig(source=source.format(tmp_path)), "test")


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "línea\nnueva", "\U0001f98b", "%20", "n" * 250, "'\"$(x)", "\x7f", "\xa0"])
def test_names_in_utf8_are_read(tmp_path: Path, name: str) -> None:
    data = folders(tmp_path / name, f"val/{name}/{name}.png", "val/zz/0.png")
    assert outcome(data) == "read"
    (tmp_path / name / "val" / name / f"{name}.png").write_bytes(b"no image")
    assert "the image cannot be decoded" in outcome(data)
    data = hub(tmp_path / "p" / name, "data/test.parquet")
    assert outcome(data) == "read"
    (tmp_path / "p" / name / "data" / "test.parquet").write_bytes(b"no Parquet")
    assert "is not a readable Parquet file" in outcome(data)


def test_names_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    data = folders(tmp_path, "val/a/0.png", "val/b/0.png")
    for name in (b"val/a/caf\xe9.png", b"val/b/\xff.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(PNG)
    assert r"/val/a/caf\udce9.png (the first of 2) has a name that is not UTF-8; rename it" in outcome(data)
    data = folders(tmp_path / "c", "val/a/0.png", "val/b/0.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/c/val/\xff")).mkdir()
    assert r"/c/val/\udcff has a name that is not UTF-8" in outcome(
        replace(data, allow_empty_classes=True, num_classes=3)
    )
    data = hub(tmp_path / "p", "test.parquet")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/p/\xff.txt")).write_bytes(b"")
    assert outcome(data) == "read"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/p/test-\xff.parquet")).write_bytes(b"")
    assert r"/p/test-\udcff.parquet is not a name in UTF-8; replace, rename" in outcome(data)
    for kind in ("folder", "parquet"):
        with pytest.raises(ConfigError, match=r"udcff'; it must be a path in UTF-8"):
            open_source(DataConfig(source=f"{kind}:/data/\udcff"), "test")
        with pytest.raises(ConfigError, match=r"x00b'; it must be a path in UTF-8"):
            open_source(DataConfig(source=f"{kind}:/data/a\0b"), "test")


# -- Parquet -------------------------------------------------------------------------------------

STRUCTS: dict[str, pa.DataType] = {
    "text": pa.struct([("bytes", pa.string()), ("path", pa.string())]),
    "a list of numbers": pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.string())]),
    "numbers": pa.struct([("bytes", pa.int64())]),
    "no bytes": pa.struct([("path", pa.string())]),
    "a list of images": pa.list_(IMAGE),
}


@pytest.mark.parametrize("kind", STRUCTS)
def test_images_of_another_type_are_refused(tmp_path: Path, kind: str) -> None:
    table = pa.table({"image": pa.nulls(2, STRUCTS[kind]), "label": [0, 1]})
    pq.write_table(table, tmp_path / "test.parquet")
    message = r"test\.parquet: column 'image' is .*, not a struct of bytes and path .*--data\.image-column"
    with pytest.raises(DataError, match=message):
        check_source(DataConfig(source=f"parquet:{tmp_path}", num_classes=2), trains=False)


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()])
def test_images_of_large_binary_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    images = pa.array([{"bytes": PNG, "path": None}] * 2, pa.struct([("bytes", kind), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "test.parquet")
    assert outcome(DataConfig(source=f"parquet:{tmp_path}", num_classes=2)) == "read"


def test_parquet_files_without_rows(tmp_path: Path) -> None:
    data = hub(tmp_path, "test-00000-of-00002.parquet", classes=3)
    schema = pq.read_schema(tmp_path / "test-00000-of-00002.parquet")
    pq.ParquetWriter(tmp_path / "test-00001-of-00002.parquet", schema).close()  # no row group at all
    assert outcome(data) == "read"
    for rows in ([], [0]):
        path = tmp_path / "test-00000-of-00002.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for _ in rows:
                writer.write_table(schema.empty_table())
        assert outcome(data).endswith("the test split has no image; give a --data.source that has some")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"\0" * 5000])
def test_files_that_are_no_parquet(tmp_path: Path, content: bytes) -> None:
    data = hub(tmp_path, "test.parquet")
    (tmp_path / "test.parquet").write_bytes(content)
    assert "/test.parquet is not a readable Parquet file" in outcome(data)


def test_a_bad_image_is_named_by_file_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [PNG, PNG, None, PNG], [0, 1, 2, 0])
    assert "/test.parquet row 2: there is no image" in outcome(DataConfig(source=f"parquet:{tmp_path}", num_classes=3))


@settings(max_examples=150)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_parquet_files_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, int]]
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    data = hub(directory, "test.parquet")
    damaged = bytearray((directory / "test.parquet").read_bytes())
    for place, value in edits:
        damaged[int(place * (len(damaged) - 1))] = value
    (directory / "test.parquet").write_bytes(damaged)
    outcome(replace(data, allow_empty_classes=True))


def test_the_reason_is_one_line() -> None:

    assert reason(OSError(2, "No such file", "x")) == "No such file"
    assert reason(ValueError("one\ntwo")) == "one"
    assert reason(EOFError()) == "EOFError"
