"""The report of a run: tables, plots and one HTML file that opens from disk.

It is made from ``run.json`` and the files that this names (docs/records.md), at any time. The same
records give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from components.fields import to_dict
from pipeline.evaluation import figure_data
from pipeline.interchange import model_info
from pipeline.records import RunRecord
from pipeline.reporting import headline, history, labels, markdown, records, results, sentences, verdicts
from pipeline.reporting.html import pivots
from pipeline.reporting.html.page import links, render
from pipeline.reporting.plots import panels
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.run_plots import RunPlots
from pipeline.runtime.storage import Storage, read_arrays


def build(run: Storage, root: Storage) -> dict[str, str]:
    """Write ``report/`` of a run: report.html, its tables and plots, and files for other programs.

    A partial run gives a partial report.

    Returns:
        Name -> path below the run directory of every file: "html", "table_json", "table_csv",
        "table_md", "history_csv", "plot_..." for each plot that the run has data for, and
        "model_info_..." for each model that RobustBench's leaderboard could list.

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
    arrays = read_arrays(run, figure_data.FIGURES_FILE)
    # A run whose judged/ was deleted to save space still has a report.
    judged = {path: records.read_judged(root, path) for path in panels.judged_paths(record) if root.list(path)}
    plots = RunPlots(record, gallery, histories, arrays, judged).draw()
    paths = {
        "html": "report/report.html",
        "table_json": "report/table.json",
        "table_csv": "report/table.csv",
        "table_md": "report/table.md",
        "history_csv": history.FILE,
    }
    for name, plot in plots.items():
        paths[f"plot_{name}"] = f"report/plots/{name}.svg"
        run.write_bytes(paths[f"plot_{name}"], plot.svg)
        # Reports of earlier revisions had PNG. They would look like plots of this report.
        run.delete(f"report/plots/{name}.png")
    run.write_json(paths["table_json"], data)
    run.write_bytes(paths["table_csv"], markdown.to_csv(record).encode())
    run.write_bytes(paths["table_md"], f"# {record.name}\n\n{markdown.markdown(record)}\n".encode())
    run.write_bytes(paths["history_csv"], history.to_csv(histories).encode())
    for name, info in model_info.model_infos(record).items():
        paths[f"model_info_{name}"] = f"report/model_info/{name}"
        run.write_json(paths[f"model_info_{name}"], info)
    html = page(record, data, plots, sentences.missing(record, gallery, histories, plots), run)
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


def page(
    record: RunRecord, data: Mapping[str, Any], plots: Mapping[str, Plot], missing: Sequence[str], run: Storage
) -> str:
    """Return the HTML page of a run, from its record and the result of :func:`table_data`."""
    files = ("table.csv", "table.md", "table.json", "history.csv", "../run.json", *(["plots/"] if plots else []))
    return render(
        "run.html.j2",
        title=record.name,
        links=links(run / "report", files, record.experiment.tracking_uri),
        verdict=headline.verdict(record, data["comparisons"]),
        headline_plot=plots.get(RunPlots.HEADLINE),
        record=record,
        table=data,
        groups=Counter(column["threat_title"] for column in data["columns"]),
        worst=pivots.worst_cases(data["worst_case"]),
        worst_seeds=pivots.worst_cases(data["worst_case_over_seeds"]),
        pairs=pivots.discordant(data["worst_case_pairs"]),
        active_tests=pivots.active_tests(record),
        minimal_norms=pivots.minimal_norms(data),
        norms_over_seeds=results.norms_over_seeds,
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
        folded=_folded(record, plots),
        plots={name: plot for name, plot in plots.items() if name != RunPlots.HEADLINE},
        config=json.dumps(to_dict(record.experiment), indent=2, sort_keys=True),
    )


def _folded(record: RunRecord, plots: Mapping[str, Plot]) -> list[str]:
    """Return the plots of examples but one: that of the first defended or given model, if there is one."""
    examples = [f"adversarial-{model}" for model in record.roles if f"adversarial-{model}" in plots]
    subjects = [f"adversarial-{model}" for model, role in record.roles.items() if role in ("defended", "given")]
    shown = next((name for name in subjects if name in examples), next(iter(examples), ""))
    return [name for name in examples if name != shown]
