"""Loggers of libraries, silenced for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_QUIET = {
    "ray.data": logging.WARNING,  # when a plan starts and ends; its warnings (no resources, memory) stay
    "ray.data._internal.progress": logging.ERROR,  # that bars are off
    # a failed task with a traceback, twice: build raises the error itself
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
}


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """No lines of Ray Data's own about what :func:`build` reports: ``_QUIET`` says which."""
    before = {name: logging.getLogger(name).level for name in _QUIET}
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
