"""Print the floor plan of this repository: ``.venv/bin/python tests/support/floor_plan.py [DIRECTORY]``.

For each package it shows the files, the lines, the longest file and the longest function body. For the
imports it shows their number of levels and the modules that import one another in a circle.
``lint-imports`` (in ``make check``) enforces their order.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import grimp

TOPS = ("pipeline", "components", "tune_spaces")


def longest_function(file: Path) -> tuple[int, str]:
    """Return the lines and the name of a file's longest function body, without its docstring."""
    longest = (0, "")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            begin = first.end_lineno if documented else first.lineno - 1
            longest = max(longest, ((node.end_lineno or 0) - (begin or 0), node.name))
    return longest


def print_sizes(root: Path) -> None:
    print(f"{'package':32}{'files':>6}{'lines':>7}  longest file                   longest function body")
    for top in TOPS:
        every = sorted((root / top).rglob("*.py"))
        for folder in sorted({file.parent for file in every}):
            files = [file for file in every if file.parent == folder]
            lines = {file: len(file.read_text().splitlines()) for file in files}
            file = max(files, key=lines.__getitem__)
            length, name = max(longest_function(file) for file in files)
            named = f"{file.name} {lines[file]}"
            package = str(folder.relative_to(root))
            print(f"{package:32}{len(files):6}{sum(lines.values()):7}  {named:30} {name} {length}")
        print(f"{'all of ' + top:32}{len(every):6}{sum(len(f.read_text().splitlines()) for f in every):7}")


def circles_and_levels(imports: dict[str, set[str]]) -> tuple[list[list[str]], int]:
    """Return the modules in circles of imports, and the length of the longest chain (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    level: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in imports[module]:
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            below = [level[o] for m in group for o in imports[m] if o not in group]
            level.update(dict.fromkeys(group, 1 + max(below, default=0)))
            circles.extend([sorted(group)] if len(group) > 1 else [])

    for module in imports:
        if module not in number:
            visit(module)
    return circles, max(level.values())


def main(root: Path) -> None:
    print_sizes(root)
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(*TOPS, cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    circles, levels = circles_and_levels(imports)
    print(f"\n{len(imports)} modules on {levels} levels of imports; circles: {circles or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve())
