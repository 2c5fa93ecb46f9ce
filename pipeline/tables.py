"""The tables of a run for people: on a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import comparison, records
from pipeline.records import Row
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
    together = records.across(record)
    # with several seeds the rows of single models are in the report
    if not together["over_seeds"]:
        for part in terminal_tables(record, console.width):
            console.print(part)
    for part in comparison_tables(record, together):
        console.print(part)
    if verdicts := verdict_table(record):
        console.print(verdicts)
    for row in records.near_chance(record):
        console.print(Text(row["sentence"], style="bold yellow"))
    for flag in records.raised_flags(record):
        said = f"{flag['model']}: {flag['name'].replace('_', ' ')}. {flag['measured']} {flag['remedy']}"
        console.print(Text(said, style="yellow"))
    role, trained = records.roles(record), any(r != "given" for r in records.roles(record).values())
    of = "sampling of images only, not of seeds" if trained else "sampling of images"
    notes = [
        f"Accuracy in % of {records.counted(record)}, below it the 95 % Wilson interval ({of}).",
        *filter(None, [records.norms_note(record)]),
        *records.explanation(record),
        *filter(None, [records.untrusted_note(record), records.reliability_in_short(record)]),
    ]
    if controls := [m for m in records.evaluated(record) if role[m] == "control"]:
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
                records.mean_and_sd(row["accuracy_mean"], row["accuracy_sd"]) + records.mark(row),
                records.norms_over_seeds(row),
            )
        out.append(seeds)
    if any(row["ours"] for row in together["paper"]):
        beside = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=_beside_title(record))
        for head in ("the paper's row", "attack", "paper", "ours, by threat model"):
            beside.add_column(head, justify="right" if head == "paper" else "left")
        here = [row for row in together["paper"] if row["ours"]]
        for row in here:
            made_on = f" on {row['made_on']}" if row["made_on"] else ""
            ours = "\n".join(_ours(row))
            beside.add_row(f"{row['title']} ({row['arch']})", f"{row['column']}{made_on}", row["paper"], ours)
        if lacking := len(together["paper"]) - len(here):
            beside.caption = f"{lacking} more numbers of the paper have nothing of this run beside them."
        out.append(beside)
    return out


def _beside_title(record: Mapping[str, Any]) -> str:
    """What stands beside the paper's numbers: which table, at what scale, and what the brackets hold."""
    experiment = record["experiment"]
    scale = f", scale {experiment['scale']}" if experiment.get("scale") else ""
    over = ": least to greatest bound over the seeds" if experiment["seeds"] > 1 else ""
    return f"Beside the paper's {experiment['paper']}{scale}: accuracy in % (95 % interval{over}; n)"


def _ours(row: Row) -> list[str]:
    """What a run has for one cell of the paper: value, interval and n by threat model; the network where it is another."""
    said = []
    for o in row["ours"]:
        network = f", {o['arch']}" if o["arch"] != row["arch"] else ""
        value = f"{o['threat_title']} {records.mean_and_sd(o['mean'], o['sd'])}{records.mark(o)}"
        said.append(f"{value} ({_interval(o['low'], o['high'])}; {o['n']:,}{network})")
    return said


def verdict_table(record: Mapping[str, Any]) -> Table | None:
    """The worst case per sample for the terminal, over the seeds where there are several; a column per budget. None where there
    is none."""
    seeds = records.worst_over_seeds(record)
    rows = seeds or records.worst_cases(record)
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
        out.add_row(model, *("\n".join(_worst(w)) if (w := found.get(h)) else "-" for h in heads))
    return out


def _worst(row: Row) -> tuple[str, str]:
    """A worst case, and its interval or, over the seeds, its range."""
    if "mean" in row:
        value = records.mean_and_sd(row["mean"], row["sd"])
        return value + records.mark(row), _range(row["seeds"], row["min"], row["max"], "–")
    value = records.percent(row["accuracy"])
    return value + records.mark(row), _interval(row["accuracy_low"], row["accuracy_high"])


def _range(seeds: int, least: float, greatest: float, to: str) -> str:
    """Return the range over the seeds. One seed has none: it would look like an interval without width."""
    return f"{records.percent(least)}{to}{records.percent(greatest)}" if seeds > 1 else "one seed"


def terminal_tables(record: Mapping[str, Any], width: int) -> list[Table]:
    """The table in as few parts as fit into ``width``, none across two threat models unless both fit whole."""
    data = records.table(record)
    first = max(len("model"), *(len(line) for row in data["rows"] for line in _row_head(row)))
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
        name, role = _row_head(row)
        cells = ["\n".join(_cell(column, row)) for column in columns]
        out.add_row(Text.assemble(name, "\n", (role, "dim")), *cells)
    return out


def _row_head(row: Row) -> tuple[str, str]:
    return row["model"], {"source": "undefended"}.get(row["role"], row["role"])


def head(column: Row) -> list[str]:
    if column["threat_model"] == "clean":
        return ["clean"]
    settings = [s for s in column["settings"].split(", ") if s]
    if column["threat_model"] == "random":
        return ["control:", "random noise", *settings]
    return [column["threat_title"], column["attack_title"], *settings]


def _cell(column: Row, row: Row) -> list[str]:
    cell = row["cells"].get(column["key"])
    if cell is None:
        return ["(source)" if row["role"] == "source" and column["threat_model"] == "transfer" else "-"]
    interval = _interval(cell["accuracy_low"], cell["accuracy_high"])
    lines = [records.percent(cell["accuracy"]) + records.mark(cell), interval]
    if column["minimal_norm"]:
        lines += filter(None, [records.median_norm(cell)])
    return lines


def _interval(low: float, high: float) -> str:
    """Both ends: near 0 and 100 % half the width would say too little on one side and too much on the other."""
    return f"{records.percent(low)}–{records.percent(high)}"


def _column_width(column: Row, rows: Sequence[Row]) -> int:
    return max(len(line) for lines in (head(column), *(_cell(column, row) for row in rows)) for line in lines)


def markdown(record: Mapping[str, Any]) -> str:
    """Description and table for places that show Markdown, such as MLflow's page of a run."""
    data = records.table(record)
    lines = [record["experiment"].get("description", ""), ""]
    lines += [f"**{row['sentence']}**\n" for row in records.near_chance(record)]
    heads = [
        " ".join(
            filter(None, (c["threat_title"], c["attack_title"] if c["threat_model"] != "clean" else "", c["settings"]))
        )
        for c in data["columns"]
    ]
    lines += markdown_table(
        ["model", *heads],
        [
            [f"{row['model']} ({_row_head(row)[1]})", *(_in_one_line(_cell(c, row)) for c in data["columns"])]
            for row in data["rows"]
        ],
    )
    lines += [
        "",
        f"Accuracy in % (95 % Wilson interval), {records.counted(record)}.",
        "",
        *(f"{note}\n" for note in filter(None, [records.norms_note(record), records.untrusted_note(record)])),
        *records.explanation(record),
    ]
    together = _markdown_across(record)
    return "\n".join([*lines, *_markdown_verdict(record), *together, *_markdown_models(record)]).strip()


def _markdown_models(record: Mapping[str, Any]) -> list[str]:
    """What was trained, and what all of it was made with, as Markdown: a table out of its run must still say so."""
    lines: list[str] = []
    if record["models"]:
        heads = ("model", "validation accuracy", "reconstruction error (validation)", "training seconds", "images/s")
        rows = []
        for name, m in record["models"].items():
            error, seconds, speed = (m.get(k) for k in ("reconstruction_validation", "seconds", "images_per_second"))
            cells = (
                name,
                "–" if m.get("clean_validation") is None else records.percent(m["clean_validation"]),
                "–" if error is None else f"{error:.3g}",
                f"{seconds:.0f}" if seconds else "–",  # 0: not trained here
                f"{speed:.0f}" if speed else "–",
            )
            rows.append(cells)
        lines += ["", "### Models", "", *markdown_table(heads, rows)]
        if any(m.get("reconstruction_validation") is not None for m in record["models"].values()):
            lines += ["", "Reconstruction error: mean squared error per pixel of the whole image, in (0..1)²."]
    return [*lines, *markdown_made_with(record)]


def markdown_made_with(record: Mapping[str, Any]) -> list[str]:
    """:func:`made_with` as a section in Markdown; the command as code."""
    said = {what: f"`{text}`" if what == "Command" else text for what, text in made_with(record).items()}
    return ["", "### Made with", "", *(f"- {what}: {text}" for what, text in said.items())]


def made_with(record: Mapping[str, Any]) -> dict[str, str]:
    """Command, revision, hardware, versions and seconds of run.json or sweep.json; what is not known is left out."""
    machine = record["hardware"]
    stages = records.stage_times(record) if "models" in record else record["stages"]  # sweep.json holds no models
    gpus = ", ".join(machine.get("gpus") or []) or "no GPU"
    made = {
        "Command": record["command"],
        "Source": source(record),
        "Finished": records.when(record["finished"]),
        "Hardware": f"{machine['cpu']}, {machine['cpus']} CPUs, {gpus}" if machine else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items())),
        "Seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items()),
    }
    return {what: text for what, text in made.items() if text}


def source(record: Mapping[str, Any]) -> str:
    """Name the code that made run.json or sweep.json: its revision and its source hash, as far as they are known."""
    revision = record["git"].get("revision") or ""
    if revision and record["git"].get("dirty"):
        revision += " with uncommitted changes"
    source_hash = f"source hash {record['source']}" if record.get("source") else ""
    return ", ".join(part for part in (revision, source_hash) if part)


def _markdown_verdict(record: Mapping[str, Any]) -> list[str]:
    """Worst cases and flags as Markdown."""
    lines = []
    seeds = records.worst_over_seeds(record)
    if rows := seeds or records.worst_cases(record):
        what = "mean ± standard deviation over the seeds" if seeds else "accuracy"
        heads = ("model", "budget", "examples", what, "least to greatest" if seeds else "95 % interval")
        lines += ["", "### Worst case per sample over all attacks, accuracy in %", ""]
        lines += markdown_table(heads, [(w["model"], w["budget"], w["threat_title"], *_worst(w)) for w in rows])
    # with several seeds what counts is whether a difference exceeds theirs
    if (paired := records.worst_case_pairs(record)) and not seeds:
        heads = ("model", "against", "budget", "examples", "only model", "only the other", "n", "p (McNemar)")
        lines += ["", "### Worst case in pairs: images that one model withstands and the other does not", ""]
        lines += markdown_table(
            heads,
            [
                (
                    w["model"],
                    w["against"],
                    w["budget"],
                    w["threat_title"],
                    *(str(w[k]) for k in ("only_model", "only_against", "n")),
                    records.p_value(w["p"]),
                )
                for w in paired
            ],
        )
    if said := records.reliability_in_short(record):
        lines += ["", said]
        lines += [
            f"- **{f['model']}: {f['name'].replace('_', ' ')}.** {f['measured']} {f['remedy']}"
            for f in records.raised_flags(record)
        ]
    return lines


def _markdown_across(record: Mapping[str, Any]) -> list[str]:
    """What several evaluations say together, as Markdown tables; none where there is nothing to say."""
    together = records.across(record)
    lines: list[str] = []

    def add(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines.extend(["", f"### {title}", "", *markdown_table(heads, rows)])

    def attack(row: Row) -> str:
        return "" if row["threat_model"] == "clean" else row["attack_title"]

    if seeds := together["over_seeds"]:
        add(
            "Over the seeds: accuracy in %, mean ± standard deviation",
            ("model", "threat model", "attack", "seeds", "accuracy", "least to greatest"),
            [
                (
                    r["model"],
                    r["threat_title"],
                    attack(r),
                    str(r["seeds"]),
                    records.mean_and_sd(r["accuracy_mean"], r["accuracy_sd"]) + records.mark(r),
                    _range(r["seeds"], r["accuracy_min"], r["accuracy_max"], " to "),
                )
                for r in seeds
            ],
        )
    if resolved := [d for d in together["differences"] if d["resolved"]]:
        add(
            f"Differences that exceed the seeds' noise ({len(resolved)} of {len(together['differences'])}; 95 %, paired by seed, "
            "not corrected for their number)",
            ("model", "against", "threat model", "attack", "points"),
            [
                (
                    d["model"],
                    d["reference"],
                    d["threat_title"],
                    attack(d),
                    f"{100 * d['difference']:+.1f}{records.mark(d)} ± {100 * d['half_width']:.1f}",
                )
                for d in resolved
            ],
        )
    printed = together["paper"]
    if any(row["ours"] for row in printed):
        add(
            _beside_title(record),
            ("the paper's row", "network", "attack", "paper", "ours, by threat model"),
            [
                (
                    r["title"],
                    r["arch"],
                    r["column"] + (f" made on {r['made_on']}" if r["made_on"] else ""),
                    r["paper"],
                    "; ".join(_ours(r)) or "-",
                )
                for r in printed
            ],
        )
    return lines


def _in_one_line(cell: Sequence[str]) -> str:
    """Accuracy, its interval in brackets, and what else a cell says."""
    first, *rest = cell
    return ", ".join([f"{first} ({rest[0]})", *rest[1:]]) if rest else first


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return [head, "| --- " * len(heads) + "|", *body]


def to_csv(record: Mapping[str, Any]) -> str:
    """One line per evaluation, accuracies as fractions."""
    names = ["accuracy", "accuracy_low", "accuracy_high", "accuracy_rounded", "clean_accuracy", "success_rate"]
    names += [f"{norm}_{q}" for norm in ("l2", "linf") for q in ("median", "q25", "q75")] + ["seconds"]
    role = records.roles(record)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "role", "threat_model", "attack", "source", "n", *names, "broken", "untrusted"])
    for e in record["evaluations"]:
        metrics = comparison.shown_metrics(e)
        values = [*(metrics.get(name) for name in (*names, "broken")), int(records.is_untrusted(record, e))]
        writer.writerow(
            [e["model"], role.get(e["model"], ""), e["threat_model"], e["attack"], e.get("source"), e["n"], *values]
        )
    return out.getvalue()
