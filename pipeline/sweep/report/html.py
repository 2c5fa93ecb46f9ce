"""A sweep's report as a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import jinja2

from pipeline.records import Record
from pipeline.reporting.markdown import made_with
from pipeline.runtime.storage import Storage
from pipeline.sweep.report.plots import PLOTS, heat_map, parallel, pareto
from pipeline.sweep.report.summary import markdown, paragraphs, table, to_csv

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#111827}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #e5e7eb}
td:last-child,th:last-child{text-align:left}img{max-width:100%}figcaption{color:#4b5563}pre{background:#f3f4f6;padding:.7rem;overflow:auto}</style>
<h1>{{ title }}</h1>{% for p in paragraphs %}<p>{{ p }}</p>{% endfor %}
<pre>{{ again }}</pre>
{% for name, caption, data in pictures %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
<table><tr>{% for head in rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>Made with</h2><dl>{% for what, text in made_with.items() %}<dt>{{ what }}</dt><dd>{{ text }}</dd>{% endfor %}</dl></html>
"""


def build(record: Mapping[str, Any], storage: Storage) -> list[str]:
    """Write ``report/`` of a sweep that has a choice: report.html, table.md, trials.csv, plots. Returns the names."""
    pictures = {"pareto": pareto(record), "parallel": parallel(record)}
    if (map_ := heat_map(record)) is not None:
        pictures["heat-map"] = map_
    for name, data in pictures.items():
        storage.write_bytes(f"report/{name}.png", data)
    storage.write_bytes("report/trials.csv", to_csv(record).encode())
    storage.write_bytes("report/table.md", markdown(record).encode())
    html = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    text = html.render(
        title=f"Sweep {record['name']}: {record['space_name']}",
        paragraphs=paragraphs(record),
        made_with=made_with(Record.from_json(record)),
        again=f"python pipeline/main.py run --from {storage.uri}/best.json",
        pictures=[(n, PLOTS[n], base64.b64encode(d).decode()) for n, d in pictures.items()],
        rows=table(record),
    )
    storage.write_bytes("report/report.html", text.encode())
    return [*(f"{name}.png" for name in pictures), "trials.csv", "table.md", "report.html"]
