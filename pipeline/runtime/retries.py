"""Retries of operations on a file system, while it fails for a reason that may pass."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from pipeline.runtime.console import say

T = TypeVar("T")

RETRY_S = 180.0
"""How long an operation is repeated by default."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EINTR", "EIO", "EREMOTEIO", "ESTALE", "EPIPE", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN"),
    )
    if hasattr(errno, name)
}
TRANSIENT_TEXT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT"
    r"|REQUEST_LIMIT_EXCEEDED"
    r"|curlCode: (?!60\b|51\b)|HTTP (?:response code|status):? (?:429|5\d\d)|(?:timed? ?out|temporarily|try again)",
    re.IGNORECASE,
)
"""Object stores report an error as text. (curl's 51 and 60 are certificates, which stay wrong.)"""
STORE_TEXT = re.compile(r"AWS Error|curlCode|google::cloud|Azure")
"""Text in the errors of Arrow's object stores, which have no error number."""


def is_transient(error: BaseException) -> bool:
    """Return whether an error may pass soon (a lost connection, an overloaded server)."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT_ERRNO
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(TRANSIENT_TEXT.search(str(error)))


def is_access_error(error: BaseException) -> bool:
    """Return whether a file could not be reached. Arrow raises OSError for its content, too."""
    from_system = isinstance(error, OSError) and error.errno is not None
    return from_system or is_transient(error) or bool(STORE_TEXT.search(str(error)))


def with_retries(action: Callable[[], T], place: str, patience_s: float | None = None) -> T:
    """Return what ``action`` returns, and repeat it while it fails with a transient error.

    Args:
        action: raises OSError or ArrowException if it fails.
        place: what does not answer, for a message that is printed once.
        patience_s: how long to repeat it (seconds), RETRY_S if None.
    """
    deadline = time.monotonic() + (RETRY_S if patience_s is None else patience_s)
    pause, announced = FIRST_PAUSE_S, False
    while True:
        try:
            return action()
        except (OSError, pa.ArrowException) as e:
            if not is_transient(e) or time.monotonic() + pause > deadline:
                raise
            if not announced:
                say(f"{place} does not answer ({e}); it is asked again for up to {RETRY_S:.0f} s")
                announced = True
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
