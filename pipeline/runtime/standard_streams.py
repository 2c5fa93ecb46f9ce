"""Standard streams that never fail a run, even if their reader leaves."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys


class _Sink(io.FileIO):
    """A file descriptor that ignores write errors: a run's results matter more than its output."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._failed = False

    def write(self, data: object) -> int:
        """Write ``data``, or drop it after an error. Return the number of bytes."""
        view = memoryview(data)  # type: ignore[arg-type]
        if not self._failed:
            try:
                while (written := super().write(view)) is None:
                    # The caller made the descriptor non-blocking, and its reader is slow.
                    select.select([], [self.fileno()], [])
                return written
            except OSError as e:
                self._failed = True
                # The reader of a pipe may leave early, as `| head` does.
                if e.errno != errno.EPIPE and self.fileno() == 1:
                    with contextlib.suppress(OSError):
                        os.write(2, f"warning: standard output cannot be written ({e.strerror})\n".encode())
        return view.nbytes


def harden() -> None:
    """Replace standard output and error by streams on which printing raises no error.

    Characters that the encoding lacks are printed as escapes. After the first write error all
    output is dropped. A descriptor that the caller has closed (``>&-``) becomes the null device.
    Otherwise the next file to be opened would get its number, and with it the output.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # This takes the lowest free number, which is ``descriptor``.
    sys.stdout = _text(1, sys.stdout)
    sys.stderr = _text(2, sys.stderr)


def _text(descriptor: int, before: object) -> io.TextIOWrapper:
    """Return a text stream of a descriptor, with the encoding of the stream before."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(_Sink(descriptor))
    # Files and pipes are written line by line, too, since somebody may follow them.
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)
