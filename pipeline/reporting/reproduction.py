"""Page that sets every number of the paper beside ours, from the records of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.config import PRINTED_IN, roles
from components.threat_models import CLEAN, GREY_BOX, TRANSFER, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord
from pipeline.reporting import labels, over_seeds, paper
from pipeline.reporting.cells import interval_text
from pipeline.reporting.markdown import made_with, markdown_table
from pipeline.reporting.records import Row

_HEAD = ("the paper's row", "network", "attack", "paper", "ours", "control", "n x seeds", "verdict")
_INTRODUCTION = """\
# Reproduction of the paper's numbers, cell by cell

What did this project measure for each number that the paper prints?

This page is made from the records of the runs:

```sh
{command}
```

- **ours, control.** Accuracy in %, mean ± standard deviation over the seeds, by threat model. In
  brackets stands the range: from the lowest to the highest bound of the seeds' 95 % Wilson
  intervals over the images. The control is an undefended network of another seed, under the same
  attack and threat model. Whatever it has too is not due to a defense.
- **n x seeds.** Test images of each seed, and the number of seeds.
- **verdict.** First, the threat model whose range contains the paper's number. A wide range
  contains almost anything: "in range" says that the number is not excluded. Then, for each threat
  model, our value against the control's: "more" or "less" if the difference exceeds the noise of
  the seeds (95 % interval of Student's t over the paired differences), "not told apart" otherwise.
  There is no correction for the number of cells. Two seeds hardly ever tell anything apart.
- † stands behind a number of an attack that failed its active test ([reliability](reliability.md)).

The settings are smaller than the paper's: the scale says how much, and each table names its run.
"""


def page(records: Mapping[str, RunRecord], command: str) -> str:
    """Return the page as Markdown.

    Args:
        records: name of a run, such as its directory -> its record. Those that belong to no table of
            the paper are left out.
        command: the command that makes the page.
    """
    sections = [_INTRODUCTION.format(command=command), *_summary(records)]
    for where in PRINTED_IN:
        sections += ["", f"## {_title(where)}"]
        own = {name: record for name, record in records.items() if record.experiment.paper == where}
        # The text repeats numbers of the tables. Each is answered by the first run that has it.
        in_text = not where.startswith("table")
        answered: set[tuple[str, ...]] = set()
        for name, record in {**own, **(records if in_text else {})}.items():
            rows = [row for row in cells(record, where) if not (in_text and _place(row) in answered)]
            answered |= {_place(row) for row in rows}
            if rows:
                sections += _table(name, record, rows)
        count = len(paper.printed_values(where))
        if len(answered) < count:
            sections += ["", f"No run has a value for {count - len(answered)} of the {count} numbers."]
    return "\n".join(sections).rstrip() + "\n"


def _place(row: Row) -> tuple[str, ...]:
    """Return the place of a number within its table or section of the paper."""
    return tuple(row[key] for key in ("dataset", "row", "column", "arch", "made_on"))


def cells(record: RunRecord, where: str = "") -> list[Row]:
    """Return each number of the paper's table, with ours, the control's and the verdict.

    Args:
        where: another place of the paper than the run's own.

    Returns:
        The rows of :func:`pipeline.reporting.paper.beside_paper` that have values. Each of ``ours``
        has ``control`` (mean and spread of the control; of a grey box, under transfer; None without
        one), ``against`` ("more", "less", "not told apart", or "" without a control or with one
        seed) and ``contains`` (whether its interval contains the paper's number).
    """
    controls, groups = roles.control_of(record.experiment), over_seeds.by_seed(record)
    rows = []
    for row in paper.beside_paper(record, where):
        for ours in row["ours"]:
            model, threat, attack = (ours[key] for key in ("model", "threat_model", "attack"))
            replicates = groups[model, threat, attack]
            control = groups.get((controls.get(model, ""), TRANSFER if threat == GREY_BOX else threat, attack), {})
            ours["control"] = over_seeds.accuracy_spread(list(control.values())) if control else None
            ours["against"] = _against(replicates, control)
            ours["contains"] = ours["low"] <= float(row["paper"].removeprefix("+")) / 100 <= ours["high"]
            ours["untrusted"] = any(labels.is_untrusted(record, e) for e in replicates.values())
        if row["ours"]:
            rows.append(row)
    return rows


def _against(ours: Mapping[int, EvaluationEntry], control: Mapping[int, EvaluationEntry]) -> str:
    """Return whether ours is more or less accurate than the control, by replicate; "" for one seed."""
    a, b = ({replicate: e.accuracy for replicate, e in entries.items()} for entries in (ours, control))
    difference = over_seeds.paired_difference(a, b)
    if not difference:
        return ""
    if not difference["resolved"]:
        return "not told apart"
    return "more" if difference["difference"] > 0 else "less"


def verdict(row: Row) -> str:
    """Return the verdict on one of :func:`cells` in words."""
    if row["column"] == "clean":
        [ours, *_] = row["ours"]
        return "in range" if ours["contains"] else f"{100 * ours['mean'] - float(row['paper']):+.1f} points"
    inside = [labels.threat_title(ours["threat_model"]) for ours in row["ours"] if ours["contains"]]
    where = f"in range: {', '.join(inside)}" if inside else "out of range"
    compared = [f"{labels.threat_title(o['threat_model'])} {o['against']}" for o in row["ours"] if o["against"]]
    return "; ".join(filter(None, [where, f"against the control: {', '.join(compared)}" if compared else ""]))


def _table(name: str, record: RunRecord, printed: Sequence[Row]) -> list[str]:
    experiment = record.experiment
    lines = ["", f"**{name}**, scale {experiment.scale or 'of its own'}. {_training(record)}", ""]
    rows = []
    for row in printed:
        attack = row["column"] + (f" made on {row['made_on']}" if row["made_on"] else "")
        ours = [f"{_prefix(value)}{_value(value)}" for value in row["ours"]]
        control = [_value(value["control"]) if value["control"] else "–" for value in row["ours"]]
        sizes = dict.fromkeys(f"{value['n']:,} x {value['seeds']}" for value in row["ours"])
        rows.append(
            (
                row["title"],
                row["arch"],
                attack,
                row["paper"],
                "<br>".join(ours),
                "<br>".join(control),
                ", ".join(sizes),
                verdict(row),
            )
        )
    return [*lines, *markdown_table(_HEAD, rows)]


def _training(record: RunRecord) -> str:
    """Return data, network and length of the training, and what computed it."""
    train, data = record.experiment.train, record.experiment.data
    images = record.data.get("rows", {}).get("train", 0)
    made = made_with(record)
    rebuilt = f" The record was rebuilt from {record.rebuilt_from}." if record.rebuilt_from else ""
    return (
        f"{images:,} training images at {data.image_size}x{data.image_size}, width {train.width}, {train.epochs} "
        f"epochs unless a model says otherwise. {made.get('Hardware', 'Unknown machine')}. Revision "
        f"{made.get('Source', 'unknown')}.{rebuilt}"
    )


def _prefix(value: Row) -> str:
    threat = value["threat_model"]
    return "" if threat == CLEAN else f"{labels.threat_title(threat)} "


def _value(value: Row) -> str:
    spread = labels.mean_and_sd(value["mean"], value["sd"])
    return f"{spread}{labels.mark(value)} ({interval_text(value['low'], value['high'])})"


def _summary(records: Mapping[str, RunRecord]) -> list[str]:
    """Return how often each verdict was reached on models that are not the source of the examples."""
    rows = []
    for name, record in records.items():
        if not record.experiment.paper:
            continue
        attacked = [row for row in cells(record) if row["column"] != "clean" and row["row"] != "no_defense"]
        values = [value for row in attacked for value in row["ours"]]
        inside = [row for row in attacked if any(value["contains"] for value in row["ours"])]
        white = [row for row in inside if any(v["contains"] and v["threat_model"] == WHITE_BOX for v in row["ours"])]
        against = [value["against"] for value in values if value["against"]]
        in_range = (len(attacked), len(white), len(inside) - len(white), len(attacked) - len(inside))
        compared = (len(against), against.count("more"), against.count("less"))
        rows.append((_title(record.experiment.paper), name, *map(str, in_range), *map(str, compared)))
    if not rows:
        return []
    head = (
        *(
            "table",
            "run",
            "cells of defenses under attack",
            "in range, white-box",
            "in range, another threat model only",
        ),
        *("out of range", "comparisons with the control", "more", "less"),
    )
    return ["## In numbers", "", *markdown_table(head, rows)]


def _title(where: str) -> str:
    return f"Table {where.removeprefix('table')}" if where.startswith("table") else f"Section {where[3:]}"
