"""Queue between the trials of a sweep and the workers that train their models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, cast

from pipeline.sweep.trials.states import FAILED, TRAINING, WAITING, ModelState

Request = Mapping[str, Any]
"""A model to train: :meth:`pipeline.training.jobs.TrainingJob.request`."""


class NoRequest(Enum):
    """Answers of a queue that has no model to train."""

    YET = "yet"
    ANY_MORE = "any more"


class JobQueue:
    """Hands the models that trials request to the Ray Train runs. A Ray actor.

    It is only a cache: the storage says what is trained, and trials repeat their requests. So a
    lost queue refills itself. (It may then hand out a model that a run is just training. Both would
    write the same files.)

    Args:
        attempts: how often a model is handed out whose workers died. It may be what kills them.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._requests: dict[str, Request] = {}
        self._followers: dict[str, set[str]] = {}
        self._holders: dict[str, int] = {}
        self._times_taken: Counter[str] = Counter()
        self._ends: dict[str, tuple[ModelState, str]] = {}
        self._closed = False
        self._error = ""

    def follow(self, requests: Sequence[Request], trial: str) -> list[tuple[ModelState, str]]:
        """Request models in order, and return the state of each and the reason if it failed.

        A repeated request changes nothing.
        """
        states = []
        for request in requests:
            address = request["address"]
            self._followers.setdefault(address, set()).add(trial)
            if address not in self._ends:
                self._requests.setdefault(address, dict(request))
            state: ModelState = TRAINING if address in self._holders else WAITING
            states.append(self._ends.get(address, (state, "")))
        return states

    def leave(self, trial: str) -> None:
        """Drop the requests of a trial that is over. Its models are trained on only for others."""
        for followers in self._followers.values():
            followers.discard(trial)
        for address in [a for a in self._requests if not self._followers[a] and a not in self._holders]:
            del self._requests[address]

    def take(self, run: int) -> Request | NoRequest:
        """Return the next model for a Ray Train run.

        A run that still holds one was started again because its workers died. It keeps that one.
        """
        for address in [a for a, holder in self._holders.items() if holder == run]:
            del self._holders[address]
            if self._followers.get(address) and self._times_taken[address] >= self._attempts:
                reason = f"its workers died {self._times_taken[address]} times (out of memory?)"
                self.end(address, FAILED, reason)
        if self._closed:
            return NoRequest.ANY_MORE
        for address, request in self._requests.items():
            if address not in self._holders and self._followers[address]:
                self._holders[address] = run
                self._times_taken[address] += 1
                return request
        return NoRequest.YET

    def cancelled(self, address: str, run: int) -> bool:
        """Tell the run that trains a model whether to leave it. The run asks after every epoch."""
        self._holders[address] = run  # A queue that was lost learns it anew.
        return self._closed or (address in self._followers and not self._followers[address])

    def end(self, address: str, state: ModelState, reason: str = "") -> None:
        """Note that a model is done, diverged or failed."""
        self._drop(address)
        if state == FAILED and self._error:  # The sweep's error caused it.
            return
        self._ends[address] = state, reason

    def put_back(self, address: str) -> None:
        """Take a model back that its run left. No worker died, so it is no attempt."""
        self._drop(address)
        self._times_taken[address] -= 1

    def _drop(self, address: str) -> None:
        self._holders.pop(address, None)
        self._requests.pop(address, None)

    def close(self, error: str = "") -> None:
        """Close the queue. ``error`` is a failure of no single model; it ends the sweep."""
        self._closed, self._error = True, self._error or error

    def error(self) -> str:
        """Return the first error that closed the queue, or "" if none did."""
        return self._error

    def release(self, run: int) -> None:
        """Let others have the model of a Ray Train run that ended for good."""
        self._holders = {address: holder for address, holder in self._holders.items() if holder != run}


class RemoteQueue:
    """A JobQueue in a Ray actor, with the methods of a local one. Picklable."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteQueue, (self._actor,)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        import ray

        remote = getattr(self._actor, method).remote
        return lambda *arguments: ray.get(remote(*arguments))


def start_queue(attempts: int) -> JobQueue:
    """Start a queue in a Ray actor, and return it as if it were local."""
    import ray

    # It needs no CPU of its own: the workers may have them all.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(JobQueue).remote(attempts)
    return cast(JobQueue, RemoteQueue(actor))
