"""Which model a training worker group takes next: what is left on the storage and held by no other run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.jobs import FAILED_MODEL, NOT_FINITE
from pipeline.lease import Lease
from pipeline.storage import Storage

ATTEMPT = "attempt.json"
"""In a model's directory: how often a worker group took it up since its last finished epoch."""


class Assignment:
    """The models of one worker group, asked on its rank 0 alone.

    A model's directory is leased while the group trains it. Another run that wants the same model waits, and takes it as it
    is when it is finished, or trains it on when its holder is gone.

    Args:
        orders: see :meth:`pipeline.jobs.Job.order`.
        token: names the worker group, also after it was started again.
        max_failures: so often a model may cost the group its workers without finishing another epoch.
    """

    def __init__(self, orders: Sequence[Mapping[str, Any]], root: Storage, token: str, max_failures: int) -> None:
        self._root, self._token, self._max_failures = root, token, max_failures
        self._left = {order["address"]: dict(order) for order in orders}
        self._watched: dict[str, Lease] = {}
        self._held: Lease | None = None

    def take(self) -> dict[str, Any] | None:
        """Return the next model, whose lease is held from then on; {} while others train all that is left; None at the end.

        Raises:
            StorageError: the storage cannot be read or written.
        """
        for address in list(self._left):
            home = self._root / address
            if self._is_over(home):
                del self._left[address]
            # the same object each time: it watches whether the holder's heartbeat changes
            elif self._watched.setdefault(address, Lease(home, self._token)).try_acquire():
                self._held = self._watched.pop(address)
                # the one that held it may have finished it in between
                if not self._is_over(home) and self._count_attempt(home):
                    return self._left[address]
                self.leave()
                del self._left[address]
        return {} if self._left else None

    @property
    def holds(self) -> bool:
        """Whether the model that was taken is still this group's."""
        return self._held is not None and self._held.held

    def leave(self) -> None:
        """Give the lease of the model that was taken back."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def _is_over(self, home: Storage) -> bool:
        """Whether the model is finished, or failed in this very worker group: it would fail again."""
        if home.exists("model.json"):
            return True
        files = (name for name in (NOT_FINITE, FAILED_MODEL) if home.exists(name))
        return any(home.read_json(name).get("token") == self._token for name in files)

    def _count_attempt(self, home: Storage) -> bool:
        """Count that the group takes the model up; False where it cost the workers their lives too often."""
        epochs = home.list("history")
        before = home.read_json(ATTEMPT) if home.exists(ATTEMPT) else {}
        again = before.get("token") == self._token and before.get("epochs") == len(epochs)
        attempts = before["attempts"] + 1 if again else 1
        if attempts > self._max_failures + 1:
            reason = f"its workers died {attempts - 1} times in epoch {len(epochs)} (killed for want of memory?)"
            home.write_json(FAILED_MODEL, {"reason": reason, "token": self._token})
            return False
        home.write_json(ATTEMPT, {"token": self._token, "epochs": len(epochs), "attempts": attempts})
        return True
