"""The house keeps its shape: small files, short functions, folders that one can take in at a glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, TESTS

CODE = (ROOT / "pipeline", ROOT / "components", ROOT / "tune_spaces")
ALIKE = ("components/attacks",)
"""Folders whose files are all of one kind, so that their number says nothing."""


def files(*folders: Path) -> list[Path]:
    found = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    assert found
    return found


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body without its docstring: signature and contract may be long."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    begin = first.end_lineno if documented else first.lineno - 1
    assert begin is not None
    assert function.end_lineno is not None
    return function.end_lineno - begin


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize(("folders", "most"), [(CODE, 400), ((TESTS,), 500)], ids=["code", "tests"])
def test_no_file_is_too_long(folders: tuple[Path, ...], most: int) -> None:
    long = {str(f.relative_to(ROOT)): n for f in files(*folders) if (n := len(f.read_text().splitlines())) > most}
    assert long == {}


def test_no_function_is_too_long() -> None:
    long = {f"{f.relative_to(ROOT)}:{g.name}": n for f in files(*CODE) for g in functions(f) if (n := lines_of(g)) > 60}
    assert long == {}


def test_no_folder_of_unlike_files_is_too_full() -> None:
    folders = {file.parent for file in files(*CODE)}
    full = {str(d.relative_to(ROOT)): len(list(d.glob("[!_]*.py"))) for d in folders}
    assert {name: n for name, n in full.items() if n > 15 and name not in ALIKE} == {}


def test_no_module_uses_the_private_names_of_another() -> None:
    found = []
    for file in files(*CODE):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("pipeline", "components")):
                found += [f"{file.relative_to(ROOT)}: {n.name}" for n in node.names if n.name.startswith("_")]
    assert found == []
