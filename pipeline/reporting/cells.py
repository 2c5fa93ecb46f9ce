"""Cells and heads that the terminal's and Markdown's tables share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.reporting import labels
from pipeline.reporting.records import Row


def beside_title(record: Mapping[str, Any]) -> str:
    """What stands beside the paper's numbers: which table, at what scale, and what the brackets hold."""
    experiment = record["experiment"]
    scale = f", scale {experiment['scale']}" if experiment.get("scale") else ""
    over = ": least to greatest bound over the seeds" if experiment["seeds"] > 1 else ""
    return f"Beside the paper's {experiment['paper']}{scale}: accuracy in % (95 % interval{over}; n)"


def our_value(row: Row) -> list[str]:
    """What a run has for one cell of the paper: value, interval and n by threat model; the network where it is another."""
    said = []
    for o in row["ours"]:
        network = f", {o['arch']}" if o["arch"] != row["arch"] else ""
        value = f"{o['threat_title']} {labels.mean_and_sd(o['mean'], o['sd'])}{labels.mark(o)}"
        said.append(f"{value} ({interval_text(o['low'], o['high'])}; {o['n']:,}{network})")
    return said


def worst_value(row: Row) -> tuple[str, str]:
    """A worst case, and its interval or, over the seeds, its range."""
    if "mean" in row:
        value = labels.mean_and_sd(row["mean"], row["sd"])
        return value + labels.mark(row), range_text(row["seeds"], row["min"], row["max"], "–")
    value = labels.percent(row["accuracy"])
    return value + labels.mark(row), interval_text(row["accuracy_low"], row["accuracy_high"])


def range_text(seeds: int, least: float, greatest: float, to: str) -> str:
    """Return the range over the seeds. One seed has none: it would look like an interval without width."""
    return f"{labels.percent(least)}{to}{labels.percent(greatest)}" if seeds > 1 else "one seed"


def row_head(row: Row) -> tuple[str, str]:
    return row["model"], {"source": "undefended"}.get(row["role"], row["role"])


def head(column: Row) -> list[str]:
    if column["threat_model"] == "clean":
        return ["clean"]
    settings = [s for s in column["settings"].split(", ") if s]
    if column["threat_model"] == "random":
        return ["control:", "random noise", *settings]
    return [column["threat_title"], column["attack_title"], *settings]


def cell(column: Row, row: Row) -> list[str]:
    cell = row["cells"].get(column["key"])
    if cell is None:
        return ["(source)" if row["role"] == "source" and column["threat_model"] == "transfer" else "-"]
    interval = interval_text(cell["accuracy_low"], cell["accuracy_high"])
    lines = [labels.percent(cell["accuracy"]) + labels.mark(cell), interval]
    if column["minimal_norm"]:
        lines += filter(None, [labels.median_norm(cell)])
    return lines


def interval_text(low: float, high: float) -> str:
    """Both ends: near 0 and 100 % half the width would say too little on one side and too much on the other."""
    return f"{labels.percent(low)}–{labels.percent(high)}"
