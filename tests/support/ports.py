"""Ports on which nothing listens."""

from __future__ import annotations

import contextlib
import socket


def free_ports(n: int) -> list[int]:
    """Return so many different ports. They are held until all are found."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def free_port() -> int:
    return free_ports(1)[0]
