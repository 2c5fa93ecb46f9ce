"""The report of a run, from its records alone: tables, plots and one HTML file that opens from disk.

Rebuilt at any time from ``run.json`` and what it names (docs/records.md); the same records give the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from components.config.roles import roles_of
from pipeline.evaluation import figure_data
from pipeline.reporting import labels, markdown, records, results, sentences, verdicts
from pipeline.reporting.records import experiment_of
from pipeline.reporting.run_plots import draw_pictures
from pipeline.runtime.storage import Storage, read_arrays


def build(run: Storage, root: Storage) -> dict[str, str]:
    """Write ``report/`` of a run: report.html, table.json, table.csv, table.md and plots/*.png. A partial run gives a partial report.

    Args:
        run: the run directory. root: the storage it lies in.

    Returns:
        What was written, name -> path below the run directory; "html" is the report, "table_json", "table_csv", "table_md", and
        "plot_..." for each plot there was data for.

    Raises:
        DataError: a record is missing or corrupt; the message names it. StorageError: something could not be written.
    """
    record = records.read_run(run)
    gallery = records.read_gallery(run)
    histories = {
        name: [records.read_epoch(root, file) for file in records.history_files(root, model)]
        for name, model in record["models"].items()
    }
    data = _data(record, root)
    pictures = draw_pictures(record, gallery, histories, read_arrays(run, figure_data.FIGURES_FILE))
    paths = {
        "html": "report/report.html",
        "table_json": "report/table.json",
        "table_csv": "report/table.csv",
        "table_md": "report/table.md",
    }
    for name, (_, _, png) in pictures.items():
        paths[f"plot_{name}"] = f"report/plots/{name}.png"
        run.write_bytes(paths[f"plot_{name}"], png)
    run.write_json(paths["table_json"], data)
    run.write_bytes(paths["table_csv"], markdown.to_csv(record).encode())
    run.write_bytes(paths["table_md"], f"# {record['name']}\n\n{markdown.markdown(record)}\n".encode())
    html = _html(record, data, pictures, sentences.missing(record, gallery, histories, pictures))
    run.write_bytes(paths["html"], html.encode())  # last: its presence says that all of it is there
    return paths


def _data(record: Mapping[str, Any], root: Storage) -> dict[str, Any]:
    """Return what table.json holds: the result table, and what its evaluations say together."""
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


def _html(
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str, bytes]],
    lacking: Sequence[str],
) -> str:
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
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
    groups: dict[str, int] = {}
    for column in data["columns"]:
        groups[column["threat_title"]] = groups.get(column["threat_title"], 0) + 1
    budgets = [
        (row["model"], column, {"accuracy_at_budget_interval": None, **row["cells"][column["key"]]})
        for column in data["columns"]
        for row in data["rows"]
        if row["cells"].get(column["key"], {}).get("accuracy_at_budget")
    ]
    return environment.get_template("report.html.j2").render(
        record=record,
        table=data,
        groups=groups,
        budgets=budgets,
        roles=labels.role_titles(record),
        stages=results.stage_times(record),
        trained=any(role != "given" for role in roles_of(experiment_of(record)).values()),
        source=markdown.source(record),
        lacking=lacking,
        counted=labels.counted(record),
        explanation=sentences.explanation(record),
        norms_note=sentences.norms_note(record),
        untrusted_note=sentences.untrusted_note(record),
        in_short=sentences.in_short(record),
        tested=any(one["active"] for one in (record.get("reliability") or {}).values()),
        reliability=records.in_order(record.get("reliability") or {}, tuple(roles_of(experiment_of(record)))),
        pictures=[(heading, caption, base64.b64encode(png).decode()) for heading, caption, png in pictures.values()],
        config=json.dumps(record["experiment"], indent=2, sort_keys=True),
    )
