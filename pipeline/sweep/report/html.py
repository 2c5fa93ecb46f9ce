"""Report of a sweep: one HTML page that opens from disk, and the files beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.program import program
from pipeline.records import Record
from pipeline.reporting.html.page import Link, links, render
from pipeline.reporting.markdown import made_with
from pipeline.reporting.plots.style import Plot
from pipeline.runtime.storage import Storage
from pipeline.sweep.report.plots import draw
from pipeline.sweep.report.summary import conclusion, markdown, overview, paragraphs, table, to_csv


def build(record: Mapping[str, Any], storage: Storage) -> list[str]:
    """Write ``report/`` of a sweep that has a choice, and return the names of its files."""
    plots = draw(record)
    page = _page(record, storage, plots)
    files = {f"{name}.svg": plot.svg for name, plot in plots.items()} | {
        "trials.csv": to_csv(record).encode(),
        "table.md": markdown(record).encode(),
        "report.html": page.encode(),
    }
    for name, content in files.items():
        storage.write_bytes(f"report/{name}", content)
    for name in plots:
        # Reports of earlier revisions had PNG. They would look like plots of this report.
        storage.delete(f"report/{name}.png")
    return list(files)


def _page(record: Mapping[str, Any], storage: Storage, plots: Mapping[str, Plot]) -> str:
    sweep = Record.from_json(record)
    files = links(storage / "report", ("trials.csv", "table.md", "../sweep.json"), sweep.experiment.tracking_uri)
    if record["evaluation"]:
        files.insert(0, Link("report on test images", f"../../../{record['evaluation']}/report/report.html"))
    return render(
        "sweep.html.j2",
        Path(__file__).parent,
        title=f"Sweep {record['name']}: {record['space_name']}",
        links=files,
        summary=overview(record),
        conclusion=conclusion(record),
        paragraphs=paragraphs(record),
        made_with=made_with(sweep),
        again=f"{program()} run --from {shlex.quote(f'{storage.uri}/best.json')}",
        plots=plots,
        rows=table(record),
        choice=record["choice"]["trial"],
    )
