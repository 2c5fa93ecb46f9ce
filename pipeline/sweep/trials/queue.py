"""Ray actor between the trials of a sweep and the workers that train their models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.sweep.trials.states import FAILED, TRAINING, WAITING


class JobQueue:
    """Between the trials of a sweep, which want models, and its Ray Train runs, which train them. A Ray actor.

    It holds no truth: what is trained lies on storage, and each trial says again and again what it wants. So a queue that is
    lost and started anew fills itself. (It may then give away a model that a run is just training: both write the same.)

    Args:
        attempts: how often a model is given out whose workers died; it may be what kills them.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._wanted: dict[str, dict[str, Any]] = {}
        self._followers: dict[str, set[str]] = {}
        self._held: dict[str, int] = {}
        self._given: Counter[str] = Counter()
        self._ended: dict[str, tuple[str, str]] = {}
        self._closed = False
        self._error = ""

    def follow(self, orders: Sequence[Mapping[str, Any]], trial: str) -> list[tuple[str, str]]:
        """Have these models trained, in order; said again, nothing changes. State and reason (if it failed) of each."""
        states = []
        for order in orders:
            address = order["address"]
            self._followers.setdefault(address, set()).add(trial)
            if address not in self._ended:
                self._wanted.setdefault(address, dict(order))
            where = (TRAINING if address in self._held else WAITING), ""
            states.append(self._ended.get(address, where))
        return states

    def leave(self, trial: str) -> None:
        """A trial is over: what it alone wanted is not trained further."""
        for followers in self._followers.values():
            followers.discard(trial)
        for address in [a for a in self._wanted if not self._followers[a] and a not in self._held]:
            del self._wanted[address]

    def take(self, run: int) -> dict[str, Any] | None:
        """The next model for a Ray Train run: {} if there is none yet, None if there will be none any more.

        A run that still holds one was started again, since its workers died: it goes on with that.
        """
        for address in [a for a, holder in self._held.items() if holder == run]:
            del self._held[address]
            if self._followers.get(address) and self._given[address] >= self._attempts:
                reason = f"its workers died {self._given[address]} times (out of memory?)"
                self.end(address, FAILED, reason)
        if self._closed:
            return None
        for address, order in self._wanted.items():
            if address not in self._held and self._followers[address]:
                self._held[address] = run
                self._given[address] += 1
                return order
        return {}

    def cancelled(self, address: str, run: int) -> bool:
        """Asked between two epochs by the run that trains it."""
        self._held[address] = run  # said anew to a queue that was lost
        return self._closed or (address in self._followers and not self._followers[address])

    def end(self, address: str, state: str, reason: str = "") -> None:
        """A model is done, diverged or failed, for its reason; or, with no state, was left."""
        self._held.pop(address, None)
        self._wanted.pop(address, None)
        if not state:  # its workers live
            self._given[address] -= 1
        if state and not (state == FAILED and self._error):  # it follows from that
            self._ended[address] = state, reason

    def close(self, error: str = "") -> None:
        """Nothing is given out any more; with an error, which is of no one model, the sweep ends with it."""
        self._closed, self._error = True, self._error or error

    def error(self) -> str:
        """What :meth:`close` was first told, if anything."""
        return self._error

    def lost(self, run: int) -> None:
        """A Ray Train run ended for good: others may have what it held."""
        self._held = {address: holder for address, holder in self._held.items() if holder != run}
