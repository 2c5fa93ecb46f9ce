"""Which model a training worker group takes next: what is left on the storage and held by no other run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runtime.lease import WorkingLease
from pipeline.runtime.storage import Storage
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE

ATTEMPT = "attempt.json"
"""In a model's directory: {token} of the worker group that took it up last, until it is finished."""


class Assignment:
    """The models of one worker group, asked on its rank 0 alone.

    A model's directory is leased while the group trains it. Another run that wants the same model waits, and takes it as it
    is when it is finished, or trains it on when its holder is gone.

    Args:
        orders: see :meth:`pipeline.training.jobs.TrainingJob.request`.
        token: names the worker group, also after it was started again.
    """

    def __init__(self, orders: Sequence[Mapping[str, Any]], root: Storage, token: str) -> None:
        self._root, self._token = root, token
        self._left = {order["address"]: dict(order) for order in orders}
        self._lease = WorkingLease(root, token)

    def take(self) -> dict[str, Any] | None:
        """Return the next model, whose lease is held from then on; {} while others train all that is left; None at the end.

        Raises:
            StorageError: the storage cannot be read or written.
        """
        for address in list(self._left):
            home = self._root / address
            if self._is_over(home):
                del self._left[address]
            elif self._lease.try_take(address):
                # the one that held it may have finished it in between
                if not self._is_over(home):
                    home.write_json(ATTEMPT, {"token": self._token})  # whom to blame if the workers die
                    return self._left[address]
                self.leave()
                del self._left[address]
        return {} if self._left else None

    @property
    def holds(self) -> bool:
        """Tell whether the model that was taken is still this group's."""
        return self._lease.held

    def leave(self) -> None:
        """Give the lease of the model that was taken back."""
        self._lease.release()

    def _is_over(self, home: Storage) -> bool:
        """Tell whether the model is finished, or failed in this very worker group: it would fail again."""
        if home.exists("model.json"):
            return True
        files = (name for name in (NOT_FINITE, FAILED_MODEL) if home.exists(name))
        return any(home.read_json(name).get("token") == self._token for name in files)
