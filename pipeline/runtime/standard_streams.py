"""Standard streams that never fail a run: whoever reads them may go away, and their encoding may lack a character."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys


class _Sink(io.FileIO):
    """A file descriptor whose write errors are dropped: what a run computes is worth more than what it prints."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._failed = False

    def write(self, data: object) -> int:  # type: ignore[override]
        """Write ``data``, or drop it where that is not possible. Returns how many bytes are done with."""
        view = memoryview(data)  # type: ignore[arg-type]
        if not self._failed:
            try:
                while (written := super().write(view)) is None:
                    select.select([], [self.fileno()], [])  # the caller made it non-blocking, and its reader is slow
                return written
            except OSError as e:
                self._failed = True
                # a pipe whose reader has left, such as `| head`, is no news
                if e.errno != errno.EPIPE and self.fileno() == 1:
                    with contextlib.suppress(OSError):
                        os.write(2, f"warning: standard output cannot be written ({e.strerror})\n".encode())
        return view.nbytes


def harden() -> None:
    """Replace standard output and error by streams on which printing raises no error.

    A character that the encoding lacks is printed as an escape, and output is dropped from the first write error on. A
    descriptor that the caller has closed (``>&-``) becomes the null device: otherwise the next file that is opened would
    take its number and receive what is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = _text(1, sys.stdout)
    sys.stderr = _text(2, sys.stderr)


def _text(descriptor: int, before: object) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(_Sink(descriptor))
    # line by line also into a file or a pipe, where somebody follows it
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)
