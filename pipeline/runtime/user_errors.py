"""A user's error on its way through Ray, which wraps every exception."""

from __future__ import annotations

from typing import Any

from components.errors import UserError

pass


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
