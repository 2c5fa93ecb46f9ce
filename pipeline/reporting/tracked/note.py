"""The description of a run in MLflow: verdict, small table, links."""

from __future__ import annotations

from components.threat_models import WHITE_BOX
from pipeline.records import RunRecord
from pipeline.reporting import labels, markdown, sentences, verdicts
from pipeline.reporting.cells import interval_text, row_head, worst_value
from pipeline.reporting.results import table
from pipeline.reporting.tracked import metrics

MOST_ROWS = 12
"""Models in the table. MLflow hides the end of a long description."""


def note(record: RunRecord) -> str:
    """Return the description of a run that has evaluations, in Markdown.

    ``RUN_PAGE`` stands for the page of the run (:meth:`Tracker.note`).
    """
    links = {"Report": "report.html", "all numbers": "table.csv"}
    pages = (f"[{title}](RUN_PAGE/artifacts/report/{file})" for title, file in links.items())
    lines = [*_verdict(record), "", *_table(record), "", " · ".join(pages)]
    return "\n".join(lines)


def _verdict(record: RunRecord) -> list[str]:
    """Return what the run says on its main model, and whether its attacks can be trusted."""
    main = metrics.main_model(record)
    about = [name for name in record.first_replicates if record.bases[name] == main]
    in_short = sentences.in_short(record)
    warnings = [f"**{row['sentence']}**" for row in verdicts.near_chance(record)]
    own = [sentence for sentence in in_short if any(sentence.startswith(f"{name} (") for name in about)]
    return [*warnings, *own, *filter(None, [sentences.reliability_in_short(record)])]


def _table(record: RunRecord) -> list[str]:
    """Return clean and worst-case accuracy of the models, as means if there are several seeds."""
    worst = [
        row
        for row in verdicts.worst_over_seeds(record) or verdicts.worst_cases(record)
        if row["threat_model"] == WHITE_BOX
    ]
    budgets = list(dict.fromkeys(row["budget"] for row in worst))
    by_model = {(row["model"], row["budget"]): row for row in worst}
    replicated = record.experiment.seeds > 1
    rows = []
    for row in table(record)["rows"][:MOST_ROWS]:
        name = record.bases[row["model"]] if replicated else row["model"]
        clean = row["cells"].get("clean")
        cells = [f"{name} ({row_head(row)[1]})"]
        if not replicated:
            interval = clean and interval_text(clean["accuracy_low"], clean["accuracy_high"])
            cells.append(f"{labels.percent(clean['accuracy'])} ({interval})" if clean else "–")
        for budget in budgets:
            value, spread = worst_value(by_model[name, budget]) if (name, budget) in by_model else ("–", "")
            cells.append(f"{value} ({spread})" if spread else value)
        rows.append(cells)
    heads = ["model", *([] if replicated else ["clean"]), *(f"worst case, {budget}" for budget in budgets)]
    measured = "range over the seeds" if replicated else "95 % interval"
    return [
        f"Accuracy in % ({measured}), {labels.counted(record)}. The worst case is over all examples "
        "that were made on the model itself.",
        "",
        *markdown.markdown_table(heads, rows),
    ]
