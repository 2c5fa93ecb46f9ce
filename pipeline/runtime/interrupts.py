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
CLEAN_UP_S = 3.0
"""How long the end of an interrupted command waits for a storage that may not answer."""


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
    """Return the exit status of a command that was interrupted."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def _clean_up() -> None:
    for clean in list(_unfinished):
        with contextlib.suppress(Exception):
            clean()


def leave(status: int) -> None:
    """End the process with a status. Where an interrupt or an error cut off threads that use Ray, at once.

    Ray is not shut down under them: its core would end the process with a status of its own when such a thread next calls
    it, or the thread would start Ray anew. Of a node of this process's own, its children die with it; theirs are killed.
    """
    if status not in (INTERRUPTED, TERMINATED) and not _unfinished:
        sys.exit(status)
    # a second Ctrl-C or SIGTERM has nothing more to say
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cleaning = threading.Thread(target=_clean_up, daemon=True)
    cleaning.start()
    cleaning.join(CLEAN_UP_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    import psutil  # not before: the command line says which package a Python lacks

    this = psutil.Process()
    for process in this.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.ppid() != this.pid:
                process.kill()
    os._exit(status)
