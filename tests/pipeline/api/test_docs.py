"""The page docs/python.md and the notebook: what they show runs, and does what they say."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from documentation import python_of
from nbclient import NotebookClient
from repository import ROOT

import defendpp
from components.errors import DataError

PAGE = (ROOT / "docs" / "python.md").read_text()
NOTEBOOK = ROOT / "docs" / "notebooks" / "evaluate.ipynb"


def test_the_snippets_on_evaluations_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for title in ("Evaluate a network", "Read the result", "The parts below"):
        for block in python_of("docs/python.md", title):
            exec(block.replace("/data/defendpp", str(tmp_path)), names)
    assert "n = 20" in capsys.readouterr().out
    page, again, result = names["page"], names["again"], names["result"]
    assert "evaluate-model" in page.read_text()
    assert "This report is partial" not in page.read_text()
    assert again.to_json() == result.to_json()
    assert torch.equal(again.examples("pgd"), result.examples("pgd"))
    assert again.to_dataframe().equals(result.to_dataframe())
    with pytest.raises(DataError, match=r"model was in the memory of a process that called defendpp\.evaluate"):
        again.models["model"]
    assert names["adversarial"].shape == names["images"].shape


def test_every_function_and_argument_is_on_the_page() -> None:
    functions = [name for name in defendpp.__all__ if inspect.isfunction(getattr(defendpp, name))]
    assert [name for name in functions if f"`{name}(" not in PAGE] == []
    arguments = inspect.signature(defendpp.evaluate).parameters
    assert [name for name in arguments if not re.search(rf"`{name}\b", PAGE)] == []


@pytest.mark.slow
def test_the_notebook_runs_and_shows_the_result(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert kept, "the page shows the outputs of an earlier run"
    for cell in notebook.cells:
        cell["outputs"] = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [o.output_type for o in outputs] == [o.output_type for o in kept]
    pages = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert any('<b class="number">' in page for page in pages)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    (sentence,) = [o.text for o in outputs if o.output_type == "stream"]
    assert re.fullmatch(r"\d+% of 50 images withstand all attacks, 95 % interval \d+% to \d+%\n", sentence)
