"""The fenced blocks of the pages: what a reader would copy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from repository import ROOT

PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "infra/**/*.md", "benchmarks/*.md", "results/README.md")
    for page in ROOT.glob(pattern)
)
LANGUAGES = {"sh", "python", "text", "bibtex", "yaml"}


@dataclass(frozen=True)
class Block:
    """A fenced block: page below the root, heading of its section, line of its first fence, language, text."""

    page: Path
    section: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands of a shell block, one string each, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [" ".join(command.split()) for line in lines if (command := re.sub(r"(^|\s)#\s.*", "", line).strip())]

    def files(self) -> list[str]:
        """Return the paths of an indented listing of files, below the directory of its first line."""
        paths: list[str] = []
        parents = [""]
        for line in self.text.splitlines()[1:]:
            depth = (len(line) - len(line.lstrip())) // 2
            for name in re.split(r" {2,}", line.strip())[0].split(", "):
                parents[depth:] = [name]
                paths.append("".join(parents[1:]))
        return paths


def blocks(*languages: str) -> Iterator[Block]:
    """Yield the blocks of every page, of these languages or of all."""
    for page in PAGES:
        section, before = "", ""
        for token in MarkdownIt("commonmark").parse((ROOT / page).read_text()):
            if before == "h2":
                section = token.content
            before = token.tag if token.type == "heading_open" else ""
            if token.type == "fence" and token.map and (not languages or token.info in languages):
                yield Block(page, section, token.map[0] + 1, token.info, token.content)


def python_of(page: str, section: str) -> list[str]:
    """Return the Python blocks of a page's section, at least one."""
    texts = [b.text for b in blocks("python") if (str(b.page), b.section) == (page, section)]
    assert texts, f"{page}: {section}"
    return texts
