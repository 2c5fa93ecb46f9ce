"""User errors on their way through Ray, which wraps every exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import UserCodeException

from components.errors import UserError


class _CarriedError(UserCodeException):
    """A UserError raised in a Ray Data task. Ray Data adds its own advice to other exceptions."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error

    def __reduce__(self) -> tuple[type[_CarriedError], tuple[UserError]]:
        return _CarriedError, (self.error,)


@contextlib.contextmanager
def carrying_user_errors() -> Iterator[None]:
    """Wrap a UserError of the body for Ray Data. :func:`unwrap` finds it again in the driver."""
    try:
        yield
    except UserError as e:
        raise _CarriedError(e) from None


def unwrap(error: BaseException) -> UserError | None:
    """Return the UserError inside Ray's wrappers, or None if there is none."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        e = queue.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        # The text of Ray's classes that inherit from UserError and RayTaskError is a traceback.
        if isinstance(e, UserError) and "RayTaskError" not in type(e).__name__:
            return e
        queue += [e.error] if isinstance(e, _CarriedError) else []
        queue += [getattr(e, "cause", None), e.__cause__, e.__context__]
        queue += getattr(e, "worker_failures", {}).values()
    return None
