"""Choice of a worker group's next model: one that is left and that no other run holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runtime.lease import WorkingLease
from pipeline.runtime.storage import Storage
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE

ATTEMPT = "attempt.json"
"""File in the directory of a model that trains: {token} of the worker group that took it last."""


class Assignment:
    """The models of one worker group, asked on its rank 0 alone.

    A worker group leases the directory of the model that it trains. Another run that needs the same
    model waits. It takes the finished model, or continues its training if the holder is gone.

    Args:
        token: names the worker group, also after a restart.
    """

    def __init__(self, requests: Sequence[Mapping[str, Any]], root: Storage, token: str) -> None:
        self._root, self._token = root, token
        self._left = {request["address"]: dict(request) for request in requests}
        self._lease = WorkingLease(root, token)

    def take(self) -> dict[str, Any] | None:
        """Lease and return the next model, {} while others train all that is left, None at the end.

        Raises:
            StorageError: the storage cannot be read or written.
        """
        for address in list(self._left):
            home = self._root / address
            if self._is_over(home):
                del self._left[address]
            elif self._lease.try_take(address):
                # Its holder may have finished the model since the first look.
                if not self._is_over(home):
                    # It tells whom to blame if the workers die.
                    home.write_json(ATTEMPT, {"token": self._token})
                    return self._left[address]
                self.leave()
                del self._left[address]
        return {} if self._left else None

    @property
    def holds(self) -> bool:
        """Tell whether this group still holds the model that it took."""
        return self._lease.held

    def leave(self) -> None:
        """Release the lease of the model that was taken."""
        self._lease.release()

    def _is_over(self, home: Storage) -> bool:
        """Tell whether a model is finished, or has failed in this worker group already."""
        if home.exists("model.json"):
            return True
        files = (name for name in (NOT_FINITE, FAILED_MODEL) if home.exists(name))
        return any(home.read_json(name).get("token") == self._token for name in files)
