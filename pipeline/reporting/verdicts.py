"""Worst cases, reliability flags and warnings of a run, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.evaluation.statistics import wilson_interval
from components.threat_models import ANY, BLACK_BOX, CLEAN, DIRECT, WHITE_BOX
from pipeline.records import RunRecord, WorstCase
from pipeline.reporting import over_seeds
from pipeline.reporting.labels import attack_text, budget_text, is_untrusted, parsed_attack, percent
from pipeline.reporting.records import Row

Matrix = tuple[list[str], list[str], np.ndarray]
"""(models that examples were made on, models that judged them, accuracies as fractions)."""


def worst_cases(record: RunRecord) -> list[Row]:
    """Return the worst case per sample of each model and budget, with titles and untrusted attacks.

    A record also holds the worst case over all examples that were shown to a model (threat model
    "any"). It is left out for a model that was shown no examples of other models.
    """
    shown = _models_shown_examples_of_others(record)
    return [
        {**worst_titled(worst.to_json()), "untrusted": _untrusted_attacks(record, worst)}
        for worst in record.worst_case or ()
        if worst.threat_model != ANY or worst.model in shown
    ]


def _models_shown_examples_of_others(record: RunRecord) -> set[str]:
    return {e.model for e in record.evaluations if e.source not in (None, e.model)}


def worst_over_seeds(record: RunRecord) -> list[Row]:
    """Return :func:`worst_cases` over the seeds; [] for one seed.

    A row is untrusted if the worst case of one of its seeds is.
    """
    keys = ("norm", "eps", "threat_model")
    untrusted = {(record.bases[w["model"]], *(w[k] for k in keys)) for w in worst_cases(record) if w["untrusted"]}
    shown = {record.bases[model] for model in _models_shown_examples_of_others(record)}
    return [
        {**worst_titled(row), "untrusted": (row["model"], *(row[k] for k in keys)) in untrusted}
        for row in over_seeds.worst_over_seeds(record)
        if row["threat_model"] != ANY or row["model"] in shown
    ]


def worst_case_pairs(record: RunRecord) -> list[Row]:
    """Return the worst cases of two models on the same samples, with McNemar's p-value."""
    shown = _models_shown_examples_of_others(record)
    return [
        worst_titled(pair.to_json())
        for pair in record.worst_case_pairs or ()
        if pair.threat_model != ANY or {pair.model, pair.against} <= shown
    ]


def worst_titled(row: Mapping[str, Any]) -> Row:
    """Return a row of a worst case with titles of its budget and of its examples."""
    titles = {WHITE_BOX: "made on the model itself", ANY: "also transferred to it"}
    return {**row, "budget": budget_text(row["norm"], row["eps"]), "threat_title": titles[row["threat_model"]]}


def _untrusted_attacks(record: RunRecord, worst: WorstCase) -> list[str]:
    """Return the untrusted attacks, of the norm and within the budget, behind a worst case."""
    attacks = dict.fromkeys(
        e.attack
        for e in record.evaluations
        if e.model == worst.model
        and (worst.threat_model == ANY or e.threat_model in DIRECT)
        and is_untrusted(record, e)
    )

    def counts(attack: str) -> bool:
        spec = parsed_attack(attack)
        # An attack of another version has no norm that could be compared.
        return spec is None or (spec.norm == worst.norm and (spec.eps is None or spec.eps <= worst.eps))

    return [attack for attack in attacks if counts(attack)]


def raised_flags(record: RunRecord) -> list[Row]:
    """Return the reliability flags that were raised, with their models."""
    return [
        {"model": model, **flag}
        for model, tested in (record.reliability or {}).items()
        for flag in tested.flags
        if flag["fired"]
    ]


def flag_text(flag: Row) -> tuple[str, str]:
    """Return the title of a flag, and what was measured and what to do."""
    return f"{flag['model']}: {flag['name'].replace('_', ' ')}.", f"{flag['measured']} {flag['remedy']}"


def near_chance(record: RunRecord) -> list[Row]:
    """Find the models whose accuracy on clean images cannot be told from guessing.

    The robust accuracy of such a model means nothing. For K classes, chance is 1/K. A model is near
    it if the lower end of the Wilson interval of its clean accuracy is at most 1.5/K, and at most
    chance plus a twentieth of what is left to 1 (for two classes 52.5 %, not 75 %).

    Returns:
        {model, accuracy, n, chance, sentence} for each such model, in the order of the config.
    """
    clean = {e.model: e for e in record.evaluations if e.threat_model == CLEAN}
    chance = 1 / record.experiment.data.num_classes
    limit = min(1.5 * chance, chance + 0.05 * (1 - chance))
    rows = []
    for model in (name for name in record.roles if name in clean):
        n, accuracy = clean[model].n, clean[model].accuracy
        low, high = wilson_interval(round(accuracy * n), n)
        if low > limit:
            continue
        if accuracy > limit:
            verdict = (
                f"cannot be told from chance ({percent(chance)} %) with so few images. Raise evaluation.test_images."
            )
        else:
            where = "below" if high < chance else "near"
            verdict = (
                f"is {where} chance ({percent(chance)} %). Check the order of the classes, the normalisation "
                "(train.normalize_mean, train.normalize_std), the channels (RGB or BGR), the image size and "
                "the weights."
            )
        sentence = (
            f"{model}: the clean accuracy of {percent(accuracy)} % (n = {n}) {verdict} "
            "Robust accuracies of such a model mean nothing."
        )
        rows.append({"model": model, "accuracy": accuracy, "n": n, "chance": chance, "sentence": sentence})
    return rows


def transfer_matrices(record: RunRecord) -> dict[str, Matrix]:
    """Return the accuracies [made on, judged by] under each attack that was transferred.

    An attack counts if its examples were made on at least two models and judged by others. The
    diagonal is white-box. Of several seeds, the first is shown.
    """
    first = record.first_replicates
    accuracies: dict[str, dict[tuple[str, str], float]] = {}
    for e in record.evaluations:
        if e.source in first and e.model in first and e.threat_model != BLACK_BOX:
            accuracies.setdefault(e.attack, {})[e.source, e.model] = e.accuracy
    matrices = {}
    for attack, cells in accuracies.items():
        sources = [m for m in first if any(source == m and judge != m for source, judge in cells)]
        judges = [m for m in first if any(judge == m for _, judge in cells)]
        if len(sources) > 1:
            values = np.array([[cells.get((source, judge), np.nan) for judge in judges] for source in sources])
            matrices[attack_text(attack)] = sources, judges, values
    return matrices
