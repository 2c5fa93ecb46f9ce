"""Loggers of libraries, silenced for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

RAY_DATA = {
    # Ray Data logs when a plan starts and ends. Its warnings (no resources, memory) stay.
    "ray.data": logging.WARNING,
    # Ray Data warns that its bars are off.
    "ray.data._internal.progress": logging.ERROR,
    # Ray Data logs the traceback of a failed task twice. The driver raises the error itself.
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
}
"""Levels at which Ray Data repeats nothing that the driver reports itself."""


@contextlib.contextmanager
def log_levels(levels: Mapping[str, int]) -> Iterator[None]:
    """Set the levels of loggers, by name, while the body runs."""
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
