"""What the records of a run say: reading them, and rows for tables, each number with its threat model and attack.

The same records give the same rows (docs/records.md); nothing here draws or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.config import Experiment, roles
from components.config.roles import roles_of
from components.errors import DataError
from components.evaluation.statistics import mcnemar
from pipeline.reporting import over_seeds, paper, records
from pipeline.reporting.labels import (
    THREATS,
    attack_labels,
    attack_text,
    attack_title,
    is_untrusted,
    norm_summary,
    threat_title,
)
from pipeline.reporting.records import Row, experiment_of, read_judged
from pipeline.reporting.verdicts import worst_over_seeds, worst_titled
from pipeline.runtime.storage import Storage


def norms_over_seeds(row: Mapping[str, Any]) -> str:
    """Return the same of a row over the seeds: ``L2 1.23 of 195–198``, or ``4–12 broken``."""
    return norm_summary(row["norm"], row["norm_median_mean"], row["broken_min"], row["broken_max"])


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
    for model, role in roles_of(experiment_of(record)).items():
        cells: dict[str, Any] = {}
        for e in evaluations:
            if e["model"] == model:
                key = next(
                    c["key"] for c in columns if (c["threat_model"], c["attack"]) == (e["threat_model"], e["attack"])
                )
                metrics = {k: v for k, v in over_seeds.shown_metrics(e).items() if k != "curve"}
                cells[key] = {
                    "source": e.get("source"),
                    "n": e["n"],
                    "untrusted": is_untrusted(record, e),
                    **metrics,
                }
        if cells or model in record["models"]:
            rows.append({"model": model, "role": role, "cells": cells})
    return {"schema": 1, "recipe": record["name"], "columns": columns, "rows": rows}


def comparisons(record: Mapping[str, Any], root: Storage) -> list[Row]:
    """Every defended model against every control on the same transferred examples (exact McNemar test).

    Raises:
        DataError: a judged record is missing or corrupt, or two evaluations are not of the same samples.
    """
    role = roles_of(experiment_of(record))
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
                    "untrusted": is_untrusted(record, a),
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


def evaluated(record: Mapping[str, Any]) -> list[str]:
    """Return the models that the run has evaluations of, in their order."""
    return [name for name in roles_of(experiment_of(record)) if any(e["model"] == name for e in record["evaluations"])]


def stage_times(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage by its title."""
    title = model_stage(records.experiment_of(record))
    return {title if k == "train" else k: v for k, v in record["stages"].items()}


def model_stage(experiment: Experiment) -> str:
    """Return the title of stage 2: a run that trains nothing reads its models."""
    return "train" if experiment.trains else "models"


def across(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What several evaluations say together: ``over_seeds``, ``differences`` and ``paper`` (pipeline/reporting/over_seeds.py)."""
    cells = over_seeds.by_seed(record)
    found: list[Row] = []
    compared = roles.references(experiment_of(record))
    worst: list[Row] = []
    for i, reference in enumerate(compared):
        found += [d for d in over_seeds.differences(record, reference) if d["model"] not in compared[:i]]
        worst += [d for d in over_seeds.worst_differences(record, reference) if d["model"] not in compared[:i]]
    rows = {
        "over_seeds": over_seeds.over_seeds(record),
        "differences": found,
        "paper": paper.beside_paper(record),
    }
    for row in (*rows["over_seeds"], *rows["differences"], *(o for p in rows["paper"] for o in p["ours"])):
        row["threat_title"], row["attack_title"] = threat_title(row["threat_model"]), attack_text(row["attack"])
        models = (row["model"], row.get("reference"))
        row["untrusted"] = any(
            is_untrusted(record, e)
            for model in models
            for e in cells.get((model, row["threat_model"], row["attack"]), {}).values()
        )
    # the worst case last: no attack of its own, but what a reader asks for first
    doubted = {(w["model"], w["budget"]) for w in worst_over_seeds(record) if w["untrusted"]}
    for row in map(worst_titled, worst):
        marked = any((m, row["budget"]) in doubted for m in (row["model"], row["reference"]))
        said = {"threat_title": "worst case", "attack_title": f"{row['budget']}, {row['threat_title']}"}
        rows["differences"].append({**row, **said, "untrusted": marked})
    return rows
