"""The JSON record of a directory on the storage, which one process at a time writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.errors import UserError
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage


@dataclass
class StoredRecord:
    """A record and the directory that it describes."""

    storage: Storage
    file: str
    """Name of the record in the directory: run.json or sweep.json."""
    content: dict[str, Any]
    lease: Lease | None = None
    """Held while this process works on the directory."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Guards the content where several threads of this process write it."""

    def save(self) -> None:
        """Write the record.

        Raises:
            UserError: another process has taken the directory over, or the record could not be written.
        """
        with self.lock:
            if self.lease is not None:
                self.lease.check()
            self.storage.write_json(self.file, self.content)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the body to those of a stage, and save."""
        begin = time.monotonic()
        try:
            yield
        except BaseException as e:
            self._add_seconds(stage, time.monotonic() - begin)
            if not isinstance(e, KeyboardInterrupt):  # A storage that does not answer would hold up the end.
                with suppress(UserError):  # It would hide the error of the body.
                    self.save()
            raise
        self._add_seconds(stage, time.monotonic() - begin)
        self.save()

    def _add_seconds(self, stage: str, seconds: float) -> None:
        self.content["stages"][stage] = self.content["stages"].get(stage, 0.0) + seconds

    def release(self) -> None:
        """Give the directory back."""
        if self.lease is not None:
            self.lease.release()


def now() -> str:
    """Return the time as records hold it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
