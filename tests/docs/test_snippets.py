"""Every fenced block of the pages: its language, and its Python."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import fake_run
import pytest
from documentation import LANGUAGES, PAGES, Block, blocks
from repository import ROOT

from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.storage import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uri import default_uri

TESTS_OF_PAGES = {
    "docs/python.md": ("tests/pipeline/api/test_docs.py", "tests/pipeline/api/test_runs_and_sweeps.py"),
    "docs/ecosystem.md": ("tests/pipeline/reporting/test_history.py", "tests/pipeline/sweep/test_study.py"),
}
"""Pages whose Python needs results, and the tests that run it."""


def run_block(block: Block, text: str) -> str:
    """Run the Python of a block, and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, str(block), "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_every_block_names_its_language() -> None:
    assert len(PAGES) > 15
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, files in TESTS_OF_PAGES.items():
        assert any(str(block.page) == page for block in blocks("python"))
        for file in files:
            text = (ROOT / file).read_text()
            assert "python_of(" in text or "blocks(" in text


SELF_CONTAINED = [b for b in blocks("python") if str(b.page) not in (*TESTS_OF_PAGES, "docs/mlflow.md")]


@pytest.mark.slow
@pytest.mark.parametrize("block", SELF_CONTAINED, ids=str)
def test_python_of_a_page_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = [line for line in run_block(block, block.text).splitlines() if line.startswith("|")]
    page = (ROOT / block.page).read_text()
    assert [line for line in table if line not in page] == [], "a printed table is the one that the page shows"


@pytest.mark.slow
def test_python_of_the_page_on_mlflow_reads_a_published_run(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run = fake_run.write(root)
    tracker = Tracker(default_uri(root), run, echo=lambda line: None)
    mlflow_run.publish_run(tracker, run, root)
    assert tracker.flush()
    (block,) = [b for b in blocks("python") if str(b.page) == "docs/mlflow.md"]
    # MLflow would keep this tracking URI in the environment of the process.
    text = block.text.replace("/data/defendpp", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert "defend" in done.stdout, done.stderr
    assert "metrics.accuracy/clean" in done.stdout
