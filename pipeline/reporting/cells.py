"""Cells and heads that the tables on the terminal and in Markdown share."""

from __future__ import annotations

from components.threat_models import CLEAN, RANDOM, TRANSFER
from pipeline.records import RunRecord
from pipeline.reporting import labels
from pipeline.reporting.records import Row


def beside_title(record: RunRecord) -> str:
    """Return the title of our values beside the paper's: table, scale, and what the brackets hold."""
    experiment = record.experiment
    scale = f", scale {experiment.scale}" if experiment.scale else ""
    over = ": lowest to highest bound over the seeds" if experiment.seeds > 1 else ""
    return f"Beside the paper's {experiment.paper}{scale}: accuracy in % (95 % interval{over}; n)"


def our_value(row: Row) -> list[str]:
    """Return our values for one cell of the paper, by threat model: accuracy, interval and n.

    The network is named if it differs from the paper's.
    """
    values = []
    for ours in row["ours"]:
        network = f", {ours['arch']}" if ours["arch"] != row["arch"] else ""
        value = f"{ours['threat_title']} {labels.mean_and_sd(ours['mean'], ours['sd'])}{labels.mark(ours)}"
        values.append(f"{value} ({interval_text(ours['low'], ours['high'])}; {ours['n']:,}{network})")
    return values


def worst_value(row: Row) -> tuple[str, str]:
    """Return a worst case and its interval or, over the seeds, its range."""
    if "mean" in row:
        value = labels.mean_and_sd(row["mean"], row["sd"])
        return value + labels.mark(row), range_text(row["seeds"], row["min"], row["max"], "–")
    value = labels.percent(row["accuracy"])
    return value + labels.mark(row), interval_text(row["accuracy_low"], row["accuracy_high"])


def attack_name(row: Row) -> str:
    """Return the attack of a row; "" for clean images."""
    return "" if row["threat_model"] == CLEAN else str(row["attack_title"])


def range_text(seeds: int, least: float, greatest: float, to: str) -> str:
    """Return the range over the seeds. One seed has none: it would look like an empty interval."""
    return f"{labels.percent(least)}{to}{labels.percent(greatest)}" if seeds > 1 else "one seed"


def row_head(row: Row) -> tuple[str, str]:
    """Return the model of a row, and its role."""
    role: str = row["role"]
    return row["model"], {"source": "undefended", "given": "external"}.get(role, role)


def head(column: Row) -> list[str]:
    """Return the lines of a column's head."""
    if column["threat_model"] == CLEAN:
        return ["clean"]
    settings = [s for s in column["settings"].split(", ") if s]
    if column["threat_model"] == RANDOM:
        return ["control:", "random noise", *settings]
    return [column["threat_title"], column["attack_title"], *settings]


def cell(column: Row, row: Row) -> list[str]:
    """Return the lines of a cell: accuracy, interval, and the median norm if there is one."""
    values = row["cells"].get(column["key"])
    if values is None:
        return ["(source)" if row["role"] == "source" and column["threat_model"] == TRANSFER else "-"]
    interval = interval_text(values["accuracy_low"], values["accuracy_high"])
    lines = [labels.percent(values["accuracy"]) + labels.mark(values), interval]
    return [*lines, *filter(None, [labels.median_norm(values) if column["minimal_norm"] else ""])]


def interval_text(low: float, high: float) -> str:
    """Return both ends of an interval, because near 0 and 100 % it is not symmetric."""
    return f"{labels.percent(low)}–{labels.percent(high)}"
