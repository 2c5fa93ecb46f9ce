"""Provenance of a run for its record: source code, versions, machine and command."""

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

from pipeline.program import called_by
from pipeline.runtime.redaction import without_password

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "mlflow-skinny", "mlflow")
ROOT = Path(__file__).resolve().parents[2]
"""Directory of this project's source: a checkout, a Ray job's copy of one, or site-packages."""
SOURCE_DIRECTORIES = ("components", "pipeline", "tune_spaces")
REVISION_VARIABLE = "DEFENDPP_REVISION"
"""Environment variable with the revision of a Ray job's copy of the source, which has no .git."""
REVISION_FILE = "REVISION"
"""File beside the source with the revision of an image's copy."""
CPUINFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Return the provenance of this process as JSON types. Raises nothing."""
    return {
        "git": revision(ROOT),
        "source": source_hash(ROOT),
        "versions": versions(),
        "hardware": hardware(),
        "command": command(sys.argv),
    }


def source_hash(root: Path) -> str | None:
    """Return the first 16 hexadecimal digits of a SHA-256 over the source files below ``root``.

    The hash covers the path and the bytes of each ``*.py`` and ``*.j2`` file of SOURCE_DIRECTORIES.
    Equal files give the same hash in a checkout, in a Ray job's copy of it, in an image and in
    site-packages. None if a file cannot be read.
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
    """Return ``revision`` and ``dirty`` of a checkout, or of a copy without .git.

    A copy has them in REVISION_FILE or REVISION_VARIABLE, which
    ``git describe --always --abbrev=40 --dirty --exclude '*'`` writes. Without its ``-dirty``,
    ``dirty`` is unknown (None), since `git rev-parse HEAD` does not say it.
    """
    checkout = git(root)
    if checkout["revision"] is not None:
        return checkout
    # The file comes first, since it belongs to this copy. The variable belongs to the job.
    text = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (root / REVISION_FILE).read_text().strip()
    if text := text or os.environ.get(REVISION_VARIABLE, ""):
        return {"revision": text.removesuffix("-dirty"), "dirty": text.endswith("-dirty") or None}
    return checkout


def git(root: Path) -> dict[str, Any]:
    """Return ``revision`` and ``dirty`` of the checkout at ``root``, both None if there is none.

    A directory above that happens to be a checkout (a virtual environment inside another project)
    says nothing about this source and is not taken for it.
    """
    unknown: dict[str, Any] = {"revision": None, "dirty": None}
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return unknown
        return {"revision": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # No git, no checkout, or another user's checkout.
        return unknown


def _git(root: Path, *arguments: str) -> str:
    """Return the output of a git command in a directory."""
    # Otherwise "status" writes to the index, which another process may be using.
    result = subprocess.run(
        ["git", "-C", os.fspath(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return result.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def requirements() -> str:
    """Return the installed distributions as a requirements file, without this project."""
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    pins = (f"{name}=={version}\n" for name, version in sorted(names.items(), key=lambda item: item[0].lower()))
    return "".join(pin for pin in pins if not pin.startswith("defendpp=="))


def hardware() -> dict[str, Any]:
    """Return the processor, CPUs, memory and GPUs of this machine. Workers may run on others."""
    machine: dict[str, Any] = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": None,
        "gpus": [],
    }
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Some systems have no such value.
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    import torch

    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE):
            return match.group(1)
    return platform.processor() or platform.machine()


def command(argv: list[str]) -> str:
    """Return the command line as it can be pasted into a shell, without passwords of URIs."""
    script, *arguments = (shlex.quote(without_password(argument)) for argument in argv)
    return " ".join([called_by() or f"python {script}", *arguments])


def lacks_bfloat16() -> bool:
    """Tell whether this machine's processor is known to have no bfloat16 arithmetic.

    PyTorch then emulates it, at a tenth of float32's speed (docs/LOG.md). Only Linux says what a
    processor has.
    """
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return False
    return match is not None and not {"avx512_bf16", "amx_bf16", "bf16"} & set(match[1].split())
