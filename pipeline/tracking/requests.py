"""Requests to MLflow: limits, deadlines and errors."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
import threading
from collections.abc import Callable, Iterator

import mlflow
from mlflow.exceptions import MlflowException

from components.errors import first_line
from pipeline.runtime.redaction import without_password
from pipeline.tracking.uri import VARIABLE

UPLOAD_TIMEOUT_SECONDS = 120
"""A server answers an upload only after it has passed the file on to its store."""


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an MLflow error, which errors of a database have too."""
    if not isinstance(error, MlflowException):
        return None
    status: int = error.get_http_status_code()
    return status


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, without the addresses and nesting that urllib3 adds."""
    text = without_password(first_line(error))
    text = text.partition(". Response body: '<")[0]  # The body is a page of HTML.
    if number := re.search(r"too many (\d{3}) error responses", text):
        return f"HTTP {number[1]}"
    for known in (
        "Connection refused",
        "timed out",
        "Name or service not known",
        "Temporary failure in name resolution",
    ):
        if known in text:
            return known.lower()
    return text if len(text) <= 300 else text[:297] + "..."


_limits_lock = threading.Lock()
_limits: list[dict[str, str | None]] = []
"""Limits in force, the latest last. The first entry is the environment before all of them."""


@contextlib.contextmanager
def http_limits(*, timeout: int, retries: int | None = None) -> Iterator[None]:
    """Set the limits of requests in the body, in the environment, where MLflow reads them.

    All threads share the environment, so the latest limits apply to all until their body ends.

    Args:
        timeout: of a request (seconds).
        retries: after a request that failed. None: as it is.
    """
    limits: dict[str, str | None] = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
    if retries is not None:
        limits["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    with _limits_lock:
        if not _limits:
            names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
            _limits.append({name: os.environ.get(name) for name in names})
        _limits.append(limits)
        _set_limits()
    try:
        yield
    finally:
        with _limits_lock:
            _limits[:] = [others for others in _limits if others is not limits]
            _set_limits()
            if len(_limits) == 1:
                _limits.clear()


def _set_limits() -> None:
    """Write the limits to the environment, later ones over earlier ones."""
    for name, value in functools.reduce(operator.or_, _limits).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def global_uri(uri: str) -> Iterator[None]:
    """Set the URI of MLflow's global functions in the body, and restore it after that."""
    before = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ[VARIABLE] = before


def error_within(seconds: float | None, work: Callable[[], None]) -> BaseException | None:
    """Return the error of ``work`` or None, or TimeoutError if it is still running by then."""
    error: list[BaseException | None] = [TimeoutError(f"no answer within {seconds} s")]

    def run() -> None:
        try:
            work()
            error[0] = None
        except Exception as e:
            error[0] = e

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return error[0]
