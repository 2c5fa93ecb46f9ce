"""Report of a sweep: one HTML page that opens from disk, and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from pipeline.records import Record
from pipeline.reporting.markdown import made_with
from pipeline.runtime.storage import Storage
from pipeline.sweep.report.plots import PLOTS, heat_map, parallel, pareto
from pipeline.sweep.report.summary import markdown, paragraphs, table, to_csv


def build(record: Mapping[str, Any], storage: Storage) -> list[str]:
    """Write ``report/`` of a sweep that has a choice, and return the names of its files."""
    plots = {"pareto": pareto(record), "parallel": parallel(record)}
    if (png := heat_map(record)) is not None:
        plots["heat-map"] = png
    page = _page(record, storage, plots)
    files = {f"{name}.png": png for name, png in plots.items()} | {
        "trials.csv": to_csv(record).encode(),
        "table.md": markdown(record).encode(),
        "report.html": page.encode(),
    }
    for name, content in files.items():
        storage.write_bytes(f"report/{name}", content)
    return list(files)


def _page(record: Mapping[str, Any], storage: Storage, plots: Mapping[str, bytes]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=f"Sweep {record['name']}: {record['space_name']}",
        paragraphs=paragraphs(record),
        made_with=made_with(Record.from_json(record)),
        again=f"python pipeline/main.py run --from {storage.uri}/best.json",
        plots=[(PLOTS[name], base64.b64encode(png).decode()) for name, png in plots.items()],
        rows=table(record),
    )
