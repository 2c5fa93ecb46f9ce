"""Names and values of metrics in MLflow (docs/mlflow.md).

MLflow sorts metrics by name, and opens its charts in that order. So the names begin with what
matters most: accuracy, then norms, reliability, size, time and the history of training.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from components.threat_models import CLEAN, RANDOM, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord
from pipeline.reporting import over_seeds, verdicts
from pipeline.reporting.labels import attack_labels, eps_text, is_untrusted

HEADLINE = r"accuracy/(clean|[^/]+_worst_case)"
"""Names of the metrics that the parent run has of its main model."""
FIRST = ("accuracy/clean", HEADLINE, "accuracy/white_box/.*", "accuracy/black_box/.*", "accuracy/.*")
"""Names that come first where MLflow shows metrics in the order of their arrival."""
OF_NO_DATA = ("size/", "time/")
"""Beginnings of the names of what was not measured on a data set."""


def training_metrics(model: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of an entry of ``models`` in ``run.json``, or of the part that is known."""
    return {
        "accuracy/clean_validation": model.get("clean_validation"),
        "time/train_seconds": model.get("seconds") or None,
        "time/train_images_per_second": model.get("images_per_second") or None,
        **{f"size/parameters/{part}": float(count) for part, count in (model.get("parameters") or {}).items()},
    }


def test_metrics(record: RunRecord, model: str) -> dict[str, float]:
    """Return what was measured on a model on test images, as in ``accuracy/white_box/pgd``.

    ``reliability/untrusted/white_box/fgsm`` is 1 if that attack failed its active test, and absent
    if not. So it is with a flag that was raised.
    """
    labels = attack_labels(e.attack for e in record.evaluations)
    own = [e for e in record.evaluations if e.model == model]
    values: dict[str, float] = {}
    for evaluation in own:
        name = evaluation_name(evaluation, labels)
        metrics = over_seeds.shown_metrics(evaluation)
        values[f"accuracy/{name}"] = metrics["accuracy"]
        for budget, accuracy in (metrics.get("accuracy_at_budget") or {}).items():
            norm, _, eps = budget.partition("<=")
            values[f"accuracy_at/{name}_{norm}_{budget_name(float(eps))}"] = accuracy
        if (norm := metrics["norm"]) and (median := metrics.get(f"{norm}_median")) is not None:
            values[f"norm/{name}_{norm}_median"] = median
        if is_untrusted(record, evaluation):
            values[f"reliability/untrusted/{name}"] = 1.0
    for worst in (w for w in verdicts.worst_cases(record) if w["model"] == model):
        # The worst case is over examples made on the model itself, or also over transferred ones.
        among = "" if worst["threat_model"] == WHITE_BOX else "transfer/"
        # The budget comes first, because charts have room for the beginning of a name.
        name = f"{among}{worst['norm']}_{budget_name(worst['eps'])}_worst_case"
        values[f"accuracy/{name}"] = worst["accuracy"]
        if worst["untrusted"]:
            values[f"reliability/untrusted/{name}"] = 1.0
    if own:
        values["time/attack_seconds"] = sum(float(e.metrics.get("seconds") or 0.0) for e in own)
    values |= _reliability_metrics(record, model, labels)
    return dict(sorted(values.items(), key=lambda item: _importance(item[0])))


def _importance(name: str) -> int:
    return next((place for place, names in enumerate(FIRST) if re.fullmatch(names, name)), len(FIRST))


def _reliability_metrics(record: RunRecord, model: str, labels: Mapping[str, str]) -> dict[str, float]:
    values: dict[str, float] = {}
    if any(row["model"] == model for row in verdicts.near_chance(record)):
        values["reliability/flag/clean_accuracy_near_chance"] = 1.0
    if tested := (record.reliability or {}).get(model):
        raised = [flag["name"] for flag in tested.flags if flag["fired"]]
        values["reliability/flags_raised"] = float(len(raised))
        values |= {f"reliability/flag/{name}": 1.0 for name in raised}
        for attack, test in tested.active.items():
            if attack in labels and test["share"] is not None:
                values[f"reliability/active_test/{labels[attack]}"] = test["share"]
    return values


def curves(record: RunRecord, model: str) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
    """Return accuracy over the norm allowed, by name: (thousandths of the norm, accuracies).

    MLflow's steps are whole numbers, so they count thousandths.
    """
    labels = attack_labels(e.attack for e in record.evaluations)
    return {
        f"curve/{evaluation_name(e, labels)}_by_{e.curve['norm']}_x1000": (
            [round(1000 * eps) for eps in e.curve["eps"]],
            e.curve["accuracy"],
        )
        for e in record.evaluations
        if e.model == model and e.curve
    }


def evaluation_name(evaluation: EvaluationEntry, labels: Mapping[str, str]) -> str:
    """Return ``clean``, ``noise``, ``white_box/pgd`` or ``transfer:NAME/bim``."""
    if evaluation.threat_model == CLEAN:
        return CLEAN
    label = labels[evaluation.attack]
    return label if evaluation.threat_model == RANDOM else f"{evaluation.threat_model}/{label}"


def budget_name(eps: float) -> str:
    """Return a budget as the report shows it, with ``4_255`` for 4/255.

    A slash would look like another group of metrics.
    """
    return eps_text(eps).replace("/", "_")


def main_model(record: RunRecord) -> str | None:
    """Return the model that a run is about, as the recipe names it; None if none is evaluated.

    It is the first defended one, else the external one, else the first.
    """
    evaluated = {e.model for e in record.evaluations}
    names = [name for name in record.first_replicates if name in evaluated]
    return next(
        (record.bases[name] for role in ("defended", "given") for name in names if record.roles[name] == role),
        record.bases[names[0]] if names else None,
    )


def headline(record: RunRecord) -> dict[str, float]:
    """Return clean and worst-case accuracy of :func:`main_model`, as means over its seeds."""
    main = main_model(record)
    evaluated = dict.fromkeys(e.model for e in record.evaluations)
    replicates = [test_metrics(record, name) for name in evaluated if record.bases[name] == main]
    names = [name for name in (replicates[0] if replicates else ()) if re.fullmatch(HEADLINE, name)]
    return {
        name: statistics.fmean(values[name] for values in replicates)
        for name in names
        if all(name in values for values in replicates)
    }


def seed_metrics(record: RunRecord) -> dict[str, float | None]:
    """Return mean and standard deviation over the seeds of each model and attack; {} for one seed."""
    labels = attack_labels(e.attack for e in record.evaluations)
    values: dict[str, float | None] = {}
    for row in over_seeds.over_seeds(record):
        threat, label = row["threat_model"], labels[row["attack"]]
        name = {CLEAN: CLEAN, RANDOM: label}.get(threat, f"{threat}/{label}")
        key = f"over_seeds/{row['model']}/{name}"
        values |= {f"{key}_mean": row["accuracy_mean"], f"{key}_sd": row["accuracy_sd"]}
    return values
