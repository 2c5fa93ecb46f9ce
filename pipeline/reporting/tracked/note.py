"""The description of a run in MLflow: verdict, links, small table."""

from __future__ import annotations

from components.threat_models import WHITE_BOX
from pipeline.records import RunRecord
from pipeline.reporting import headline, labels, markdown, sentences, verdicts
from pipeline.reporting.cells import interval_text, row_head, worst_value
from pipeline.reporting.records import Row
from pipeline.reporting.results import table
from pipeline.reporting.tracked import metrics

MOST_ROWS = 12
"""Models in the table."""


def note(record: RunRecord) -> str:
    """Return the description of a run that has evaluations, in Markdown.

    MLflow folds all but the first lines, so verdict and links come first.
    """
    links = {"Report": "report.html", "all numbers": "table.csv"}
    pages = (f"[{title}](artifact:report/{file})" for title, file in links.items())
    near_chance = ", ".join(row["model"] for row in verdicts.near_chance(record))
    warning = f"**Clean accuracy near chance: {near_chance}. Robust accuracies of such models mean nothing.**"
    rows = {row["model"]: row for row in table(record)["rows"]}
    main = [name for name in record.first_replicates if record.bases[name] == metrics.main_model(record)]
    controls = [name for name in record.first_replicates if record.roles[name] == "control"]
    numbers = " ".join(_sentence(record, rows[name]) for name in dict.fromkeys([*main, *controls]) if name in rows)
    verdict = headline.verdict(record).headline
    return "\n\n".join(
        [
            *([warning] if near_chance else []),
            f"**{verdict}.** {numbers}" if verdict else numbers,
            " · ".join(pages),
            "\n".join(_table(record, list(rows.values()))),
            *filter(None, [sentences.reliability_in_short(record)]),
        ]
    )


def _sentence(record: RunRecord, row: Row) -> str:
    """Return the accuracies of a model on clean images and in the worst cases."""
    clean = row["cells"].get("clean")
    worst = [w for w in _worst_cases(record) if w["model"] == _name(record, row)]
    in_worst_case = ", ".join(f"{worst_value(w)[0]} % at {w['budget']}" for w in worst)
    values = [f"{labels.percent(clean['accuracy'])} % clean"] if clean else []
    values += [f"worst case {in_worst_case}"] if worst else []
    return f"{_title(record, row)}: {'; '.join(values)}."


def _worst_cases(record: RunRecord) -> list[Row]:
    """Return the worst cases over examples made on each model, over the seeds if there are several."""
    rows = verdicts.worst_over_seeds(record) or verdicts.worst_cases(record)
    return [row for row in rows if row["threat_model"] == WHITE_BOX]


def _name(record: RunRecord, row: Row) -> str:
    """Return the name under which the worst cases have the model of a row."""
    name: str = row["model"]
    return record.bases[name] if record.experiment.seeds > 1 else name


def _title(record: RunRecord, row: Row) -> str:
    """Return the model of a row with its role, unless that is its name."""
    name, role = _name(record, row), row_head(row)[1]
    return name if name == role else f"{name} ({role})"


def _table(record: RunRecord, models: list[Row]) -> list[str]:
    """Return clean and worst-case accuracy of the models. Clean is that of the first seed."""
    worst = _worst_cases(record)
    budgets = list(dict.fromkeys(row["budget"] for row in worst))
    by_model = {(row["model"], row["budget"]): row for row in worst}
    first = [row for row in models if row["model"] in record.first_replicates][:MOST_ROWS]
    rows = []
    for row in first:
        clean = row["cells"].get("clean")
        cells = [_title(record, row)]
        if clean:
            interval = interval_text(clean["accuracy_low"], clean["accuracy_high"])
            cells.append(f"{labels.percent(clean['accuracy'])} ({interval})")
        else:
            cells.append("–")
        for budget in budgets:
            found = by_model.get((_name(record, row), budget))
            cells.append("{} ({})".format(*worst_value(found)) if found else "–")
        rows.append(cells)
    replicated = record.experiment.seeds > 1
    seeds = ", and in the worst case the range over the seeds" if replicated else ""
    heads = [f"worst case, {budget}" for budget in budgets]
    return [
        *markdown.markdown_table(["model", "clean, first seed" if replicated else "clean", *heads], rows),
        "",
        f"Accuracy in % (95 % interval{seeds}), {labels.counted(record)}. The worst case of an image is over all "
        "attacks within the budget, with examples made on the model itself.",
    ]
