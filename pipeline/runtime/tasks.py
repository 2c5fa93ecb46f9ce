"""A bounded number of Ray tasks, with retries and a note on stragglers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ray

from pipeline.runtime.cluster import room_for
from pipeline.runtime.user_errors import unwrap

TASKS_IN_FLIGHT = 64
"""Back-pressure: so many tasks (or twice as many as there is room for) wait inside Ray, however many thousand chunks there are."""
STRAGGLER = 3.0
"""A task that takes so many times the median is named in the progress line ..."""
STRAGGLER_S = 30.0
"""... once it has taken so many seconds."""
LOOK_S = 5.0
"""Between two looks for such a task, whether others end meanwhile or not."""
TASK_RETRIES = 3


T = TypeVar("T")


def run_tasks(
    function: Callable[[dict[str, Any]], Any],
    jobs: Iterable[tuple[dict[str, Any], T]],
    bundle: dict[str, float],
    *,
    name: str,
    on_straggler: Callable[[str], None],
    named: Callable[[T], str] = str,
) -> Iterator[T]:
    """Run Ray tasks, a bounded number of them at a time, and give back what each job was tagged with as it ends.

    Args:
        function: called with a job; what it returns is not looked at.
        jobs: (job, tag); read only as far as there is room for.
        bundle: what Ray reserves for each.
        name: of the tasks, in Ray's own displays.
        on_straggler: told at most every LOOK_S seconds which task takes much longer than the others; once with "" when none does
            any more.
        named: what a task is called there, by its tag: ", ATTACK on MODEL".

    Raises:
        UserError: what a task raised; the others are cancelled.
    """
    task = ray.remote(function).options(
        num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_retries=TASK_RETRIES, name=name
    )
    slots = max(1, room_for(bundle))
    waiting: dict[Any, T] = {}
    watch = _Stragglers(on_straggler)
    queue = iter(jobs)
    try:
        while True:
            while len(waiting) < max(TASKS_IN_FLIGHT, 2 * slots) and (item := next(queue, None)) is not None:
                waiting[task.remote(item[0])] = item[1]
            if not waiting:
                return
            # Ray starts tasks in the order in which they are submitted
            watch.running({ref: named(tag) for ref, tag in itertools.islice(waiting.items(), slots)})
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            for ref in ready:
                tag = waiting.pop(ref)
                ray.get(ref)
                watch.ended(ref)
                yield tag
            watch.look()
    except Exception as e:
        for ref in waiting:
            ray.cancel(ref)
        mine = unwrap(e)
        if mine is not None and mine is not e:
            raise mine from e
        raise


class _Stragglers:
    """Which task takes much longer than the others.

    Args:
        tell: told of it, at most every LOOK_S seconds.
        clock: seconds from any moment on.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.tell, self.clock = tell, clock
        self.started: dict[Any, tuple[float, str]] = {}
        self.seconds: list[float] = []
        self.looked = clock()
        self.told = ""

    def running(self, tasks: Mapping[Any, str]) -> None:
        """These tasks, each with its name, run by now."""
        for ref, name in tasks.items():
            self.started.setdefault(ref, (self.clock(), name))

    def ended(self, ref: Any) -> None:
        now = self.clock()
        self.seconds.append(now - self.started.pop(ref, (now, ""))[0])

    def look(self) -> None:
        """Tell what there is to tell, unless that was just done."""
        if self.clock() - self.looked < LOOK_S:
            return
        self.looked = self.clock()
        note = self._slowest()
        if note or self.told:
            self.tell(note)
        self.told = note

    def _slowest(self) -> str:
        if not self.started or not self.seconds:
            return ""
        begin, name = min(self.started.values())
        longest, usual = self.clock() - begin, statistics.median(self.seconds)
        if longest < max(STRAGGLER * usual, STRAGGLER_S):
            return ""
        return f"; the slowest of {len(self.started)} tasks{name}, has run for {longest:.0f} s, {usual:.0f} s is usual"
