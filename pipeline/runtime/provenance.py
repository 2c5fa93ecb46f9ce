"""What a run was made with: source code, versions, machine and command, for its record."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.runtime.redaction import without_password

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "mlflow-skinny", "mlflow")
ROOT = Path(__file__).resolve().parents[2]
"""Where this project's source lies: a checkout, a Ray job's copy of one, or site-packages."""
SOURCE_DIRECTORIES = ("components", "pipeline", "tune_spaces")
REVISION_VARIABLE = "DEFENDPP_REVISION"
"""Environment variable with the revision of a Ray job's copy of the source, from which Ray leaves out .git."""
REVISION_FILE = "REVISION"
"""File beside the source with the revision of an image's copy."""


def environment() -> dict[str, Any]:
    """Return ``git``, ``source``, ``versions``, ``hardware`` and ``command`` of this process as JSON types. Never raises."""
    return {
        "git": revision(ROOT),
        "source": source_hash(ROOT),
        "versions": versions(),
        "hardware": hardware(),
        "command": command(sys.argv),
    }


def source_hash(root: Path) -> str | None:
    """Return the first 16 hexadecimal digits of a SHA-256 over the source files below ``root``.

    The hash covers the path and the bytes of each ``*.py`` and ``*.j2`` file of SOURCE_DIRECTORIES. Equal files give
    the same hash in a checkout, in a Ray job's copy of it, in an image and in site-packages. None if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for directory in SOURCE_DIRECTORIES:
            for path in sorted(p for p in (root / directory).rglob("*") if p.suffix in (".py", ".j2") and p.is_file()):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    except OSError:
        return None
    return digest.hexdigest()[:16]


def revision(root: Path) -> dict[str, Any]:
    """Return ``revision`` and ``dirty`` of a checkout or, where ``root`` is none, of REVISION_FILE or REVISION_VARIABLE.

    ``git describe --always --abbrev=40 --dirty --exclude '*'`` writes the value of either. Without its ``-dirty``,
    ``dirty`` is unknown (None): `git rev-parse HEAD` does not say it.
    """
    checkout = git(root)
    if checkout["revision"] is not None:
        return checkout
    # The file first: it belongs to this very copy, and the variable to whatever was submitted.
    given = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        given = (root / REVISION_FILE).read_text().strip()
    if given := given or os.environ.get(REVISION_VARIABLE, ""):
        return {"revision": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty") or None}
    return checkout


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
    """Return the command line as it can be pasted into a shell, without passwords of URIs."""
    return shlex.join(["python", *map(without_password, argv)])
