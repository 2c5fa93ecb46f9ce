"""A function that is called at intervals while other work runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polling(look: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call a function at intervals while the body runs, and wait for its last call at the end.

    A KeyboardInterrupt does not wait, since the function may hang on a server that does not answer.

    Args:
        look: handles its own errors. An error that leaves it ends the thread, not the body.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(interval_s):
            look()

    thread = threading.Thread(target=watch, name="polling", daemon=True)
    thread.start()
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        ended.set()
        if not interrupted:
            thread.join()
