"""Ray Train runs of a sweep: a few long-lived ones, which train model after model of a queue.

Starting a Ray Train run costs half a minute on two cores, as much as a small model's training. So
trials do not start one each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from components.errors import UserError, first_line
from pipeline.runtime.console import say
from pipeline.runtime.user_errors import unwrap
from pipeline.sweep.trials.queue import JobQueue
from pipeline.training.ray_runs import TrainingError

CLOSE_S = 60.0
"""How long the end of a sweep waits for its runs to end."""


class TrainingPool:
    """Ray Train runs, each in a thread of the driver, that serve a queue until it is closed.

    Args:
        fit: carries out one run, given its number.
        fail: called, in a thread, with the error that ended the last run.
    """

    def __init__(
        self, queue: JobQueue, runs: int, fit: Callable[[int], None], *, fail: Callable[[UserError], None]
    ) -> None:
        self._queue, self._fit, self._fail = queue, fit, fail
        self._alive = runs
        self._lock = threading.Lock()
        # Daemon threads: an interrupted driver does not wait for them, and they end with it.
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(runs)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        try:
            self._fit(number)
        except Exception as e:
            with self._lock:
                self._alive -= 1
                self._lost(number, e)

    def _lost(self, number: int, error: Exception) -> None:
        self._queue.release(number)
        user_error = unwrap(error)
        if self._alive:
            reason = first_line(user_error or error)
            say(f"a Ray Train run of the sweep was lost for good, {self._alive} left: {reason}")
            return
        self._fail(
            user_error
            or TrainingError(
                f"the training workers could not be kept up: {error}\n"
                "What was trained is kept; the same command continues"
            )
        )

    def close(self) -> None:
        """Close the queue and wait until the workers have freed their resources."""
        self._queue.close()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
