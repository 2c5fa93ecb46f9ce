"""The frame of a report's page: style sheet, contents, links and plots. The page needs no other file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reporting.html.templates import environment
from pipeline.reporting.plots.svg import FONT, inline, palette_css, plot_css
from pipeline.runtime.provenance import ROOT
from pipeline.runtime.storage import Storage

DOCS = {"claims": "What the paper's claims are worth", "evaluation": "How to read a robustness number"}
DOCS |= {"reliability": "When not to believe an attack"}
"""Page of docs/ -> the question that it answers for the reader of a report."""


@dataclass(frozen=True)
class Link:
    """A link of a report. Without an address, the page shows ``where`` instead."""

    text: str
    address: str | None
    where: str = ""


def render(template: str, folder: Path | None = None, **values: Any) -> str:
    """Return the page of a template that extends ``base.html.j2``.

    Args:
        template: name of the template.
        folder: where the template is, if not beside this file.
        values: variables of the template. ``base.html.j2`` needs ``title`` and ``links``.
    """
    templates = environment(*filter(None, [folder]), Path(__file__).parent)
    templates.globals["inline"] = inline
    css = f"{palette_css()}\n{plot_css()}"
    # The template's macro `section` fills the contents while it renders.
    return templates.get_template(template).render(css=css, font=FONT, contents=[], **values)


def links(report: Storage, files: Sequence[str], tracking_uri: str | None) -> list[Link]:
    """Return links to files beside a report, to MLflow if it is a server, and to the documentation.

    The documentation has an address if the report lies in the checkout.
    """
    to_files = [Link(Path(file).name or file, file) for file in files]
    to_mlflow = [Link("MLflow", tracking_uri)] if (tracking_uri or "").startswith(("http://", "https://")) else []
    return [*to_files, *to_mlflow, *(_to_docs(report, page, title) for page, title in DOCS.items())]


def _to_docs(report: Storage, page: str, title: str) -> Link:
    file = ROOT / "docs" / f"{page}.md"
    here = report.local_root.resolve() if report.is_local else None
    inside = here is not None and ROOT in here.parents and file.exists()
    return Link(title, os.path.relpath(file, here) if inside else None, f"docs/{page}.md")
