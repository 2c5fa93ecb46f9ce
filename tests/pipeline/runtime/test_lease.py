"""One holder per directory, whatever the clocks of two hosts say; a holder that is gone is noticed."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.errors import UserError
from pipeline.runtime import lease
from pipeline.runtime.lease import Lease, WorkingLease
from pipeline.runtime.storage import Storage


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRY_S", 0.4)


def mark(directory: Storage, host: str, pid: int, *, beat: int = 1, behind_s: float = 0.0) -> None:
    here = Lease(directory).identity
    holder = {**here, "host": host, "pid": pid, "token": "other", "heartbeat": beat, "alive": time.time() - behind_s}
    directory.write_json(lease.FILE, holder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_a_file_that_nobody_can_read_is_replaced_after_a_while(tmp_path: Path, text: str) -> None:
    (tmp_path / lease.FILE).write_text(text)
    first = Lease(Storage(tmp_path)).acquire()
    assert Storage(tmp_path).read_json(lease.FILE)["pid"] == os.getpid()
    first.release()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_hard_links_has_leases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = Lease(Storage(tmp_path)).acquire()
    assert not Lease(Storage(tmp_path)).try_acquire()
    first.release()
    assert os.listdir(tmp_path) == []


def test_a_living_process_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    directory = Storage(tmp_path)
    first = Lease(directory).acquire()
    begin = time.monotonic()
    for refuse in (Lease(directory).acquire, Lease(directory).check_free):
        with pytest.raises(
            UserError, match=f"{tmp_path} is being worked on by process {os.getpid()} on .*ray job stop"
        ):
            refuse()
    assert time.monotonic() - begin < 10, "without watching it"
    first.release()
    assert not directory.exists(lease.FILE)
    Lease(directory).acquire().release()


def test_a_process_that_has_ended_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    mark(Storage(tmp_path), socket.gethostname(), ended.pid)
    Lease(Storage(tmp_path)).check_free()
    assert Lease(Storage(tmp_path)).try_acquire()


@pytest.mark.slow
@pytest.mark.parametrize("behind_s", [-3600.0, 0.0, 3600.0])
def test_a_holder_elsewhere_is_judged_by_its_heartbeat_not_by_its_clock(
    tmp_path: Path, behind_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_S", 2.0)
    directory = Storage(tmp_path)
    mark(directory, "elsewhere", 7, behind_s=behind_s)
    stop = threading.Event()

    def beat() -> None:
        count = 1
        while not stop.wait(0.05):
            count += 1
            mark(directory, "elsewhere", 7, beat=count, behind_s=behind_s)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            Lease(directory).acquire()
    finally:
        stop.set()
        thread.join()
    first = Lease(directory).acquire()  # it stands still now
    assert first.held
    first.release()


def test_a_worker_group_that_was_started_again_has_its_lease_still(tmp_path: Path) -> None:
    directory = Storage(tmp_path)
    mark(directory, "elsewhere", 7)
    again = Lease(directory, token="other")
    assert again.try_acquire()
    assert directory.read_json(lease.FILE)["pid"] == os.getpid()
    again.release()


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path: Path, dead: bool) -> None:
    for i in range(50):
        if dead:
            mark(Storage(tmp_path / str(i)), socket.gethostname(), 2**22 + 1)  # above any process number
        leases = [Lease(Storage(tmp_path / str(i))) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(Lease.try_acquire, leases)) == 1
        for one in leases:
            one.release()
        assert not (tmp_path / str(i) / lease.FILE).exists()


def test_who_was_taken_over_notices_and_leaves_the_other_its_lease(tmp_path: Path) -> None:
    directory = Storage(tmp_path)
    first = Lease(directory).acquire()
    begin = directory.read_json(lease.FILE)["heartbeat"]
    deadline = time.monotonic() + 30
    while directory.read_json(lease.FILE)["heartbeat"] == begin:
        assert time.monotonic() < deadline, "no heartbeat"
    first.check()
    while first.held:  # written at the same moment, the later heartbeat stands
        assert time.monotonic() < deadline, "not noticed"
        mark(directory, "elsewhere", 7)
        time.sleep(0.02)
    with pytest.raises(UserError, match="taken over by process 7 on elsewhere"):
        first.check()
    first.release()
    assert directory.read_json(lease.FILE)["pid"] == 7, "it is the other's"


def test_a_lease_that_was_released_can_be_taken_again_and_released_only_once(tmp_path: Path) -> None:
    directory = Storage(tmp_path)
    first, other = Lease(directory), Lease(directory).acquire()
    assert not first.try_acquire()
    first.release()  # it was not held: the other keeps its own
    assert other.held
    assert (tmp_path / lease.FILE).exists()
    for _ in range(2):
        other.release()
        assert first.try_acquire()
        assert first.held
        begin = directory.read_json(lease.FILE)["heartbeat"]
        deadline = time.monotonic() + 30
        while directory.read_json(lease.FILE)["heartbeat"] == begin:
            assert time.monotonic() < deadline, "no heartbeat"
        other.release()  # again: what is another's by now stays
        assert (tmp_path / lease.FILE).exists()
        first.release()
        assert os.listdir(tmp_path) == []
        assert other.try_acquire()
    other.release()


def test_who_works_on_one_directory_after_the_other_waits_for_those_of_others(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    other = Lease(root / "b").acquire()
    first = WorkingLease(root, "group")
    assert first.try_take("a")
    assert first.held
    first.release()
    assert not first.try_take("b")
    assert not first.held
    first.release()  # as a worker does after each turn
    other.release()
    assert first.try_take("b")
    assert first.held
    first.release()
    assert not (tmp_path / "b" / lease.FILE).exists()
