"""Ctrl-C and SIGTERM, which end a command by one exception in the main thread."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses by the convention of shells and schedulers: 128 + the signal's number."""
CLEAN_UP_S = 3.0
"""How long an interrupted command waits for a storage that may not answer."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


_received: int | None = None
"""The last SIGINT or SIGTERM of this process."""


def install() -> None:
    """Let SIGTERM raise :class:`Terminated`, and Ctrl-C KeyboardInterrupt, in the main thread.

    The main thread must call this.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = signum
    raise_received()


def raise_received() -> None:
    """Raise the exception of a signal again, if there was one.

    Python drops an exception that a signal raises inside a ``__del__`` or a callback of a weak
    reference, wherever the garbage collector runs one. A loop of the main thread that waits for Ray
    calls this in every round: it would have ended if the exception had arrived.
    """
    if _received is not None:
        raise Terminated if _received == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Restore the signal handlers after the body. ``ray.init`` replaces them by abrupt ones."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # Handlers that are not Python's cannot be restored.
                signal.signal(number, handler)


_unfinished: list[Callable[[], None]] = []
"""Clean-up functions of bodies that have not ended, in threads that an interrupt may cut off."""


@contextlib.contextmanager
def cleaning_up(clean: Callable[[], None]) -> Iterator[None]:
    """Call ``clean`` after the body, even if an interrupt cuts off the thread that runs it."""
    _unfinished.append(clean)
    try:
        yield
    finally:
        _unfinished.remove(clean)
        clean()


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of an interrupted command.

    ``ray.wait`` and ``ray.get`` raise KeyboardInterrupt after SIGTERM, too.
    """
    return TERMINATED if isinstance(error, Terminated) or _received == signal.SIGTERM else INTERRUPTED


def _clean_up() -> None:
    """Call the clean-up functions of all threads that are cut off."""
    for clean in list(_unfinished):
        with contextlib.suppress(Exception):
            clean()


def leave(status: int) -> None:
    """End the process with a status, at once if threads that use Ray were cut off.

    Ray is not shut down under such threads. The next call of one of them would let Ray's core end
    the process with another status, or would start Ray anew. The child processes of a local node
    die with this process, and their own children are killed here.
    """
    if status not in (INTERRUPTED, TERMINATED) and not _unfinished:
        sys.exit(status)
    # A second Ctrl-C or SIGTERM must not interrupt the clean-up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cleaning = threading.Thread(target=_clean_up, daemon=True)
    cleaning.start()
    cleaning.join(CLEAN_UP_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    import psutil  # This import is late, since main.py reports packages that are not installed.

    this = psutil.Process()
    for process in this.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.ppid() != this.pid:
                process.kill()
    os._exit(status)
