"""Which process runs a sweep: two at a time would overwrite each other's record."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from components.errors import UserError
from pipeline.storage import Storage, StorageError

FILE = "owner.json"
BEAT_S = 10.0
STALE_S = 60.0
"""Without a sign of life for so long, an owner counts as gone (the clocks of two hosts may differ by less)."""


class Owner:
    """Marks a directory as this process's, in ``owner.json``, and says every BEAT_S seconds that it lives, until :meth:`release`.

    No lock: of two that begin within the same moment the first learns at its next sign of life that it has lost the directory.

    Raises:
        UserError: another process has it; names host, process, its last sign of life and what to do.
    """

    def __init__(self, directory: Storage) -> None:
        check_free(directory)
        self._directory = directory
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._lost: Mapping[str, Any] | None = None
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError where another process has taken the directory over meanwhile."""
        if self._lost is not None:
            raise UserError(
                f"{self._directory.uri} was taken over by {_named(self._lost)}: this command ends, that one goes on"
            )

    def release(self) -> None:
        """The directory is free again."""
        self._done.set()
        self._thread.join(BEAT_S)
        with suppress(StorageError, OSError):
            if self._lost is None:
                self._directory.delete(FILE)

    def _beat(self) -> None:
        self._directory.write_json(FILE, {**self._mine, "alive": time.time()})

    def _go_on(self) -> None:
        while self._lost is None and not self._done.wait(BEAT_S):
            with suppress(StorageError, OSError):  # a storage out of reach is told by what writes records
                found = _read(self._directory)
                if found is not None and found["token"] != self._mine["token"]:
                    self._lost = found
                else:
                    self._beat()


def check_free(directory: Storage) -> None:
    """Raises as :class:`Owner`."""
    found = _read(directory)
    if found is None or not _lives(found):
        return
    raise UserError(
        f"{directory.uri} is being worked on by {_named(found)}, last sign of life {_age(found):.0f} s ago: let it end, or end "
        "it (a job: ray job list, ray job stop ID), then run the same command again. One that was killed on another host "
        f"counts as gone {STALE_S:.0f} s after its last sign of life"
    )


def _read(directory: Storage) -> dict[str, Any] | None:
    if not directory.exists(FILE):
        return None
    with suppress(StorageError):  # deleted meanwhile
        found: dict[str, Any] = directory.read_json(FILE)
        return found
    return None


def _named(found: Mapping[str, Any]) -> str:
    return f"process {found['pid']} on {found['host']}"


def _age(found: Mapping[str, Any]) -> float:
    return max(0.0, time.time() - found["alive"])


def _lives(found: Mapping[str, Any]) -> bool:
    if _age(found) > STALE_S:
        return False
    if found["host"] != socket.gethostname():
        return True
    try:
        os.kill(found["pid"], 0)  # sends nothing, only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
