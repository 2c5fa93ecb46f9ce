"""A user's error on its way through Ray, which wraps every exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import UserCodeException

from components.errors import UserError


def unwrap(error: BaseException) -> UserError | None:
    """The user's error inside what Ray wrapped around it, if there is one."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        e = queue.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, UserError) and type(e).__name__.find("RayTaskError") < 0:
            return e
        queue += [getattr(e, "cause", None), e.__cause__, e.__context__]
        queue += list(getattr(e, "worker_failures", {}).values())
    return None


class _TaskError(UserCodeException):
    """Carries a UserError from a task to the driver. As it is, Ray would add its own advice to the message."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error

    def __reduce__(self) -> tuple[type[_TaskError], tuple[UserError]]:
        return _TaskError, (self.error,)


@contextlib.contextmanager
def carrying_user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as e:
        raise _TaskError(e) from None


def carried_user_error(error: BaseException | None) -> UserError | None:
    """The UserError in what Ray wrapped a task's error in."""
    while error is not None:
        if isinstance(error, _TaskError):
            return error.error
        error = getattr(error, "cause", None) or error.__cause__
    return None
