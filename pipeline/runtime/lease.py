"""Leases on directories: only one process at a time writes the files of a run, sweep or model."""

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
"""How long a watcher must see a dead holder's heartbeat unchanged. Clocks are not compared."""
STALE_S = 60.0
"""Age of the heartbeat at which a process of this machine is dead, even if its number is in use."""
SETTLE_S = 1.0
"""Pause between writing the file and reading who wrote last, on object stores."""
UNREADABLE: dict[str, Any] = {"host": "an unknown host", "pid": "of unknown number", "token": ""}
"""The holder in a file that cannot be read."""


class LeaseLost(UserError):
    """Another process has taken the directory over."""


class Lease:
    """The right to write into a directory.

    Its file ``owner.json`` names the holder, which renews it by a heartbeat. A dead process of this
    machine loses the lease at once. Any other holder loses it once its heartbeat was seen to stand
    still for EXPIRY_S. A holder notices the loss at its next heartbeat.

    Args:
        token: identifies the holder. A worker group that is started again with the same token still
            has its lease. "": a random one.
    """

    def __init__(self, directory: Storage, token: str = "") -> None:
        self._directory = directory
        self.identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": _processes(),
            "token": token or secrets.token_hex(8),
        }
        """Content of the file that identifies this holder."""
        self._beats = 0
        self._last_seen: tuple[Any, float] | None = None
        self._new_holder: Mapping[str, Any] | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Tell whether this process has the lease."""
        return self._thread is not None and self._new_holder is None and not self._released.is_set()

    def try_acquire(self) -> bool:
        """Take the lease if it is free. Repeated calls watch the holder and find its death."""
        if self.held:
            return True
        holder = self._holder()
        if holder is None:
            if not self._directory.write_if_absent(FILE, self._text()):
                return False
        elif holder["token"] == self.identity["token"]:
            self._beat()
        elif self._lives(holder) or not self._take_over(holder):
            return False
        if not self._directory.is_local:
            time.sleep(SETTLE_S)
        if (now := self._holder()) is not None and now["token"] != self.identity["token"]:
            return False
        self._new_holder = None
        self._released.clear()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return True

    def acquire(self) -> Lease:
        """Take the lease. Watch a holder that may be dead until this is certain.

        Raises:
            UserError: another process holds the lease. The message has its host and number.
        """
        first: Any = None
        while not self.try_acquire():
            if (holder := self._holder()) is not None:
                beat = _heartbeat(holder)
                if self._is_here(holder) or beat != (first or beat):
                    raise UserError(_refusal(self._directory, holder))
                if first is None:
                    left = f"{self._directory.uri} was left by {_name(holder)}"
                    say(f"{left}; waiting up to {EXPIRY_S:.0f} s to see whether it lives")
                    first = beat
            time.sleep(min(0.5, HEARTBEAT_S / 4))
        return self

    def check_free(self) -> None:
        """Raise as :meth:`acquire` if a process of this machine holds the lease."""
        holder = self._holder()
        if holder is not None and self._is_here(holder) and self._lives(holder):
            raise UserError(_refusal(self._directory, holder))

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the lease."""
        if self._new_holder is not None:
            raise LeaseLost(
                f"{self._directory.uri} was taken over by {_name(self._new_holder)}: this command ends, that one goes "
                "on"
            )

    def holder_name(self) -> str:
        """Return the process and host of a holder that seems to live, for messages, or ""."""
        holder = self._holder()
        return "" if holder is None or not self._lives(holder) else _name(holder)

    def release(self) -> None:
        """Give the lease back, if it is held."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._released.set()
        thread.join(HEARTBEAT_S)
        with suppress(StorageError):
            if self._new_holder is None:
                # If this fails, the lease expires.
                self._directory.delete(FILE, patience_s=0.0)

    def _text(self) -> bytes:
        self._beats += 1
        return json.dumps({**self.identity, "heartbeat": self._beats, "alive": time.time()}).encode()

    def _beat(self) -> None:
        self._directory.write_bytes(FILE, self._text())

    def _keep_beating(self) -> None:
        while self._new_holder is None and not self._released.wait(HEARTBEAT_S):
            with suppress(StorageError):  # Writing records reports a storage that does not answer.
                holder = self._holder()
                if holder is not None and holder["token"] != self.identity["token"]:
                    self._new_holder = holder
                else:
                    self._beat()

    def _take_over(self, dead: Mapping[str, Any]) -> bool:
        """Replace the file of a dead holder. Return False if another process did so first.

        Raises:
            StorageError: the file cannot be opened or written.
        """
        if not self._directory.is_local:
            self._beat()
            return True
        path = self._directory.path(FILE)
        try:
            with open(path, "r+b") as file:  # NFS locks only files that are open for writing.
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                except OSError:
                    pass  # Without locks, the first of two processes finds the other at its next heartbeat.
                # A faster process has replaced the file before it released the lock.
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
        with suppress(StorageError):
            holder = self._directory.read_json(FILE)
            if isinstance(holder, dict) and {"host", "pid", "token"} <= holder.keys():
                return holder
        # An unreadable file is watched like a holder, and replaced like a dead one.
        return UNREADABLE if self._directory.exists(FILE) else None

    def _is_here(self, holder: Mapping[str, Any]) -> bool:
        """Return whether the holder's process number is one of this machine and container."""
        return all(holder.get(key) == self.identity[key] for key in ("host", "processes"))

    def _lives(self, holder: Mapping[str, Any]) -> bool:
        # The holder's clock is this machine's. A process that was not reaped still has its number.
        if self._is_here(holder):
            return _runs(holder["pid"]) and time.time() - holder.get("alive", 0.0) < STALE_S
        beat = _heartbeat(holder)
        if self._last_seen is None or self._last_seen[0] != beat:
            self._last_seen = beat, time.monotonic()
        return time.monotonic() - self._last_seen[1] < EXPIRY_S


class WorkingLease:
    """The lease of the directory that a worker group works on. It also watches other holders."""

    def __init__(self, root: Storage, token: str) -> None:
        self._root, self._token = root, token
        self._watched: dict[str, Lease] = {}
        self._lease: Lease | None = None

    def try_take(self, address: str) -> bool:
        """Take the lease of a directory below the root, as :meth:`Lease.try_acquire`."""
        # The same object is kept, since it watches the holder's heartbeat.
        lease = self._watched.setdefault(address, Lease(self._root / address, self._token))
        if not lease.try_acquire():
            return False
        self._lease = self._watched.pop(address)
        return True

    @property
    def held(self) -> bool:
        """Tell whether this group still has the directory that it took."""
        return self._lease is not None and self._lease.held

    def release(self) -> None:
        """Give the lease back, if there is one."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _heartbeat(holder: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return holder["token"], holder.get("heartbeat"), holder.get("alive")


def _name(holder: Mapping[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _refusal(directory: Storage, holder: Mapping[str, Any]) -> str:
    return (
        f"{directory.uri} is being worked on by {_name(holder)}: let it end, or end it (a job: ray job list, ray job "
        "stop ID), then run the same command again"
    )


def _processes() -> str:
    """Return the scope of process numbers: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # This is not Linux.
        return str(uuid.getnode())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # Signal 0 only checks the number.
    except ProcessLookupError:
        return False
    except PermissionError:  # The process is another user's.
        pass
    return True
