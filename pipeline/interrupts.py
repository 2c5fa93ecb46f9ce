"""How Ctrl-C and SIGTERM end a command: as one exception in the main thread, whichever library is at work."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses that shells and schedulers know: 128 + the signal's number."""
SHUTDOWN_S = 3.0
"""How long the end of an interrupted command waits for Ray, whose processes end with their driver in any case."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as Ctrl-C is KeyboardInterrupt."""


def install() -> None:
    """Make SIGTERM raise :class:`Terminated` and Ctrl-C KeyboardInterrupt in the main thread, which must call this."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put the handlers back that the body's libraries replaced: after ``ray.init`` SIGTERM would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed from Python
                signal.signal(number, handler)


_unfinished: list[Callable[[], None]] = []
"""What threads that an interrupt cuts off would have cleaned up."""


@contextlib.contextmanager
def cleaning_up(clean: Callable[[], None]) -> Iterator[None]:
    """Call ``clean`` after the body, also where the body runs in a thread that an interrupt cuts off."""
    _unfinished.append(clean)
    try:
        yield
    finally:
        _unfinished.remove(clean)
        clean()


def exit_status(error: KeyboardInterrupt) -> int:
    """Exit status of a command that was interrupted."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def _shut_down() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    for clean in list(_unfinished):
        with contextlib.suppress(Exception):
            clean()


def leave(status: int) -> None:
    """End the process with a status. After an interrupt at once: threads that still work for it are not waited for."""
    if status not in (INTERRUPTED, TERMINATED):
        sys.exit(status)
    # a second Ctrl-C or SIGTERM has nothing more to say
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shutdown = threading.Thread(target=_shut_down, daemon=True)
    shutdown.start()
    shutdown.join(SHUTDOWN_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # Ray's threads abort an interpreter that ends while they work
