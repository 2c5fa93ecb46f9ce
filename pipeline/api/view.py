"""Display of results: plain text for terminals, a compact page for notebooks."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from components.threat_models import ANY, CLEAN
from pipeline.records import RunRecord
from pipeline.reporting import labels, results, sentences, terminal, verdicts
from pipeline.reporting.html.templates import environment

TEXT_WIDTH = 100
CURVE_WIDTH, CURVE_HEIGHT = 300, 120
"""Size of the drawn curves, in pixels."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#6b7280")


def text(record: RunRecord, remarks: Sequence[str] = ()) -> str:
    """Return the tables of the terminal as plain text, then the remarks."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=TEXT_WIDTH, highlight=False, soft_wrap=False)
    terminal.print_record(record, console)
    for line in remarks:
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def html(record: RunRecord, remarks: Sequence[str] = ()) -> str:
    """Return a record as HTML for a notebook: worst cases, all attacks, curves, flags, remarks."""
    table = results.table(record)
    return _template().render(
        record=record,
        counted=labels.counted(record),
        worst=_worst(record),
        models=[row["model"] for row in table["rows"]],
        rows=[_row(column, table["rows"]) for column in table["columns"]],
        curves=_curves(record),
        warnings=[row["sentence"] for row in verdicts.near_chance(record)],
        flags=[verdicts.flag_text(flag) for flag in verdicts.raised_flags(record)],
        remarks=[*filter(None, [sentences.reliability_in_short(record), sentences.untrusted_note(record)]), *remarks],
        pairs=[pair for pair in verdicts.worst_case_pairs(record) if pair["threat_model"] != ANY],
    )


@functools.cache
def _template() -> jinja2.Template:
    return environment(Path(__file__).parent).get_template("result.html.j2")


def _worst(record: RunRecord) -> list[dict[str, Any]]:
    """Return the worst cases by the examples that were made on the model itself.

    For each model, the budgets of the attacks come first, then those of minimal-norm attacks.
    """
    specs = [labels.parsed_attack(attack) for attack in record.experiment.evaluation.attacks]
    budgets = {(spec.norm, spec.eps) for spec in specs if spec is not None}
    models = list(record.roles)
    rows = [row for row in verdicts.worst_cases(record) if row["threat_model"] != ANY]
    return sorted(rows, key=lambda row: (models.index(row["model"]), (row["norm"], row["eps"]) not in budgets))


def _row(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an attack's row: its titles, and the cell of each model (None if it was not attacked)."""
    clean = column["threat_model"] == CLEAN
    return {
        "threat": "" if clean else column["threat_title"],
        "attack": "no attack" if clean else column["attack_title"],
        "settings": column["settings"],
        "cells": [_cell(column, row["cells"].get(column["key"])) for row in rows],
    }


def _cell(column: Mapping[str, Any], cell: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {**cell, "norm": labels.median_norm(cell) if column["minimal_norm"] else ""}


def _curves(record: RunRecord) -> list[dict[str, Any]]:
    """Return a panel per norm, with the points of each model's curve on itself in pixels."""
    panels: dict[str, list[Any]] = {}
    for e in record.evaluations:
        if e.curve is not None and e.source == e.model:
            panels.setdefault(e.curve["norm"], []).append(e)
    several = len({e.model for entries in panels.values() for e in entries}) > 1
    return [_panel(norm, entries, several) for norm, entries in panels.items()]


def _panel(norm: str, entries: Sequence[Any], several: bool) -> dict[str, Any]:
    longest = max(max(e.curve["eps"]) for e in entries) or 1.0
    lines = []
    for i, e in enumerate(entries):
        points = [
            f"{CURVE_WIDTH * eps / longest:.1f},{CURVE_HEIGHT * (1 - accuracy):.1f}"
            for eps, accuracy in zip(e.curve["eps"], e.curve["accuracy"], strict=True)
        ]
        title = labels.attack_title(e.attack)[0] + (f" on {e.model}" if several else "")
        lines.append({"points": " ".join(points), "colour": COLOURS[i % len(COLOURS)], "title": title})
    title = f"accuracy in % over the {labels.norm_text(norm)} norm allowed"
    return {"title": title, "longest": f"{longest:.3g}", "lines": lines, "width": CURVE_WIDTH, "height": CURVE_HEIGHT}
