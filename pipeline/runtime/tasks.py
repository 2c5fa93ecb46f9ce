"""Ray tasks: a bounded number at a time, with retries and a note on stragglers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import ray

from pipeline.runtime import interrupts
from pipeline.runtime.cluster import room_for
from pipeline.runtime.user_errors import unwrap

T = TypeVar("T")

TASKS_IN_FLIGHT = 64
"""Back-pressure: largest number of tasks inside Ray, or twice the number that there is room for."""
STRAGGLER = 3.0
"""A straggler runs for this many times the median, and for STRAGGLER_S at least."""
STRAGGLER_S = 30.0
LOOK_S = 5.0
"""Shortest time between two looks for a straggler."""
TASK_RETRIES = 3


def run_tasks(
    function: Callable[[dict[str, Any]], Any],
    jobs: Iterable[tuple[dict[str, Any], T]],
    bundle: dict[str, float],
    *,
    name: str,
    on_straggler: Callable[[str], None],
) -> Iterator[T]:
    """Run Ray tasks, a bounded number at a time, and yield the tag of each job when it ends.

    Args:
        function: called with a job. Its result is ignored.
        jobs: pairs of job and tag, read as there is room for them. A tag's text stands for the task
            in the note on stragglers: ", ATTACK on MODEL".
        bundle: resources that Ray reserves for a task.
        name: of the tasks in Ray's displays.
        on_straggler: called with a note on the slowest task, at most every LOOK_S seconds, and with
            "" once there is no straggler any more.

    Raises:
        UserError: a task raised it. The other tasks are cancelled.
    """
    task = ray.remote(function).options(
        num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_retries=TASK_RETRIES, name=name
    )
    slots = max(1, room_for(bundle))
    waiting: dict[Any, T] = {}
    watch = StragglerWatch(on_straggler)
    queue = iter(jobs)
    try:
        while True:
            while len(waiting) < max(TASKS_IN_FLIGHT, 2 * slots) and (item := next(queue, None)) is not None:
                waiting[task.remote(item[0])] = item[1]
            if not waiting:
                return
            # Ray starts tasks in the order of their submission.
            watch.running({ref: str(tag) for ref, tag in itertools.islice(waiting.items(), slots)})
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            interrupts.raise_received()
            for ref in ready:
                tag = waiting.pop(ref)
                ray.get(ref)
                watch.ended(ref)
                yield tag
            watch.look()
    except (Exception, KeyboardInterrupt) as e:
        interrupted = isinstance(e, KeyboardInterrupt)
        for ref in waiting:
            # After Ctrl-C a notebook goes on, and so would the tasks. Without `force`, Ray only asks the process of a
            # task, which need not listen: libraries of an earlier task may have replaced its signal handler.
            ray.cancel(ref, force=interrupted)
        if interrupted:
            raise
        user_error = unwrap(e)
        if user_error is not None and user_error is not e:
            raise user_error from e
        raise


class RunTasks(Protocol):
    """The signature of :func:`run_tasks` and of :func:`run_in_process`."""

    def __call__(
        self,
        function: Callable[[dict[str, Any]], Any],
        jobs: Iterable[tuple[dict[str, Any], T]],
        bundle: dict[str, float],
        *,
        name: str,
        on_straggler: Callable[[str], None],
    ) -> Iterator[T]: ...


def run_in_process(
    function: Callable[[dict[str, Any]], Any],
    jobs: Iterable[tuple[dict[str, Any], T]],
    bundle: dict[str, float],
    *,
    name: str,
    on_straggler: Callable[[str], None],
) -> Iterator[T]:
    """Run the jobs one after the other in this process, without Ray, and yield the tag of each.

    Args: as :func:`run_tasks`. Nothing is reserved, and there are no stragglers.
    """
    for job, tag in jobs:
        function(job)
        yield tag


class StragglerWatch:
    """The search for tasks that take much longer than the others.

    Args:
        report: called with a note, at most every LOOK_S seconds.
        clock: seconds since any moment.
    """

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.report, self.clock = report, clock
        self.started: dict[Any, tuple[float, str]] = {}
        self.seconds: list[float] = []
        self.looked = clock()
        self.reported = ""

    def running(self, tasks: Mapping[Any, str]) -> None:
        """Note the names of the tasks that are running."""
        for ref, name in tasks.items():
            self.started.setdefault(ref, (self.clock(), name))

    def ended(self, ref: Any) -> None:
        """Note that a task has ended."""
        now = self.clock()
        self.seconds.append(now - self.started.pop(ref, (now, ""))[0])

    def look(self) -> None:
        """Report the slowest task, unless the last look was less than LOOK_S ago."""
        if self.clock() - self.looked < LOOK_S:
            return
        self.looked = self.clock()
        note = self._slowest()
        if note or self.reported:
            self.report(note)
        self.reported = note

    def _slowest(self) -> str:
        """Return a note on the slowest task, or "" if it is no straggler."""
        if not self.started or not self.seconds:
            return ""
        begin, name = min(self.started.values())
        longest, usual = self.clock() - begin, statistics.median(self.seconds)
        if longest < max(STRAGGLER * usual, STRAGGLER_S):
            return ""
        return f"; the slowest of {len(self.started)} tasks{name}, has run for {longest:.0f} s, {usual:.0f} s is usual"
