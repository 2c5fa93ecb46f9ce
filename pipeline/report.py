"""What a run found, from its records alone: table, plots and one HTML file that opens from disk.

Rebuilt at any time from ``run.json`` and what it names (docs/records.md); the same records give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.attacks.spec import AttackSpec
from components.config import TrainConfig, parse_spec, to_dict
from components.errors import ConfigError, DataError
from components.robustness import mcnemar
from pipeline import comparison, figures, plots
from pipeline.storage import Storage

PHASES = ("joint", "autoencoder", "classifier", "adversarial", "reformer")
THREATS = {
    "clean": "clean",
    "random": "random (control)",
    "white_box": "white-box",
    "black_box": "black-box",
    "grey_box": "grey-box",
    "transfer": "transfer",
}
"""Threat models in the order of a table, as they are written for people; ``transfer:NAME`` comes after them."""
ROLES = {
    "source": "undefended, source of transfer",
    "control": "control: undefended, another seed",
    "defended": "defended",
    "given": "given, not trained here",
}
TERMINAL_WIDTH = 100
"""Where there is no terminal to ask."""

Row = dict[str, Any]


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_run(run: Storage) -> dict[str, Any]:
    """``run.json`` with what a run that is not complete lacks filled in empty.

    Raises:
        DataError: it is missing, of another schema, or lacks what every run has. StorageError: it cannot be read.
    """
    if not run.exists("run.json"):
        raise DataError(f"{run.uri} is not the directory of a run: it has no run.json. Runs lie under STORAGE/runs/")
    record = run.read_json("run.json")
    if not isinstance(record, dict) or record.get("schema") != 1:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise DataError(f"{run.uri}/run.json has schema {schema!r}; this version reads schema 1")
    for key in ("name", "experiment"):
        if key not in record:
            raise DataError(f"{run.uri}/run.json lacks {key!r}; run the same command again to write it anew")
    empty: dict[str, Any] = {"models": {}, "evaluations": [], "stages": {}, "data": {}, "git": {}, "hardware": {}}
    whole = {**empty, "versions": {}, "command": "", "created": "", "finished": None}
    whole.update({k: v for k, v in record.items() if v is not None})
    # JSON objects are stored by name; people read them in the order in which things happen
    whole["stages"] = _in_order(whole["stages"], ("pyramids", "train", "attack", "report"))
    whole["data"] = {
        **whole["data"],
        "rows": _in_order(whole["data"].get("rows") or {}, ("train", "validation", "test")),
    }
    whole["models"] = _in_order(whole["models"], tuple(roles(whole)))
    for i, evaluation in enumerate(whole["evaluations"]):
        for key in ("model", "threat_model", "attack", "n", "metrics"):
            if key not in evaluation:
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks {key!r}; run the same command again")
        for key in ("accuracy", "accuracy_low", "accuracy_high"):
            if not isinstance(evaluation["metrics"].get(key), int | float):
                raise DataError(f"{run.uri}/run.json: evaluation {i} lacks metrics.{key}; run the same command again")
    return whole


def _in_order(values: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in dict.fromkeys((*first, *values)) if name in values}


def history_files(root: Storage, model: Mapping[str, Any]) -> list[str]:
    """Names, below the storage, of a model's epoch records, first epoch first."""
    directory = f"{model['path']}/history"
    return [f"{directory}/{name}" for name in root.list(directory)]


def read_epoch(root: Storage, file: str) -> dict[str, Any]:
    """One epoch record. Raises DataError if it is not one, StorageError if it cannot be read."""
    record = root.read_json(file)
    try:
        if (
            record["phase"] in PHASES
            and int(record["epoch"]) >= 0
            and all({"step", "time"} <= s.keys() for s in record["steps"])
        ):
            return dict(record)
    except (KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{root.uri}/{file} is not the record of an epoch; delete its directory and run the same command again"
    )


def read_gallery(run: Storage) -> dict[str, np.ndarray]:
    """``gallery.npz``; empty if the run has none yet. Raises DataError if it is corrupt."""
    gallery = figures.read(run, "gallery.npz")
    if not gallery or ({"clean", "label"} <= gallery.keys() and len(gallery["clean"]) == len(gallery["label"])):
        return gallery
    raise DataError(
        f"{run.uri}/gallery.npz is corrupt (it has not as many labels as images); delete it and run the same command again"
    )


def read_judged(root: Storage, path: str) -> dict[str, np.ndarray]:
    """The columns of one ``judged/<hash>``, by sample index. Raises DataError if a chunk is missing or corrupt."""
    chunks = [name for name in root.list(path) if name.endswith(".parquet")]
    if not chunks:
        raise DataError(f"{root.uri}/{path} has no records of an evaluation; run the same command again")
    wanted = ["index", "label", "adversarial_prediction"]
    try:
        tables = [pq.read_table(pa.BufferReader(root.read_bytes(f"{path}/{name}")), columns=wanted) for name in chunks]
    except (pa.ArrowInvalid, OSError, KeyError) as e:
        raise DataError(f"{root.uri}/{path} is corrupt ({e}); delete it and run the same command again") from e
    table = pa.concat_tables(tables).sort_by("index")
    return {name: table.column(name).to_numpy() for name in wanted}


# -- meaning ---------------------------------------------------------------------------------------------------------------


def model_config(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The complete training config of a model, also before it is trained."""
    trained: dict[str, Any] | None = record["models"].get(name, {}).get("train") if "models" in record else None
    return trained or to_dict(comparison.experiment_of(record).variants()[name].canonical())


def roles(record: Mapping[str, Any]) -> dict[str, str]:
    """Model -> source, control, defended or given (not trained here), in the order of the config."""
    experiment = comparison.experiment_of(record)
    variants = experiment.variants()
    sources = {experiment.source_of(name) for name in variants}

    def role(name: str, config: TrainConfig) -> str:
        if config.defense != "none":
            return "defended"
        if name in sources:
            return "source"
        return "control" if config.epochs else "given"

    return {name: role(name, config) for name, config in variants.items()}


def threat_title(threat: str) -> str:
    """A threat model as it is written for people."""
    base, _, source = threat.partition(":")
    return f"{THREATS.get(base, base)} from {source}" if source else THREATS.get(threat, threat)


def attack_labels(record: Mapping[str, Any]) -> dict[str, str]:
    """Attack spec -> a short name, ``bim``, with settings only where the run has several of that name: ``bim_eps0.1``."""
    specs = dict.fromkeys(["none", *(e["attack"] for e in record.get("evaluations", []))])
    short = {spec: _short(spec) for spec in specs}
    out = {}
    for spec, name in short.items():
        rivals = [s for s, n in short.items() if n == name]
        fields = {s: parse_spec(s)[1] for s in rivals}
        differing = [k for k in fields[spec] if len({fields[s].get(k) for s in rivals}) > 1]
        out[spec] = "_".join([name, *(f"{k}{_decimal(fields[spec][k])}" for k in differing)])
    return out


def _short(spec: str) -> str:
    try:
        return AttackSpec.parse(spec).short_name
    except ConfigError:  # "none", or an attack of another version
        return parse_spec(spec)[0]


def attack_title(spec: str) -> tuple[str, str]:
    """Name and settings for people: ``bim:eps=0.2,steps=100`` is ("BIM", "eps 0.2, 100 steps")."""
    if spec == "none":
        return "no attack", ""
    fields = parse_spec(spec)[1]
    said = []
    try:
        parsed = AttackSpec.parse(spec)
        if parsed.kind == "minimal_norm":
            said.append(f"any {_norm(parsed.norm)} norm")
        elif parsed.norm == "l2":
            said.append("L2")
    except ConfigError:
        pass  # an attack of another version: its text says all we know
    for key, value in fields.items():
        if key == "steps":
            said.append(f"{value} steps")
        elif key != "norm":
            said.append(f"{key.replace('_', ' ')} {_decimal(value)}")
    return parse_spec(spec)[0].upper() if spec.partition(":")[0] != "noise" else "random noise", ", ".join(said)


def _norm(name: str | None) -> str:
    return {"l2": "L2", "linf": "Linf"}.get(name or "", name or "")


def _decimal(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The result table as data: ``columns`` (threat model x attack) and ``rows`` (models) with a cell per column."""
    order = list(THREATS)
    evaluations = record["evaluations"]
    keys = dict.fromkeys((e["threat_model"], e["attack"]) for e in evaluations)
    ranked = sorted(
        keys, key=lambda k: order.index(k[0]) if k[0] in order else len(order)
    )  # stable: attacks keep their order
    labels = attack_labels(record)
    columns = []
    for threat, attack in ranked:
        name, settings = attack_title(attack)
        columns.append(
            {
                "key": "clean" if threat == "clean" else f"{threat}/{labels[attack]}",
                "threat_model": threat,
                "threat_title": threat_title(threat),
                "attack": attack,
                "attack_title": name,
                "settings": settings,
                "minimal_norm": any(e["metrics"].get("curve") for e in evaluations if e["attack"] == attack),
            }
        )
    rows = []
    for model, role in roles(record).items():
        cells: dict[str, Any] = {}
        for e in evaluations:
            if e["model"] == model:
                key = next(
                    c["key"] for c in columns if (c["threat_model"], c["attack"]) == (e["threat_model"], e["attack"])
                )
                metrics = {k: v for k, v in e["metrics"].items() if k != "curve"}
                cells[key] = {"source": e.get("source"), "n": e["n"], **metrics}
        if cells or model in record["models"]:
            rows.append({"model": model, "role": role, "cells": cells})
    return {"schema": 1, "recipe": record["name"], "columns": columns, "rows": rows}


def comparisons(record: Mapping[str, Any], root: Storage) -> list[Row]:
    """Every defended model against every control on the same transferred examples (exact McNemar test).

    Raises:
        DataError: a judged record is missing or corrupt, or two evaluations are not of the same samples.
    """
    role = roles(record)
    transferred = [e for e in record["evaluations"] if e["threat_model"] == "transfer" and e.get("path")]
    out = []
    for a in transferred:
        for b in transferred:
            same = a["attack"] == b["attack"] and a.get("source") == b.get("source")
            if not (same and role.get(a["model"]) == "defended" and role.get(b["model"]) == "control"):
                continue
            first, second = read_judged(root, a["path"]), read_judged(root, b["path"])
            if not np.array_equal(first["index"], second["index"]):
                raise DataError(
                    f"{root.uri}/{a['path']} and {b['path']} are not of the same samples; delete both and run the same command again"
                )
            right_a = first["adversarial_prediction"] == first["label"]
            right_b = second["adversarial_prediction"] == second["label"]
            out.append(
                {
                    "attack": a["attack"],
                    "attack_title": ", ".join(filter(None, attack_title(a["attack"]))),
                    "source": a.get("source"),
                    "defended": a["model"],
                    "control": b["model"],
                    "n": len(right_a),
                    "accuracy_defended": float(right_a.mean()),
                    "accuracy_control": float(right_b.mean()),
                    "only_defended": int((right_a & ~right_b).sum()),
                    "only_control": int((right_b & ~right_a).sum()),
                    "p": mcnemar(right_a, right_b),
                }
            )
    return out


def explanation(record: Mapping[str, Any]) -> list[str]:
    """How to read the numbers, in plain sentences."""
    sources = dict.fromkeys(e["source"] for e in record["evaluations"] if e["threat_model"] == "transfer")
    source = ", ".join(sources) or "an undefended model"
    return [
        "White-box: the examples were made on the very model under test. This is the number that says how much a model "
        "withstands, and no more than that: a stronger attack can only lower it. Black-box: the same, from its scores alone.",
        f"Transfer: the examples were made on an undefended model ({source}) and then shown to the model under test. A high "
        "number says that these examples do not carry over, not that the model withstands an attacker who knows it.",
        "Control: an undefended model of another seed on the same examples, and random noise of the same size without any "
        "attacker. Only what a defended model does better than the controls can be owed to its defense.",
    ]


def worst_cases(record: Mapping[str, Any]) -> list[Row]:
    """The worst case per sample of each model and budget, with the budget and threat model as they are written for people."""
    said = {"white_box": "made on the model itself", "any": "also transferred to it"}
    return [
        {**row, "budget": f"{_norm(row['norm'])} ≤ {row['eps']:.4g}", "threat_title": said[row["threat_model"]]}
        for row in record.get("worst_case") or []
    ]


def raised_flags(record: Mapping[str, Any]) -> list[Row]:
    """The reliability flags that fired, in the order of the models: {model, name, measured, remedy}."""
    found = record.get("reliability") or {}
    return [
        {"model": model, **flag}
        for model in _in_order(found, tuple(roles(record)))
        for flag in found[model]["flags"]
        if flag["fired"]
    ]


def reliability_in_short(record: Mapping[str, Any]) -> str:
    """One sentence that says whether the numbers can be trusted; empty where nobody looked."""
    tested = record.get("reliability") or {}
    if not tested:
        return ""
    active = [a for one in tested.values() for a in one["active"].values() if a["passed"] is not None]
    passed = sum(a["passed"] for a in active)
    fired = raised_flags(record)
    where = ", ".join(dict.fromkeys(f["model"] for f in fired))
    return (
        f"Reliability: {len(fired)} flags raised{f' ({where})' if fired else ''} on {len(tested)} models; {passed} of {len(active)} attacks "
        "found the adversarial examples that were planted for them (docs/reliability.md)."
    )


def transfer_matrices(record: Mapping[str, Any]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """Attack -> (models that examples were made on, models that judged them, accuracy [made on, judged by]); the diagonal is white-box.

    Of each attack whose examples were made on at least two models and judged by others; of several seeds the first.
    """
    first = plots.first_replicates(roles(record), comparison.experiment_of(record).bases())
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for e in record["evaluations"]:
        if e.get("source") in first and e["model"] in first and e["threat_model"] != "black_box":
            cells.setdefault(e["attack"], {})[e["source"], e["model"]] = e["metrics"]["accuracy"]
    out = {}
    for attack, found in cells.items():
        sources = [m for m in first if any(s == m and judge != m for s, judge in found)]
        judges = [m for m in first if any(judge == m for _, judge in found)]
        if len(sources) > 1:
            values = np.array([[found.get((s, j), np.nan) for j in judges] for s in sources])
            out[_said(attack)] = sources, judges, values
    return out


def across(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What several evaluations say together: ``over_seeds``, ``differences`` and ``paper`` (pipeline/comparison.py)."""
    found = [d for r in comparison.references(record, roles(record)) for d in comparison.differences(record, r)]
    rows = {
        "over_seeds": comparison.over_seeds(record),
        "differences": found,
        "paper": comparison.beside_paper(record),
    }
    for row in (*rows["over_seeds"], *rows["differences"], *(o for p in rows["paper"] for o in p["ours"])):
        row["threat_title"], row["attack_title"] = threat_title(row["threat_model"]), _said(row["attack"])
    return rows


def in_short(record: Mapping[str, Any]) -> list[str]:
    """One sentence per model: clean accuracy and the attack within a budget that leaves least of it."""
    said = []
    for row in table(record)["rows"]:
        clean = row["cells"].get("clean")
        parts = [] if clean is None else [f"{_percent(clean['accuracy'])} % clean"]
        for threat in ("white_box", "transfer"):
            found = [
                (e["metrics"]["accuracy"], e["attack"])
                for e in record["evaluations"]
                if (e["model"], e["threat_model"]) == (row["model"], threat) and not e["metrics"].get("curve")
            ]
            if found:
                lowest, attack = min(found)
                parts.append(f"{_percent(lowest)} % under the worst {THREATS[threat]} attack ({_said(attack)})")
        parts += [
            f"{_percent(w['accuracy'])} % in the worst case per sample at {w['budget']}"
            for w in worst_cases(record)
            if w["model"] == row["model"] and w["threat_model"] == "white_box"
        ]
        if parts:
            said.append(f"{row['model']} ({ROLES[row['role']]}): " + ", ".join(parts) + ".")
    return [*said, *filter(None, [reliability_in_short(record)])]


def missing(
    record: Mapping[str, Any], gallery: Mapping[str, Any], histories: Mapping[str, Any], drawn: Iterable[str]
) -> list[str]:
    """What a partial run lacks, in words; empty for a complete one. ``drawn``: names of the plots that were made."""
    out = []
    untrained = [name for name in roles(record) if name not in record["models"]]
    if diverged := record.get("diverged"):
        said = ", ".join(f"{name} at step {step}" for name, step in diverged.items())
        out.append(f"training diverged, so it was not evaluated: {said}")
        untrained = [name for name in untrained if name not in diverged]
    if untrained:
        out.append("not trained yet: " + ", ".join(untrained))
    trained = [name for name, model in record["models"].items() if model.get("train", {}).get("epochs", 1)]
    no_history = [name for name in trained if not histories.get(name)]
    if no_history:
        out.append("no training history of: " + ", ".join(no_history))
    if not record["evaluations"]:
        out.append("no evaluations yet")
    if not gallery:
        out.append("no gallery of images yet")
    if undrawn := [f for f in record["experiment"].get("figures", ()) if f not in drawn]:
        out.append(f"the records hold nothing to draw these from: {', '.join(undrawn)}")
    if not record.get("finished"):
        out.append("the run has not finished")
    return out


def counted(record: Mapping[str, Any]) -> str:
    """``n = 1,000 test images``, or the range where evaluations differ."""
    sizes = sorted({e["n"] for e in record["evaluations"]})
    if not sizes:
        return "no evaluations yet"
    return f"n = {sizes[0]:,} test images" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,} test images"


def _said(attack: str) -> str:
    name, settings = attack_title(attack)
    return f"{name}, {settings}" if settings else name


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


# -- tables for people -----------------------------------------------------------------------------------------------------


def print_table(run: Storage, *, console: Console | None = None) -> None:
    """The result table on the terminal; plain text of at most 100 columns where there is none.

    Raises:
        DataError: ``run.json`` is missing or corrupt.
    """
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=TERMINAL_WIDTH)
    record = read_run(run)
    if not record["evaluations"]:
        console.print(f"{record['name']}: no evaluations yet", markup=False, highlight=False)
        return
    together = across(record)
    # with several seeds the rows of single models are in the report
    if not together["over_seeds"]:
        for part in terminal_tables(record, console.width):
            console.print(part)
    for part in comparison_tables(record, together):
        console.print(part)
    if not together["over_seeds"] and (verdicts := verdict_table(record)):
        console.print(verdicts)
    for flag in raised_flags(record):
        said = f"{flag['model']}: {flag['name'].replace('_', ' ')}. {flag['measured']} {flag['remedy']}"
        console.print(Text(said, style="yellow"))
    role = roles(record)
    notes = [
        f"Accuracy in % of {counted(record)}, ± half the 95 % Wilson interval (sampling of images only, not of seeds).",
        *explanation(record),
        *filter(None, [reliability_in_short(record)]),
    ]
    if any(r == "control" for r in role.values()):
        notes.append("Controls here: " + ", ".join(m for m, r in role.items() if r == "control") + ".")
    for note in notes:
        console.print(Text(note, style="dim"))


def comparison_tables(record: Mapping[str, Any], together: Mapping[str, Sequence[Row]]) -> list[Table]:
    """Mean and spread over the seeds, and our values beside the paper's, for the terminal."""
    out = []
    if together["over_seeds"]:
        seeds = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title="accuracy in %: mean ± standard deviation over the seeds"
        )
        for head in ("model", "threat model", "attack", "seeds", "accuracy", "median L2"):
            seeds.add_column(head, justify="right" if head in ("seeds", "accuracy", "median L2") else "left")
        for row in together["over_seeds"]:
            norm = row["l2_median_mean"]
            seeds.add_row(
                row["model"],
                row["threat_title"],
                "" if row["threat_model"] == "clean" else row["attack_title"],
                str(row["seeds"]),
                mean_and_sd(row["accuracy_mean"], row["accuracy_sd"]),
                "" if norm is None else f"{norm:.2f}",
            )
        out.append(seeds)
    if together["paper"]:
        scale = f", scale {record['experiment']['scale']}" if record["experiment"].get("scale") else ""
        beside = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title=f"beside the paper's {record['experiment']['paper']}{scale}"
        )
        for head in ("the paper's row", "attack", "paper", "ours, by threat model"):
            beside.add_column(head, justify="right" if head == "paper" else "left")
        for row in together["paper"]:
            ours = "; ".join(f"{o['threat_title']} {mean_and_sd(o['mean'], o['sd'])}" for o in row["ours"])
            made_on = f" on {row['made_on']}" if row["made_on"] else ""
            beside.add_row(f"{row['title']} ({row['arch']})", f"{row['column']}{made_on}", row["paper"], ours or "-")
        out.append(beside)
    return out


def verdict_table(record: Mapping[str, Any]) -> Table | None:
    """The worst case per sample for the terminal; a column per budget. None where there is none."""
    rows = worst_cases(record)
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
        cells = [
            f"{_percent(w['accuracy'])} ±{50 * (w['accuracy_high'] - w['accuracy_low']):.1f}"
            if (w := found.get(h))
            else "-"
            for h in heads
        ]
        out.add_row(model, *cells)
    return out


def mean_and_sd(mean: float, sd: float | None) -> str:
    """Fractions as percentages: ``98.3`` or ``98.3 ± 0.4``."""
    return _percent(mean) if sd is None else f"{_percent(mean)} ± {100 * sd:.1f}"


def terminal_tables(record: Mapping[str, Any], width: int) -> list[Table]:
    """The table in as few parts as fit into ``width``, none across two threat models unless both fit whole."""
    data = table(record)
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
        out.add_column("\n".join(_head(column)), justify="right", no_wrap=True)
    for row in rows:
        name, role = _row_head(row)
        cells = ["\n".join(_cell(column, row)) for column in columns]
        out.add_row(Text.assemble(name, "\n", (role, "dim")), *cells)
    return out


def _row_head(row: Row) -> tuple[str, str]:
    return row["model"], {"source": "undefended"}.get(row["role"], row["role"])


def _head(column: Row) -> list[str]:
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
    half = (cell["accuracy_high"] - cell["accuracy_low"]) / 2
    lines = [f"{_percent(cell['accuracy'])} ±{100 * half:.1f}"]
    if column["minimal_norm"]:
        median = cell.get("l2_median")
        lines.append("unbroken" if median is None else f"L2 {median:.2f}")
    return lines


def _column_width(column: Row, rows: Sequence[Row]) -> int:
    return max(len(line) for lines in (_head(column), *(_cell(column, row) for row in rows)) for line in lines)


def markdown(record: Mapping[str, Any]) -> str:
    """Description and table for places that show Markdown, such as MLflow's page of a run."""
    data = table(record)
    lines = [record["experiment"].get("description", ""), ""]
    heads = [
        " ".join(
            filter(None, (c["threat_title"], c["attack_title"] if c["threat_model"] != "clean" else "", c["settings"]))
        )
        for c in data["columns"]
    ]
    lines += ["| " + " | ".join(["model", *heads]) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in data["rows"]:
        cells = ["<br>".join(_cell(c, row)) if c["minimal_norm"] else _cell(c, row)[0] for c in data["columns"]]
        lines.append(
            "| "
            + " | ".join([f"{row['model']} ({_row_head(row)[1]})", *(c.replace("<br>", ", ") for c in cells)])
            + " |"
        )
    lines += ["", f"Accuracy in %, {counted(record)}, ± half the 95 % Wilson interval.", "", *explanation(record)]
    together = _markdown_across(across(record))
    return "\n".join([*lines, *_markdown_verdict(record), *together, *_markdown_models(record)]).strip()


def _markdown_models(record: Mapping[str, Any]) -> list[str]:
    """What was trained, and what all of it was made with, as Markdown: a table out of its run must still say so."""
    lines: list[str] = []
    if record["models"]:
        heads = ("model", "validation accuracy", "reconstruction error (validation)", "training seconds", "images/s")
        lines += ["", "### Models", "", _markdown_row(heads), "| --- " * len(heads) + "|"]
        for name, m in record["models"].items():
            error, seconds, speed = (m.get(k) for k in ("reconstruction_validation", "seconds", "images_per_second"))
            cells = (
                name,
                "–" if m.get("clean_validation") is None else _percent(m["clean_validation"]),
                "–" if error is None else f"{error:.3g}",
                "–" if seconds is None else f"{seconds:.0f}",
                "–" if speed is None else f"{speed:.0f}",
            )
            lines.append(_markdown_row(cells))
        lines += ["", "Reconstruction error: mean squared error per pixel of the whole image, in (0..1)²."]
    machine = record["hardware"]
    gpus = ", ".join(machine.get("gpus") or []) or "no GPU"
    made = {
        "Command": f"`{record['command']}`" if record["command"] else "",
        "Source": f"{record['git'].get('revision') or ''}{' with uncommitted changes' if record['git'].get('dirty') else ''}",
        "Finished": _when(record["finished"]),
        "Hardware": f"{machine['cpu']}, {machine['cpus']} CPUs, {gpus}" if machine else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items())),
        "Seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in record["stages"].items()),
    }
    lines += ["", "### Made with", "", *(f"- {what}: {text}" for what, text in made.items() if text)]
    return lines


def _markdown_verdict(record: Mapping[str, Any]) -> list[str]:
    """Worst cases and flags as Markdown."""
    lines = []
    if rows := worst_cases(record):
        lines += ["", "### Worst case per sample over all attacks, accuracy in %", ""]
        lines += [
            _markdown_row(("model", "budget", "examples", "accuracy", "95 % interval", "attacks")),
            "| --- " * 6 + "|",
        ]
        for w in rows:
            interval = f"{_percent(w['accuracy_low'])} – {_percent(w['accuracy_high'])}"
            values = (w["model"], w["budget"], w["threat_title"], _percent(w["accuracy"]), interval, str(w["attacks"]))
            lines.append(_markdown_row(values))
    if said := reliability_in_short(record):
        lines += ["", said]
        lines += [
            f"- **{f['model']}: {f['name'].replace('_', ' ')}.** {f['measured']} {f['remedy']}"
            for f in raised_flags(record)
        ]
    return lines


def _markdown_across(together: Mapping[str, Sequence[Row]]) -> list[str]:
    """What several evaluations say together, as Markdown tables; none where there is nothing to say."""
    lines: list[str] = []

    def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines.extend(["", f"### {title}", "", _markdown_row(heads), "| --- " * len(heads) + "|"])
        lines.extend(_markdown_row(row) for row in rows)

    def attack(row: Row) -> str:
        return "" if row["threat_model"] == "clean" else row["attack_title"]

    if seeds := together["over_seeds"]:
        table(
            "Over the seeds: accuracy in %, mean ± standard deviation",
            ("model", "threat model", "attack", "seeds", "accuracy", "least to greatest"),
            [
                (
                    r["model"],
                    r["threat_title"],
                    attack(r),
                    str(r["seeds"]),
                    mean_and_sd(r["accuracy_mean"], r["accuracy_sd"]),
                    f"{_percent(r['accuracy_min'])} to {_percent(r['accuracy_max'])}",
                )
                for r in seeds
            ],
        )
    if resolved := [d for d in together["differences"] if d["resolved"]]:
        table(
            f"Differences that exceed the seeds' noise ({len(resolved)} of {len(together['differences'])}; 95 %, paired by seed, "
            "not corrected for their number)",
            ("model", "against", "threat model", "attack", "points"),
            [
                (
                    d["model"],
                    d["reference"],
                    d["threat_title"],
                    attack(d),
                    f"{100 * d['difference']:+.1f} ± {100 * d['half_width']:.1f}",
                )
                for d in resolved
            ],
        )
    if printed := together["paper"]:
        table(
            "Beside the paper",
            ("the paper's row", "network", "attack", "paper", "ours, by threat model"),
            [
                (
                    r["title"],
                    r["arch"],
                    r["column"] + (f" made on {r['made_on']}" if r["made_on"] else ""),
                    r["paper"],
                    "; ".join(f"{o['threat_title']} {mean_and_sd(o['mean'], o['sd'])}" for o in r["ours"]) or "-",
                )
                for r in printed
            ],
        )
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_csv(record: Mapping[str, Any]) -> str:
    """One line per evaluation, accuracies as fractions."""
    names = ["accuracy", "accuracy_low", "accuracy_high", "accuracy_rounded", "clean_accuracy", "success_rate"]
    names += ["l2_median", "l2_q25", "l2_q75", "linf_median", "seconds"]
    role = roles(record)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "role", "threat_model", "attack", "source", "n", *names])
    for e in record["evaluations"]:
        values = [e["metrics"].get(name) for name in names]
        writer.writerow(
            [e["model"], role.get(e["model"], ""), e["threat_model"], e["attack"], e.get("source"), e["n"], *values]
        )
    return out.getvalue()


# -- building --------------------------------------------------------------------------------------------------------------


def build(run: Storage, root: Storage) -> dict[str, str]:
    """Write ``report/`` of a run: report.html, table.json, table.csv, table.md and plots/*.png. A partial run gives a partial report.

    Args:
        run: the run directory. root: the storage it lies in.

    Returns:
        What was written, name -> path below the run directory; "html" is the report, "table_json", "table_csv", "table_md", and
        "plot_..." for each plot there was data for.

    Raises:
        DataError: a record is missing or corrupt; the message names it. StorageError: something could not be written.
    """
    record = read_run(run)
    gallery = read_gallery(run)
    histories = {
        name: [read_epoch(root, file) for file in history_files(root, model)]
        for name, model in record["models"].items()
    }
    data = {
        **table(record),
        "worst_case": worst_cases(record),
        "flags": raised_flags(record),
        "comparisons": comparisons(record, root),
        **across(record),
    }
    pictures = _pictures(record, gallery, histories, figures.read(run))
    paths = {
        "html": "report/report.html",
        "table_json": "report/table.json",
        "table_csv": "report/table.csv",
        "table_md": "report/table.md",
    }
    for name, (_, _, png) in pictures.items():
        paths[f"plot_{name}"] = f"report/plots/{name}.png"
        run.write_bytes(paths[f"plot_{name}"], png)
    run.write_json(paths["table_json"], data)
    run.write_bytes(paths["table_csv"], to_csv(record).encode())
    run.write_bytes(paths["table_md"], f"# {record['name']}\n\n{markdown(record)}\n".encode())
    html = _html(record, data, pictures, missing(record, gallery, histories, pictures))
    run.write_bytes(paths["html"], html.encode())  # last: its presence says that all of it is there
    return paths


def _pictures(
    record: Mapping[str, Any],
    gallery: Mapping[str, np.ndarray],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    stored: Mapping[str, np.ndarray],
) -> dict[str, tuple[str, str, bytes]]:
    """Name -> (heading, caption, PNG) of every plot that there is data for; the paper's figures first."""
    role = roles(record)
    bases = comparison.experiment_of(record).bases()
    out = figures.draw(record, gallery, stored, role, threat_title=threat_title, attack_title=_said)
    if panels := _bar_panels(record):
        what, drawn, drawn_roles = "whiskers: 95 % Wilson interval", panels, role
        if len(role) > plots.MANY_BARS and len(set(bases.values())) < len(role):
            what = "bars: mean over the seeds; whiskers: from the least to the greatest of them"
            drawn, drawn_roles = plots.over_replicates(panels, bases), {bases[name]: r for name, r in role.items()}
        lacking = "A missing bar is 0 % where it has a whisker or a 0, and not measured where it has none."
        if len(drawn_roles) > plots.MANY_BARS:
            lacking = "A dash: not measured."
        out["accuracy"] = (
            "Accuracy by threat model",
            f"{counted(record)}; {what}. {lacking}",
            plots.bars(drawn, drawn_roles),
        )
    if panels_by_norm := _curve_panels(record):
        few, note = _first_of_many([m for m in role if any(m in models for models in panels_by_norm.values())], bases)
        chosen = {t: {m: c for m, c in models.items() if m in few} for t, models in panels_by_norm.items()}
        out["curves"] = (
            "Accuracy over the norm of the perturbation",
            "Minimal-norm attacks: what is left when only examples up to that norm count. At any norm, nothing is left of a "
            "differentiable network attacked white-box; what differs is how far that is." + note,
            plots.curves({t: models for t, models in chosen.items() if models}, _only(role, few)),
        )
    if matrices := transfer_matrices(record):
        out["transfer"] = (
            "Transfer from model to model",
            f"Accuracy in %, {counted(record)}: examples made on the model of the row, judged by the one of the column. On the diagonal "
            "they are white-box.",
            plots.heat_maps(matrices),
        )
    if gallery:
        # of the first replicate, which gallery.npz has alone
        first = plots.first_replicates(role, bases)
        said = "" if len(first) == len(role) else " Of several seeds, the first."
        rows = _gallery_rows(record, gallery)
        for model, entries in rows.items():
            out[f"adversarial-{model}"] = (
                f"White-box examples of {model}",
                "Each with what the model takes it for; ✓ still right, ✗ wrong.",
                plots.adversarial(gallery, entries),
            )
        if any(k.startswith("reconstruction_") for k in gallery):
            out["reconstructions"] = (
                "Targets and reconstructions",
                f"Clean images, the low-pass targets of each level, and what the auto-encoders make of them.{said}",
                plots.reconstructions(gallery, list(role)),
            )
    trained = {name: epochs for name, epochs in histories.items() if epochs}
    few, note = _first_of_many(list(trained), bases)
    trained = _only(trained, few)
    if trained:
        out["losses"] = (
            "Training losses",
            f"Logarithmic; the phase of the schedule behind them.{note}",
            plots.losses(trained),
        )
    if any(e.get("validation", {}).get("accuracy") is not None for epochs in trained.values() for e in epochs):
        out["validation"] = (
            "Validation accuracy",
            f"Clean images held out of the training set.{note}",
            plots.validation(trained, _only(role, few)),
        )
    return out


def _first_of_many(names: Sequence[str], bases: Mapping[str, str]) -> tuple[Sequence[str], str]:
    """The models that curves show, and what the caption says of it: of too many, the first replicate of each."""
    first = plots.first_replicates(names, bases)
    if len(names) <= plots.MANY_LINES or len(first) == len(names):
        return names, ""
    return first, f" Of {len(names)} models, the first seed of each."


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _bar_panels(record: Mapping[str, Any]) -> dict[str, dict[str, dict[str, plots.Bar]]]:
    panels: dict[str, dict[str, dict[str, plots.Bar]]] = {}
    for column in table(record)["columns"]:
        # clean images and noise share a panel: both are without an attacker
        plain = column["threat_model"] in ("clean", "random")
        panel = panels.setdefault("no attacker" if plain else column["threat_title"], {})
        label = "clean" if column["threat_model"] == "clean" else "\n".join(_head(column)[1:])
        for e in record["evaluations"]:
            if (e["threat_model"], e["attack"]) == (column["threat_model"], column["attack"]):
                m = e["metrics"]
                bar = plots.Bar(accuracy=m["accuracy"], low=m["accuracy_low"], high=m["accuracy_high"])
                panel.setdefault(label, {})[e["model"]] = bar
    return panels


def _curve_panels(record: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for threat in dict.fromkeys((*THREATS, *(e["threat_model"] for e in record["evaluations"]))):
        for e in record["evaluations"]:
            if e["threat_model"] == threat and (curve := e["metrics"].get("curve")):
                panels.setdefault(f"{threat_title(threat)}: {_said(e['attack'])}", {})[e["model"]] = curve
    return panels


def _gallery_rows(record: Mapping[str, Any], gallery: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, str]]]:
    """Model -> (label of a row, key in the gallery), in the order of the gallery."""
    out: dict[str, list[tuple[str, str]]] = {}
    specs = {e["attack"] for e in record["evaluations"]}
    titles = {**{_short(s): s for s in specs}, **{s: s for s in specs}}
    for model in sorted(roles(record), key=len, reverse=True):  # a name may begin with another's
        prefix = f"adversarial__{model}__"
        taken = {key for entries in out.values() for _, key in entries}
        for name in gallery:
            key = name.removeprefix("adversarial__")
            if name.startswith(prefix) and key not in taken:
                title, settings = attack_title(titles.get(name.removeprefix(prefix), name.removeprefix(prefix)))
                out.setdefault(model, []).append((f"white-box {title}\n{settings.replace(', ', chr(10))}".strip(), key))
    return {model: out[model] for model in roles(record) if model in out}


def _html(
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str, bytes]],
    lacking: Sequence[str],
) -> str:
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, duration=_duration, when=_when)
    environment.globals["mean_and_sd"] = mean_and_sd
    groups: dict[str, int] = {}
    for column in data["columns"]:
        groups[column["threat_title"]] = groups.get(column["threat_title"], 0) + 1
    budgets = [
        (row["model"], column, row["cells"][column["key"]]["accuracy_at_budget"])
        for column in data["columns"]
        for row in data["rows"]
        if row["cells"].get(column["key"], {}).get("accuracy_at_budget")
    ]
    return environment.get_template("report.html.j2").render(
        record=record,
        table=data,
        groups=groups,
        budgets=budgets,
        roles=ROLES,
        lacking=lacking,
        counted=counted(record),
        explanation=explanation(record),
        in_short=in_short(record),
        reliability=_in_order(record.get("reliability") or {}, tuple(roles(record))),
        pictures=[(heading, caption, base64.b64encode(png).decode()) for heading, caption, png in pictures.values()],
        config=json.dumps(record["experiment"], indent=2, sort_keys=True),
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _when(iso: str | None) -> str:
    """An ISO time as ``2026-01-31 12:00 UTC``; what is none, as it is."""
    try:
        return datetime.fromisoformat(iso or "").strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return iso or ""
