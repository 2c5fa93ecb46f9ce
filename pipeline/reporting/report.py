"""The report of a run: tables, plots and one HTML file that opens from disk.

It is made from ``run.json`` and the files that this names (docs/records.md), at any time. The same
records give the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from components.fields import to_dict
from pipeline.evaluation import figure_data
from pipeline.records import RunRecord
from pipeline.reporting import labels, markdown, records, results, sentences, verdicts
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.run_plots import RunPlots
from pipeline.runtime.storage import Storage, read_arrays


def build(run: Storage, root: Storage) -> dict[str, str]:
    """Write ``report/`` of a run: report.html, table.json, table.csv, table.md and plots/*.png.

    A partial run gives a partial report.

    Returns:
        Name -> path below the run directory of every file: "html", "table_json", "table_csv",
        "table_md", and "plot_..." for each plot that the run has data for.

    Raises:
        DataError: a record is missing or corrupt; the message names it.
        StorageError: a file cannot be written.
    """
    record = records.read_run(run)
    gallery = records.read_gallery(run)
    histories = {
        name: [records.read_epoch(root, file) for file in records.history_files(root, model.path)]
        for name, model in record.models.items()
    }
    data = table_data(record, root)
    plots = RunPlots(record, gallery, histories, read_arrays(run, figure_data.FIGURES_FILE)).draw()
    paths = {
        "html": "report/report.html",
        "table_json": "report/table.json",
        "table_csv": "report/table.csv",
        "table_md": "report/table.md",
    }
    for name, plot in plots.items():
        paths[f"plot_{name}"] = f"report/plots/{name}.png"
        run.write_bytes(paths[f"plot_{name}"], plot.png)
    run.write_json(paths["table_json"], data)
    run.write_bytes(paths["table_csv"], markdown.to_csv(record).encode())
    run.write_bytes(paths["table_md"], f"# {record.name}\n\n{markdown.markdown(record)}\n".encode())
    html = page(record, data, list(plots.values()), sentences.missing(record, gallery, histories, plots))
    # Write the page last: it marks a complete report.
    run.write_bytes(paths["html"], html.encode())
    return paths


def table_data(record: RunRecord, root: Storage) -> dict[str, Any]:
    """Return the content of table.json: the result table, and statistics over its evaluations."""
    return {
        **results.table(record),
        "worst_case": verdicts.worst_cases(record),
        "worst_case_over_seeds": verdicts.worst_over_seeds(record),
        "worst_case_pairs": verdicts.worst_case_pairs(record),
        "flags": verdicts.raised_flags(record),
        "near_chance": verdicts.near_chance(record),
        "comparisons": results.comparisons(record, root),
        **results.across(record),
    }


def page(record: RunRecord, data: Mapping[str, Any], plots: Sequence[Plot], missing: Sequence[str]) -> str:
    """Return the HTML page of a run, from its record and the result of :func:`table_data`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=labels.percent, duration=labels.duration, when=labels.when)
    environment.globals.update(
        mean_and_sd=labels.mean_and_sd,
        mark=labels.mark,
        median_norm=labels.median_norm,
        norms_over_seeds=results.norms_over_seeds,
        p_value=labels.p_value,
    )
    budgets = [
        (row["model"], column, {"accuracy_at_budget_interval": None, **row["cells"][column["key"]]})
        for column in data["columns"]
        for row in data["rows"]
        if row["cells"].get(column["key"], {}).get("accuracy_at_budget")
    ]
    return environment.get_template("report.html.j2").render(
        record=record,
        table=data,
        groups=Counter(column["threat_title"] for column in data["columns"]),
        budgets=budgets,
        roles=labels.role_titles(record),
        stages=results.stage_times(record),
        trained=any(role != "given" for role in record.roles.values()),
        source=markdown.source(record),
        missing=missing,
        counted=labels.counted(record),
        explanation=sentences.explanation(record),
        norms_note=sentences.norms_note(record),
        untrusted_note=sentences.untrusted_note(record),
        in_short=sentences.in_short(record),
        tested=any(model.active for model in (record.reliability or {}).values()),
        plots=[(plot.heading, plot.caption, base64.b64encode(plot.png).decode()) for plot in plots],
        config=json.dumps(to_dict(record.experiment), indent=2, sort_keys=True),
    )
