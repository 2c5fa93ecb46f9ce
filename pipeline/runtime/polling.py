"""One way to watch something while other work runs: a function called at intervals on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polling(look: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call ``look`` every ``interval_s`` seconds while the body runs, and wait for its last call at the end.

    A KeyboardInterrupt is not held up by that wait: ``look`` may hang on a server that does not answer.

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
