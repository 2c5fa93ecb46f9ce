"""What a run was made with: source revision, versions, machine and command, for its record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.redaction import without_password

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "mlflow-skinny", "mlflow")
ROOT = Path(__file__).resolve().parent.parent
"""Where this project's source lies: a checkout, a Ray job's copy of one, or site-packages."""


def environment() -> dict[str, Any]:
    """``git``, ``versions``, ``hardware`` and ``command`` of this process, as plain JSON types. Never raises."""
    return {"git": git(ROOT), "versions": versions(), "hardware": hardware(), "command": command(sys.argv)}


def git(root: Path) -> dict[str, Any]:
    """``revision`` and ``dirty`` of the checkout whose top directory is ``root``; both None where there is none.

    A directory above that happens to be a checkout (a virtual environment inside another project) says nothing about
    this source and is not taken for it.
    """
    nothing: dict[str, Any] = {"revision": None, "dirty": None}
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return nothing
        return {"revision": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one that belongs to another user
        return nothing


def _git(root: Path, *arguments: str) -> str:
    # GIT_OPTIONAL_LOCKS: "status" otherwise writes to the index, which may be another process's at this moment
    done = subprocess.run(
        ["git", "-C", os.fspath(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions by package, Python first; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, logical CPUs, memory and GPUs of this machine (the driver's: workers may run on others)."""
    found: dict[str, Any] = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": None,
        "gpus": [],
    }
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system tells
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    import torch

    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match.group(1)
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command(argv: list[str]) -> str:
    """The command line as it can be pasted into a shell, without passwords of URIs."""
    return without_password(shlex.join(["python", *argv]))
