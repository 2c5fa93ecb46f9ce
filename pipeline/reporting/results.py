"""The tables of a run as data: results, paired comparisons, and statistics over seeds.

The same records give the same rows (docs/records.md). Nothing here draws or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.config import Experiment, roles
from components.errors import DataError
from components.evaluation.statistics import mcnemar
from components.threat_models import CLEAN, TRANSFER
from pipeline.records import SCHEMA, EvaluationEntry, RunRecord
from pipeline.reporting import over_seeds, paper
from pipeline.reporting.labels import (
    THREATS,
    attack_labels,
    attack_text,
    attack_title,
    is_untrusted,
    norm_summary,
    threat_title,
)
from pipeline.reporting.records import Row, read_judged
from pipeline.reporting.verdicts import worst_over_seeds, worst_titled
from pipeline.runtime.storage import Storage


def norms_over_seeds(row: Mapping[str, Any]) -> str:
    """Return the norms of a row over the seeds: ``L2 1.23 of 195–198``, or ``4–12 broken``."""
    return norm_summary(row["norm"], row["norm_median_mean"], row["broken_min"], row["broken_max"])


def table(record: RunRecord) -> dict[str, Any]:
    """Return the result table: ``columns`` (threat model x attack) and ``rows`` (models)."""
    columns = _columns(record)
    keys = {(c["threat_model"], c["attack"]): c["key"] for c in columns}
    rows = []
    for model, role in record.roles.items():
        evaluations = [e for e in record.evaluations if e.model == model]
        if evaluations or model in record.models:
            cells = {keys[e.threat_model, e.attack]: _cell(record, e) for e in evaluations}
            rows.append({"model": model, "role": role, "cells": cells})
    return {"schema": SCHEMA, "recipe": record.name, "columns": columns, "rows": rows}


def _columns(record: RunRecord) -> list[Row]:
    order = list(THREATS)
    pairs = dict.fromkeys((e.threat_model, e.attack) for e in record.evaluations)
    # The sort is stable: within a threat model, attacks keep their order.
    ranked = sorted(pairs, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    labels = attack_labels(e.attack for e in record.evaluations)
    minimal_norm = {e.attack for e in record.evaluations if e.curve}
    columns = []
    for threat, attack in ranked:
        name, settings = attack_title(attack)
        columns.append(
            {
                "key": CLEAN if threat == CLEAN else f"{threat}/{labels[attack]}",
                "threat_model": threat,
                "threat_title": threat_title(threat),
                "attack": attack,
                "attack_title": name,
                "settings": settings,
                "minimal_norm": attack in minimal_norm,
            }
        )
    return columns


def _cell(record: RunRecord, evaluation: EvaluationEntry) -> Row:
    metrics = {k: v for k, v in over_seeds.shown_metrics(evaluation).items() if k != "curve"}
    untrusted = is_untrusted(record, evaluation)
    return {"source": evaluation.source, "n": evaluation.n, "untrusted": untrusted, **metrics}


def comparisons(record: RunRecord, root: Storage) -> list[Row]:
    """Compare each defended model with each control on the same transferred examples.

    The p-value of a row is that of the exact McNemar test.

    Raises:
        DataError: a judged record is missing or corrupt, or two evaluations have different samples.
    """
    transferred = [e for e in record.evaluations if e.threat_model == TRANSFER and e.path]
    defended, controls = ([e for e in transferred if record.roles[e.model] == role] for role in ("defended", "control"))
    return [
        _comparison(record, root, a, b)
        for a in defended
        for b in controls
        if (a.attack, a.source) == (b.attack, b.source)
    ]


def _comparison(record: RunRecord, root: Storage, defended: EvaluationEntry, control: EvaluationEntry) -> Row:
    first, second = (read_judged(root, str(e.path)) for e in (defended, control))
    if not np.array_equal(first["index"], second["index"]):
        raise DataError(
            f"{root.uri}/{defended.path} and {control.path} are not of the same samples; "
            "delete both and run the same command again"
        )
    right_a, right_b = (columns["adversarial_prediction"] == columns["label"] for columns in (first, second))
    return {
        "attack": defended.attack,
        "attack_title": attack_text(defended.attack),
        "source": defended.source,
        "untrusted": is_untrusted(record, defended),
        "defended": defended.model,
        "control": control.model,
        "n": len(right_a),
        "accuracy_defended": float(right_a.mean()),
        "accuracy_control": float(right_b.mean()),
        "only_defended": int((right_a & ~right_b).sum()),
        "only_control": int((right_b & ~right_a).sum()),
        "p": mcnemar(right_a, right_b),
    }


def evaluated_models(record: RunRecord) -> list[str]:
    """Return the models that the run has evaluations of, in the order of the config."""
    models = {e.model for e in record.evaluations}
    return [name for name in record.roles if name in models]


def stage_times(record: RunRecord) -> dict[str, float]:
    """Return the title of each stage and its seconds."""
    title = model_stage(record.experiment)
    return {title if name == "train" else name: seconds for name, seconds in record.stages.items()}


def model_stage(experiment: Experiment) -> str:
    """Return the title of stage 2, which is "models" if the run only reads models."""
    return "train" if experiment.trains else "models"


def across(record: RunRecord) -> dict[str, list[Row]]:
    """Return statistics over several evaluations: ``over_seeds``, ``differences``, ``paper``."""
    differences: list[Row] = []
    worst: list[Row] = []
    references = roles.references(record.experiment)
    for i, reference in enumerate(references):
        # A pair of references is compared once.
        earlier = references[:i]
        differences += [d for d in over_seeds.differences(record, reference) if d["model"] not in earlier]
        worst += [d for d in over_seeds.worst_differences(record, reference) if d["model"] not in earlier]
    rows = {
        "over_seeds": over_seeds.over_seeds(record),
        "differences": differences,
        "paper": paper.beside_paper(record),
    }
    groups = over_seeds.by_seed(record)
    for row in (*rows["over_seeds"], *differences, *(cell for printed in rows["paper"] for cell in printed["ours"])):
        threat, attack = row["threat_model"], row["attack"]
        row["threat_title"], row["attack_title"] = threat_title(threat), attack_text(attack)
        evaluations = [
            evaluation
            for model in (row["model"], row.get("reference", ""))
            for evaluation in groups.get((model, threat, attack), {}).values()
        ]
        row["untrusted"] = any(is_untrusted(record, e) for e in evaluations)
    # The worst case comes last, because it belongs to no single attack.
    rows["differences"] += _worst_differences(record, worst)
    return rows


def _worst_differences(record: RunRecord, rows: list[Row]) -> list[Row]:
    """Return differences of worst cases with titles, marked if an attack is untrusted."""
    untrusted = {(w["model"], w["budget"]) for w in worst_over_seeds(record) if w["untrusted"]}
    titled = []
    for row in map(worst_titled, rows):
        titles = {"threat_title": "worst case", "attack_title": f"{row['budget']}, {row['threat_title']}"}
        marked = any((model, row["budget"]) in untrusted for model in (row["model"], row["reference"]))
        titled.append({**row, **titles, "untrusted": marked})
    return titled
