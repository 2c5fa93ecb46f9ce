"""The package as `pip install CLONE` puts it into another environment, away from the clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

PACKAGES = ("components", "pipeline", "tune_spaces")
PROGRAM = """
import defendpp
images, labels = defendpp.load_images(n=2)
print(defendpp.__file__, tuple(images.shape))
print(defendpp.load_run.__module__, len(defendpp.recipes()))
"""


@pytest.mark.slow
def test_an_installed_package_is_whole(tmp_path: Path) -> None:
    # Its dependencies are those of this environment: they are half a minute and 7 GB.
    install = ["-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(ROOT)]
    subprocess.run([sys.executable, *install], check=True)
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in tracked.stdout.splitlines() if not (tmp_path / "site" / name).exists()]
    assert missing == []

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run(sys.executable, "-c", PROGRAM)
    assert shown.startswith(f"{tmp_path}/site/defendpp.py (2, 1, 28, 28)\npipeline.api.runs ")
    script = str(tmp_path / "site" / "bin" / "defendpp")
    assert run(sys.executable, script, "--version").startswith("defendpp 0.1.0\nrevision unknown\n")
    assert "mnist-demo" in run(sys.executable, script, "recipes")
