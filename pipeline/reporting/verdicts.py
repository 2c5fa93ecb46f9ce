"""Worst cases, flags and active tests of a run, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.attacks.spec import AttackSpec
from components.config import roles
from components.config.roles import roles_of
from components.errors import ConfigError
from components.evaluation.statistics import wilson_interval
from pipeline.reporting import over_seeds, records
from pipeline.reporting.labels import attack_text, is_untrusted, norm_text, percent
from pipeline.reporting.records import Row, experiment_of, in_order


def worst_cases(record: Mapping[str, Any]) -> list[Row]:
    """Return the worst case per sample of each model and budget, with the budget and threat model as written for people.

    A record also holds the worst case over noise and what was made on the model itself, as threat model "any". It is left out
    where no examples of other models were shown to the model.
    """
    shown = _shown_examples_of_others(record)
    return [
        {**worst_titled(w), "untrusted": _untrusted_in(record, w)}
        for w in record.get("worst_case") or []
        if w["threat_model"] != "any" or w["model"] in shown
    ]


def _shown_examples_of_others(record: Mapping[str, Any]) -> set[str]:
    return {e["model"] for e in record["evaluations"] if e.get("source") not in (None, e["model"])}


def worst_over_seeds(record: Mapping[str, Any]) -> list[Row]:
    """The same over the seeds, where there are several; untrusted where one of them is."""
    bases = records.experiment_of(record).base_names()
    keys = ("norm", "eps", "threat_model")
    doubted = {(bases[w["model"]], *(w[k] for k in keys)) for w in worst_cases(record) if w["untrusted"]}
    shown = {bases[model] for model in _shown_examples_of_others(record)}
    return [
        {**worst_titled(w), "untrusted": (w["model"], *(w[k] for k in keys)) in doubted}
        for w in over_seeds.worst_over_seeds(record)
        if w["threat_model"] != "any" or w["model"] in shown
    ]


def worst_case_pairs(record: Mapping[str, Any]) -> list[Row]:
    """Return the worst case of one model against that of another on the same samples (exact McNemar test)."""
    shown = _shown_examples_of_others(record)
    return [
        worst_titled(w)
        for w in record.get("worst_case_pairs") or []
        if w["threat_model"] != "any" or {w["model"], w["against"]} <= shown
    ]


def worst_titled(row: Mapping[str, Any]) -> Row:
    said = {"white_box": "made on the model itself", "any": "also transferred to it"}
    budget = f"{norm_text(row['norm'])} ≤ {row['eps']:.4g}"
    return {**row, "budget": budget, "threat_title": said[row["threat_model"]]}


def _untrusted_in(record: Mapping[str, Any], worst: Row) -> list[str]:
    """The attacks on which a worst case rests, of its norm and within its budget, that are not to be trusted."""
    threats = ("white_box", "black_box")
    found = dict.fromkeys(
        e["attack"]
        for e in record["evaluations"]
        if e["model"] == worst["model"]
        and (worst["threat_model"] == "any" or e["threat_model"] in threats)
        and is_untrusted(record, e)
    )

    def counts(text: str) -> bool:
        try:
            spec = AttackSpec.parse(text)
        except ConfigError:  # an attack of another version
            return True
        return spec.norm == worst["norm"] and (spec.eps is None or spec.eps <= worst["eps"])

    return [text for text in found if counts(text)]


def raised_flags(record: Mapping[str, Any]) -> list[Row]:
    """The reliability flags that fired, in the order of the models: {model, name, measured, remedy}."""
    found = record.get("reliability") or {}
    return [
        {"model": model, **flag}
        for model in in_order(found, tuple(roles_of(experiment_of(record))))
        for flag in found[model]["flags"]
        if flag["fired"]
    ]


def near_chance(record: Mapping[str, Any]) -> list[Row]:
    """Find the models whose accuracy on clean images cannot be told from guessing: their robust accuracy means nothing.

    Of K classes chance is 1/K. A model is near it if the lower end of the Wilson interval of its clean accuracy is at
    most 1.5/K, and at most chance plus a twentieth of what is left to 1 (for two classes 52.5 %, not 75 %).

    Returns:
        {model, accuracy, n, chance, sentence} for each, in the order of the models.
    """
    clean = {e["model"]: e for e in record.get("evaluations") or () if e["threat_model"] == "clean"}
    if not clean:
        return []
    chance = 1 / record["experiment"]["data"]["num_classes"]
    limit = min(1.5 * chance, chance + 0.05 * (1 - chance))
    rows = []
    for model in in_order(clean, tuple(roles_of(experiment_of(record)))):
        n, accuracy = clean[model]["n"], clean[model]["metrics"]["accuracy"]
        low, high = wilson_interval(round(accuracy * n), n)
        if low > limit:
            continue
        if accuracy > limit:
            verdict = f"cannot be told from chance ({percent(chance)} %) by so few images: raise evaluation.test_images"
        else:
            where = "below" if high < chance else "near"
            verdict = (
                f"is {where} chance ({percent(chance)} %): check the order of the classes, the normalisation "
                "(train.normalize_mean, train.normalize_std), the channels (RGB or BGR), the image size and the weights"
            )
        sentence = (
            f"{model}: clean accuracy {percent(accuracy)} % (n = {n}) {verdict}. Robust accuracies of such a model "
            "mean nothing."
        )
        rows.append({"model": model, "accuracy": accuracy, "n": n, "chance": chance, "sentence": sentence})
    return rows


def transfer_matrices(record: Mapping[str, Any]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """Attack -> (models that examples were made on, models that judged them, accuracy [made on, judged by]); the diagonal is white-box.

    Of each attack whose examples were made on at least two models and judged by others; of several seeds the first.
    """
    first = roles.first_replicates(roles_of(experiment_of(record)), records.experiment_of(record).base_names())
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
            out[attack_text(attack)] = sources, judges, values
    return out
