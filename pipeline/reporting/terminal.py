"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.config.roles import roles_of
from pipeline.reporting import labels, records, results, sentences
from pipeline.reporting.cells import beside_title, cell, head, our_value, row_head, worst_value
from pipeline.reporting.records import Row, experiment_of
from pipeline.reporting.verdicts import near_chance, raised_flags, worst_cases, worst_over_seeds
from pipeline.runtime.storage import Storage

TERMINAL_WIDTH = 100
"""Where there is no terminal to ask."""


def print_table(run: Storage, *, console: Console | None = None) -> None:
    """The result table on the terminal; plain text of at most 100 columns where there is none.

    Raises:
        DataError: ``run.json`` is missing or corrupt.
    """
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=TERMINAL_WIDTH)
    record = records.read_run(run)
    if not record["evaluations"]:
        console.print(f"{record['name']}: no evaluations yet", markup=False, highlight=False)
        return
    together = results.across(record)
    # with several seeds the rows of single models are in the report
    if not together["over_seeds"]:
        for part in terminal_tables(record, console.width):
            console.print(part)
    for part in comparison_tables(record, together):
        console.print(part)
    if verdicts := verdict_table(record):
        console.print(verdicts)
    for row in near_chance(record):
        console.print(Text(row["sentence"], style="bold yellow"))
    for flag in raised_flags(record):
        said = f"{flag['model']}: {flag['name'].replace('_', ' ')}. {flag['measured']} {flag['remedy']}"
        console.print(Text(said, style="yellow"))
    role, trained = roles_of(experiment_of(record)), any(r != "given" for r in roles_of(experiment_of(record)).values())
    of = "sampling of images only, not of seeds" if trained else "sampling of images"
    notes = [
        f"Accuracy in % of {labels.counted(record)}, below it the 95 % Wilson interval ({of}).",
        *filter(None, [sentences.norms_note(record)]),
        *sentences.explanation(record),
        *filter(None, [sentences.untrusted_note(record), sentences.reliability_in_short(record)]),
    ]
    if controls := [m for m in results.evaluated(record) if role[m] == "control"]:
        notes.append(f"Controls here: {', '.join(controls)}.")
    for note in notes:
        console.print(Text(note, style="dim"))


def comparison_tables(record: Mapping[str, Any], together: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Mean and spread over the seeds, and our values beside the paper's, for the terminal."""
    out = []
    if together["over_seeds"]:
        seeds = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title="accuracy in %: mean ± standard deviation over the seeds"
        )
        for head in ("model", "threat model", "attack", "seeds", "accuracy", "median norm"):
            seeds.add_column(head, justify="right" if head in ("seeds", "accuracy", "median norm") else "left")
        for row in together["over_seeds"]:
            seeds.add_row(
                row["model"],
                row["threat_title"],
                "" if row["threat_model"] == "clean" else row["attack_title"],
                str(row["seeds"]),
                labels.mean_and_sd(row["accuracy_mean"], row["accuracy_sd"]) + labels.mark(row),
                results.norms_over_seeds(row),
            )
        out.append(seeds)
    if any(row["ours"] for row in together["paper"]):
        beside = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=beside_title(record))
        for head in ("the paper's row", "attack", "paper", "ours, by threat model"):
            beside.add_column(head, justify="right" if head == "paper" else "left")
        here = [row for row in together["paper"] if row["ours"]]
        for row in here:
            made_on = f" on {row['made_on']}" if row["made_on"] else ""
            ours = "\n".join(our_value(row))
            beside.add_row(f"{row['title']} ({row['arch']})", f"{row['column']}{made_on}", row["paper"], ours)
        if lacking := len(together["paper"]) - len(here):
            beside.caption = f"{lacking} more numbers of the paper have nothing of this run beside them."
        out.append(beside)
    return out


def verdict_table(record: Mapping[str, Any]) -> Table | None:
    """The worst case per sample for the terminal, over the seeds where there are several; a column per budget. None where there
    is none."""
    seeds = worst_over_seeds(record)
    rows = seeds or worst_cases(record)
    heads = list(dict.fromkeys((w["budget"], w["threat_title"]) for w in rows))
    if not rows:
        return None
    out = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="worst case per sample over all attacks, accuracy in %",
        title_justify="left",
    )
    out.add_column("model", no_wrap=True)
    for budget, threat in heads:
        out.add_column(f"{budget}\n{threat}", justify="right")
    for model in dict.fromkeys(w["model"] for w in rows):
        found = {(w["budget"], w["threat_title"]): w for w in rows if w["model"] == model}
        out.add_row(model, *("\n".join(worst_value(w)) if (w := found.get(h)) else "-" for h in heads))
    return out


def terminal_tables(record: Mapping[str, Any], width: int) -> list[Table]:
    """The table in as few parts as fit into ``width``, none across two threat models unless both fit whole."""
    data = results.table(record)
    first = max(len("model"), *(len(line) for row in data["rows"] for line in row_head(row)))
    parts: list[list[Row]] = []
    groups: dict[str, list[Row]] = {}
    for column in data["columns"]:
        groups.setdefault(column["threat_model"], []).append(column)

    def needed(columns: Sequence[Row]) -> int:
        return first + 2 + sum(2 + _column_width(c, data["rows"]) for c in columns)

    for columns in groups.values():
        if parts and needed([*parts[-1], *columns]) <= width:
            parts[-1].extend(columns)
            continue
        parts.append([])
        for column in columns:
            if parts[-1] and needed([*parts[-1], column]) > width:
                parts.append([])
            parts[-1].append(column)
    return [_terminal_table(data["rows"], part) for part in parts]


def _terminal_table(rows: Sequence[Row], columns: Sequence[Row]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    out.add_column("model", no_wrap=True)
    for column in columns:
        out.add_column("\n".join(head(column)), justify="right", no_wrap=True)
    for row in rows:
        name, role = row_head(row)
        cells = ["\n".join(cell(column, row)) for column in columns]
        out.add_row(Text.assemble(name, "\n", (role, "dim")), *cells)
    return out


def _column_width(column: Row, rows: Sequence[Row]) -> int:
    return max(len(line) for lines in (head(column), *(cell(column, row) for row in rows)) for line in lines)
