"""Leases on directories of a storage: two processes that worked on one run, sweep or model would overwrite each other's files."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.errors import UserError
from pipeline.runtime.console import say
from pipeline.runtime.storage import Storage, StorageError

FILE = "owner.json"
HEARTBEAT_S = 10.0
EXPIRY_S = 25.0
"""A holder whose heartbeat does not change for so long, while somebody watches, is gone. Clocks are not compared."""
STALE_S = 60.0
"""A process of this machine that has not renewed its lease for so long counts as gone even if its number is still in use."""
SETTLE_S = 1.0
"""Where a file cannot be created atomically (object stores): how long after writing it one looks who wrote last."""


UNREADABLE: dict[str, Any] = {"host": "an unknown host", "pid": "of unknown number", "token": ""}


class LeaseLost(UserError):
    """Another process has taken the directory over."""


class Lease:
    """The right to write into a directory, held in its ``owner.json`` and renewed by a heartbeat until :meth:`release`.

    A holder on this machine whose process is gone loses the lease at once; any other when its heartbeat stands still for
    EXPIRY_S seconds of watching. A lost lease is noticed at the next heartbeat.

    Args:
        token: names the holder. A holder that comes back under the same token (a worker group that was started again) has its
            lease still.
    """

    def __init__(self, directory: Storage, token: str = "") -> None:
        self._directory = directory
        self._identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": _processes(),
            "token": token or secrets.token_hex(8),
        }
        self._beats = 0
        self._last_seen: tuple[Any, float] | None = None
        self._new_holder: Mapping[str, Any] | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        return self._thread is not None and self._new_holder is None and not self._released.is_set()

    def try_acquire(self) -> bool:
        """Take the lease if it is free. Call it again and again to wait: a holder's death is seen by watching it."""
        if self.held:
            return True
        holder = self._holder()
        if holder is None:
            if not self._directory.write_if_absent(FILE, self._text()):
                return False
        elif holder["token"] == self._identity["token"]:
            self._beat()
        elif self._lives(holder) or not self._take_over(holder):
            return False
        if not self._directory.is_local:
            time.sleep(SETTLE_S)
        if (now := self._holder()) is not None and now["token"] != self._identity["token"]:
            return False
        self._new_holder = None
        self._released.clear()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return True

    def acquire(self) -> Lease:
        """Take the lease, watching a holder that may be gone until that is certain.

        Raises:
            UserError: another process holds it and lives; names host, process and what to do.
        """
        announced = False
        first: Any = None
        while not self.try_acquire():
            if (holder := self._holder()) is not None:
                first = first or _heartbeat(holder)
                if self._is_here(holder) or _heartbeat(holder) != first:
                    raise UserError(_refusal(self._directory, holder))
                if not announced:
                    left = f"{self._directory.uri} was left by {_name(holder)}"
                    say(f"{left}; waiting up to {EXPIRY_S:.0f} s to see whether it lives")
                    announced = True
            time.sleep(min(0.5, HEARTBEAT_S / 4))
        return self

    def check_free(self) -> None:
        """Raise as :meth:`acquire` where that is certain at once, without taking the lease."""
        holder = self._holder()
        if holder is not None and self._is_here(holder) and self._lives(holder):
            raise UserError(_refusal(self._directory, holder))

    def check(self) -> None:
        """Raise LeaseLost where another process has taken the lease meanwhile."""
        if self._new_holder is not None:
            raise LeaseLost(
                f"{self._directory.uri} was taken over by {_name(self._new_holder)}: this command ends, that one goes on"
            )

    def holder_name(self) -> str:
        """Return process and host of a holder that seems to live, for messages; empty where there is none."""
        holder = self._holder()
        return "" if holder is None or not self._lives(holder) else _name(holder)

    def release(self) -> None:
        """Give the lease back, if it is held. It may be taken again."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._released.set()
        thread.join(HEARTBEAT_S)
        with suppress(StorageError):
            if self._new_holder is None:
                self._directory.delete(FILE, patience_s=0.0)  # if it fails, the heartbeat that stands still frees it

    def _text(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._identity, "heartbeat": self._beats, "alive": time.time()}).encode()

    def _beat(self) -> None:
        self._directory.write_bytes(FILE, self._text())

    def _keep_beating(self) -> None:
        while self._new_holder is None and not self._released.wait(HEARTBEAT_S):
            with suppress(StorageError):  # who writes records reports a storage out of reach
                holder = self._holder()
                if holder is not None and holder["token"] != self._identity["token"]:
                    self._new_holder = holder
                else:
                    self._beat()

    def _take_over(self, dead: Mapping[str, Any]) -> bool:
        """Put this holder's file in the place of that of one who is gone. False where another process did so first.

        Raises:
            StorageError: the file cannot be opened or written.
        """
        if not self._directory.is_local:
            self._beat()
            return True
        path = self._directory.path(FILE)
        try:
            with open(path, "r+b") as file:  # for writing: NFS locks no other
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                except OSError:
                    pass  # a file system without locks: of two, the first sees at its next heartbeat who came later
                # whoever was quicker has put another file there before the lock went on to this process
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return False
                if (now := self._holder()) is None or _heartbeat(now) != _heartbeat(dead):
                    return False
                self._beat()
                return True
        except FileNotFoundError:
            return False
        except OSError as e:
            raise StorageError(f"{path} was left by {_name(dead)} and cannot be opened: {e}. Remove it") from e

    def _holder(self) -> dict[str, Any] | None:
        if (holder := self._read(FILE)) is not None:
            return holder
        # a file that nobody can read is watched as a holder is, and replaced as one that is gone
        return UNREADABLE if self._directory.exists(FILE) else None

    def _read(self, name: str) -> dict[str, Any] | None:
        with suppress(StorageError):
            holder = self._directory.read_json(name)
            if isinstance(holder, dict) and {"host", "pid", "token"} <= holder.keys():
                return holder
        return None

    def _is_here(self, holder: Mapping[str, Any]) -> bool:
        """Tell whether the holder's process number means something on this machine (containers may share a host's name)."""
        return all(holder.get(key) == self._identity[key] for key in ("host", "processes"))

    def _lives(self, holder: Mapping[str, Any]) -> bool:
        if self._is_here(holder):  # one clock, so its reading counts; a process that nobody reaped still has its number
            return _runs(holder["pid"]) and time.time() - holder.get("alive", 0.0) < STALE_S
        beat = _heartbeat(holder)
        if self._last_seen is None or self._last_seen[0] != beat:
            self._last_seen = beat, time.monotonic()
        return time.monotonic() - self._last_seen[1] < EXPIRY_S


class WorkingLease:
    """The lease of the one directory that a worker group works on, while it watches those that others hold.

    Args:
        token: as of :class:`Lease`.
    """

    def __init__(self, root: Storage, token: str) -> None:
        self._root, self._token = root, token
        self._watched: dict[str, Lease] = {}
        self._lease: Lease | None = None

    def try_take(self, address: str) -> bool:
        """Take the lease of a directory below the root if it is free. Ask again and again to wait for one."""
        # the same object each time: it watches whether the holder's heartbeat changes
        lease = self._watched.setdefault(address, Lease(self._root / address, self._token))
        if not lease.try_acquire():
            return False
        self._lease = self._watched.pop(address)
        return True

    @property
    def held(self) -> bool:
        """Tell whether the directory that was taken is still this group's."""
        return self._lease is not None and self._lease.held

    def release(self) -> None:
        """Give the lease that was taken back, if there is one."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _heartbeat(holder: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return holder["token"], holder.get("heartbeat"), holder.get("alive")


def _name(holder: Mapping[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _refusal(directory: Storage, holder: Mapping[str, Any]) -> str:
    return (
        f"{directory.uri} is being worked on by {_name(holder)}: let it end, or end it (a job: ray job list, ray job stop ID), "
        "then run the same command again"
    )


def _processes() -> str:
    """Name what process numbers are unique in: a boot of a machine, and a container on it. Hosts may share a name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return str(uuid.getnode())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
