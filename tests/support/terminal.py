"""A command on a pseudo-terminal, where Ctrl-C reaches it as a user's does."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence


class Terminal:
    """A command with its own terminal, killed at the end of a ``with`` block. ``text`` is its output so far."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.text = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(arguments[0], list(arguments), dict(environment))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def read(self) -> bool:
        """Read the output of the next 50 ms. Return False once the command has closed its terminal."""
        if select.select([self._fd], [], [], 0.05)[0]:
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:  # Linux raises this once the other end is closed.
                return False
            self.text += data.decode(errors="replace")
            return bool(data)
        return True

    def wait_until(self, done: Callable[[str], bool], timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not done(self.text):
            assert time.monotonic() < deadline, self.text[-3000:]
            assert self.read(), self.text[-3000:]

    def ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def end(self, timeout_s: float = 60) -> int:
        """Wait for the command's end and return its exit status (negative: the signal that killed it)."""
        deadline = time.monotonic() + timeout_s
        while self.read():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
