"""The tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.threat_models import TRANSFER, split_threat_model
from pipeline.records import RunRecord
from pipeline.reporting import headline, labels, records, results, sentences, verdicts
from pipeline.reporting.cells import (
    attack_name,
    beside_title,
    cell,
    head,
    interval_text,
    our_value,
    row_head,
    worst_value,
)
from pipeline.reporting.records import Row
from pipeline.runtime.console import table_console
from pipeline.runtime.storage import Storage


def print_table(run: Storage, *, console: Console | None = None) -> None:
    """Print the tables of a run.

    Without a terminal, this is plain text of $COLUMNS or 100 columns.

    Raises:
        DataError: ``run.json`` is missing or corrupt.
    """
    print_record(records.read_run(run), console or table_console())


def print_record(record: RunRecord, console: Console) -> None:
    """Print a record's tables, its warnings and flags, and how to read them."""
    if not record.evaluations:
        models = ", ".join(record.models) or "none"
        console.print(f"{record.name}: no evaluations yet; models: {models}", markup=False, highlight=False)
        return
    together = results.across(record)
    # With several seeds, the rows of single models are only in the report.
    tables = [] if together["over_seeds"] else result_tables(record, console.width)
    folded = [] if together["over_seeds"] else transfer_matrices(record)
    for part in (*tables, *folded, *comparison_tables(record, together), *worst_case_tables(record)):
        console.print(part)
    if folded:
        console.print(Text("The report has each attack on each of these examples by itself.", style="dim"))
    for row in verdicts.near_chance(record):
        console.print(Text(row["sentence"], style="bold yellow"))
    for flag in verdicts.raised_flags(record):
        console.print(Text(" ".join(verdicts.flag_text(flag)), style="yellow"))
    for note in _notes(record):
        console.print(Text(note, style="dim"))
    # The last line is the one that a reader looks at first.
    if verdict := headline.verdict(record).headline:
        console.print(Text(f"{verdict}.", style="bold"))


def _notes(record: RunRecord) -> list[str]:
    trained = any(role != "given" for role in record.roles.values())
    sampling = "sampling of images only, not of seeds" if trained else "sampling of images"
    notes = [
        f"Accuracy in % of {labels.counted(record)}, below it the 95 % Wilson interval ({sampling}).",
        sentences.norms_note(record),
        *sentences.explanation(record),
        sentences.untrusted_note(record),
        sentences.reliability_in_short(record),
    ]
    if controls := [model for model in results.evaluated_models(record) if record.roles[model] == "control"]:
        notes.append(f"Controls here: {', '.join(controls)}.")
    return [note for note in notes if note]


def comparison_tables(record: RunRecord, together: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Return the tables of :func:`results.across`: over the seeds, and beside the paper's values."""
    tables = []
    if together["over_seeds"]:
        seeds = _table("accuracy in %: mean ± standard deviation over the seeds")
        for title in ("model", "threat model", "attack", "seeds", "accuracy", "median norm"):
            seeds.add_column(title, justify="right" if title in ("seeds", "accuracy", "median norm") else "left")
        for row in together["over_seeds"]:
            seeds.add_row(
                row["model"],
                row["threat_title"],
                attack_name(row),
                str(row["seeds"]),
                labels.mean_and_sd(row["accuracy_mean"], row["accuracy_sd"]) + labels.mark(row),
                results.norms_over_seeds(row),
            )
        tables.append(seeds)
    if rows := [row for row in together["paper"] if row["ours"]]:
        beside = _table(beside_title(record))
        for title in ("the paper's row", "attack", "paper", "ours, by threat model"):
            beside.add_column(title, justify="right" if title == "paper" else "left")
        for row in rows:
            made_on = f" on {row['made_on']}" if row["made_on"] else ""
            ours = "\n".join(our_value(row))
            beside.add_row(f"{row['title']} ({row['arch']})", f"{row['column']}{made_on}", row["paper"], ours)
        if lacking := len(together["paper"]) - len(rows):
            beside.caption = f"This run has no values for {lacking} more numbers of the paper."
        tables.append(beside)
    return tables


def worst_case_tables(record: RunRecord) -> list[Table]:
    """Return the table of worst cases per sample, a column per budget; [] if the run has none.

    With several seeds, the values are over the seeds.
    """
    rows = verdicts.worst_over_seeds(record) or verdicts.worst_cases(record)
    if not rows:
        return []
    table = _table("worst case per sample over all attacks, accuracy in %")
    table.title_justify = "left"
    table.add_column("model", no_wrap=True)
    heads = list(dict.fromkeys((w["budget"], w["threat_title"]) for w in rows))
    for budget, threat in heads:
        table.add_column(f"{budget}\n{threat}", justify="right")
    for model in dict.fromkeys(w["model"] for w in rows):
        cells = {(w["budget"], w["threat_title"]): w for w in rows if w["model"] == model}
        table.add_row(model, *("\n".join(worst_value(cells[h])) if h in cells else "-" for h in heads))
    return [table]


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)


def result_tables(record: RunRecord, width: int) -> list[Table]:
    """Return the result table in as few parts as fit into ``width``.

    A part holds several threat models only if each of them is whole. Transfers that
    :func:`transfer_matrices` folds are left out.
    """
    data = results.table(record)
    first = max(len("model"), *(len(line) for row in data["rows"] for line in row_head(row)))
    parts: list[list[Row]] = []
    groups: dict[str, list[Row]] = {}
    folded = _folded(data["columns"])
    for column in data["columns"]:
        if column in folded:
            continue
        groups.setdefault(column["threat_model"], []).append(column)

    def total_width(columns: Sequence[Row]) -> int:
        return first + 2 + sum(2 + _column_width(c, data["rows"]) for c in columns)

    for columns in groups.values():
        if parts and total_width([*parts[-1], *columns]) <= width:
            parts[-1].extend(columns)
            continue
        parts.append([])
        for column in columns:
            if parts[-1] and total_width([*parts[-1], column]) > width:
                parts.append([])
            parts[-1].append(column)
    return [_result_table(data["rows"], part) for part in parts]


def _folded(columns: Sequence[Row]) -> list[Row]:
    """Return the columns of all transfers if some of them name their source; otherwise none."""
    transfers = [column for column in columns if split_threat_model(column["threat_model"])[0] == TRANSFER]
    return transfers if any(column["threat_model"] != TRANSFER for column in transfers) else []


def transfer_matrices(record: RunRecord) -> list[Table]:
    """Return a table of transferred examples by model and source, where a run has several sources.

    A cell is the lowest accuracy over the attacks with a budget or, if there is none, over all.
    """
    data = results.table(record)
    folded = _folded(data["columns"])
    columns = [column for column in folded if not column["minimal_norm"]] or folded
    if not columns:
        return []
    cells: dict[tuple[str, str], list[tuple[Row, str]]] = {}
    for row in data["rows"]:
        for column in columns:
            if values := row["cells"].get(column["key"]):
                cells.setdefault((row["model"], values["source"]), []).append((values, column["attack_title"]))
    attacks = ", ".join(dict.fromkeys(column["attack_title"] for column in columns))
    table = _table(f"transferred examples, by the model that they were made on: lowest accuracy in % over {attacks}")
    table.title_justify = "left"
    table.add_column("model", no_wrap=True)
    sources = [source for source in record.roles if any(source == made_on for _, made_on in cells)]
    for source in sources:
        table.add_column(f"made on\n{source}", justify="right")
    for row in data["rows"]:
        texts = [_lowest(cells[at]) if (at := (row["model"], source)) in cells else "-" for source in sources]
        table.add_row(row["model"], *texts)
    return [table]


def _lowest(cells: Sequence[tuple[Row, str]]) -> str:
    values, attack = min(cells, key=lambda cell: cell[0]["accuracy"])
    interval = interval_text(values["accuracy_low"], values["accuracy_high"])
    return f"{labels.percent(values['accuracy'])}{labels.mark(values)} {attack}\n{interval}"


def _result_table(rows: Sequence[Row], columns: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column("\n".join(head(column)), justify="right", no_wrap=True)
    for row in rows:
        name, role = row_head(row)
        cells = ["\n".join(cell(column, row)) for column in columns]
        table.add_row(Text.assemble(name, "\n", (role, "dim")), *cells)
    return table


def _column_width(column: Row, rows: Sequence[Row]) -> int:
    return max(len(line) for lines in (head(column), *(cell(column, row) for row in rows)) for line in lines)
