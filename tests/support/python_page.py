"""The Python blocks of docs/python.md."""

from __future__ import annotations

import re

from repository import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text()


def blocks_of(title: str) -> list[str]:
    """Return the Python blocks of a section."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks, title
    return blocks
