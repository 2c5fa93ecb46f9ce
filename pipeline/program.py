"""The name by which a person called this program, so that messages show commands that can be pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "defendpp"
"""Console script of this project, and its name in messages of other processes."""


def program() -> str:
    """Return the beginning of this program's command, such as ``python pipeline/main.py``.

    In another program's process (a notebook, a worker, a test) it is NAME.
    """
    return called_by() or NAME


def called_by() -> str:
    """Return the beginning of this process's command, or "" in another program's process."""
    script = Path(sys.argv[0] if sys.argv else "")
    is_ours = script.parent.resolve() == Path(__file__).resolve().parent
    if is_ours and script.name == "__main__.py":
        return shlex.join([sys.orig_argv[0], "-m", "pipeline"])
    if is_ours and script.name == "main.py":
        return shlex.join([sys.orig_argv[0], sys.argv[0]])
    if script.name != NAME:
        return ""
    return NAME if shutil.which(NAME) == str(script.resolve()) else shlex.quote(sys.argv[0])
