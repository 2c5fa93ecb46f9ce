"""Statistics over the seeds of a run: mean, spread and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from components.config import Experiment
from components.threat_models import WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord
from pipeline.reporting.records import Row

MIN_FOR_MEDIAN = 10
"""Fewest images for which a report shows a median or quartile.

With fewer images, the median says more about those images than about the attack.
"""

Key = tuple[Any, ...]
"""(model as named in the recipe, threat model, ...): what replicates have in common."""


def by_seed(record: RunRecord) -> dict[tuple[str, str, str], dict[int, EvaluationEntry]]:
    """Return (model as named in the recipe, threat model, attack) -> replicate -> evaluation."""
    groups: dict[tuple[str, str, str], dict[int, EvaluationEntry]] = {}
    for e in record.evaluations:
        base, replicate = record.replicates[e.model]
        groups.setdefault((base, e.threat_model, e.attack), {})[replicate] = e
    return groups


def spread(values: Sequence[float]) -> Row:
    """Return number of seeds, mean, standard deviation (None for one seed), minimum and maximum."""
    return {
        "seeds": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def accuracy_spread(evaluations: Sequence[EvaluationEntry]) -> Row:
    """Return :func:`spread` of the accuracies, and their outermost Wilson bounds ``low``, ``high``."""
    low, high = zip(*(e.interval for e in evaluations), strict=True)
    return {**spread([e.accuracy for e in evaluations]), "low": min(low), "high": max(high)}


def over_seeds(record: RunRecord) -> list[Row]:
    """Return mean and spread over the replicates of each model and attack; [] for one seed."""
    if record.experiment.seeds < 2:
        return []
    rows = []
    for (model, threat, attack), replicates in by_seed(record).items():
        evaluations = list(replicates.values())
        row = {"model": model, "threat_model": threat, "attack": attack, "n": sum(e.n for e in evaluations)}
        accuracies = spread([e.accuracy for e in evaluations])
        row |= {key if key == "seeds" else f"accuracy_{key}": value for key, value in accuracies.items()}
        rows.append({**row, **_norms_over_seeds([shown_metrics(e) for e in evaluations])})
    return rows


def _norms_over_seeds(metrics: Sequence[Row]) -> Row:
    """Return the norm that an attack minimises, its median over the seeds, and the broken images.

    The mean of the medians is None unless every seed has a median. A mean over some of the seeds
    would not belong to the number of seeds in the row.
    """
    norm = metrics[0]["norm"]
    medians = [median for m in metrics if (median := m.get(f"{norm}_median")) is not None]
    broken = [m["broken"] for m in metrics if m["broken"] is not None]
    return {
        "norm": norm,
        "norm_median_mean": statistics.fmean(medians) if norm and len(medians) == len(metrics) else None,
        "broken_min": min(broken, default=None),
        "broken_max": max(broken, default=None),
    }


def shown_metrics(evaluation: EvaluationEntry) -> Row:
    """Return the metrics of an evaluation as every table, file and tracker shows them.

    A median or quartile of a norm is over the broken images; None for fewer than MIN_FOR_MEDIAN.

    Returns:
        The metrics of the evaluation, with ``norm`` and ``broken``. ``norm`` ("l2" or "linf") is
        what the attack minimises, None for an attack within a budget. ``broken`` is the number of
        images that were classified correctly and that the attack broke. It is None in a record
        without the rates that it follows from.
    """
    metrics = dict(evaluation.metrics)
    broken = None
    if "clean_accuracy" in metrics and "success_rate" in metrics:
        broken = round(metrics["success_rate"] * round(metrics["clean_accuracy"] * evaluation.n))
    if broken is None or broken < MIN_FOR_MEDIAN:
        metrics |= dict.fromkeys((k for k in metrics if k.endswith(("_median", "_q25", "_q75"))), None)
    return {**metrics, "norm": (evaluation.curve or {}).get("norm"), "broken": broken}


def differences(record: RunRecord, reference: str) -> list[Row]:
    """Return the accuracy of every other model of the same architecture less that of the reference.

    The values are paired by replicate and have a 95 % interval over the seeds (Student's t over the
    paired differences). ``resolved`` says whether the interval leaves out 0: then the difference is
    larger than what seeds alone make. With three seeds that takes 2.5 standard deviations. There is
    no correction for the number of comparisons.
    """
    accuracies = {key: {r: e.accuracy for r, e in seeds.items()} for key, seeds in by_seed(record).items()}
    return [
        {"model": model, "reference": reference, "threat_model": threat, "attack": attack, **difference}
        for (model, threat, attack), difference in _differences(record.experiment, accuracies, reference)
    ]


def worst_differences(record: RunRecord, reference: str, level: float = 0.05) -> list[Row]:
    """Return :func:`differences` of the worst case over the examples made on each model itself.

    A row has norm and eps in place of the attack.

    Args:
        level: probability that an interval misses the true difference.
    """
    return [
        {"model": model, "reference": reference, "threat_model": threat, "norm": norm, "eps": eps, **difference}
        for (model, threat, norm, eps), difference in _differences(
            record.experiment, _worst_by_seed(record), reference, level
        )
        if threat == WHITE_BOX
    ]


def _differences(
    experiment: Experiment, values: Mapping[Any, Mapping[int, float]], reference: str, level: float = 0.05
) -> Iterator[tuple[Key, Row]]:
    """Yield the key of each other model of the reference's architecture, and its difference."""
    configs = experiment.first_replicates()
    for (model, *rest), by_replicate in values.items():
        if model == reference or configs[model].arch != configs[reference].arch:
            continue
        if difference := paired_difference(by_replicate, values.get((reference, *rest), {}), level):
            yield (model, *rest), difference


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.05) -> Row:
    """Return the mean of a - b over the common replicates; {} if they are fewer than two.

    See :func:`differences`.
    """
    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        return {}
    values = [a[r] - b[r] for r in common]
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    # Half of the level is in each tail. scipy.stats has Student's t too, but takes seconds to import.
    half = float(stdtrit(len(values) - 1, 1 - level / 2)) * sd / len(values) ** 0.5
    return {"seeds": len(values), "difference": mean, "half_width": half, "resolved": abs(mean) > half}


def _worst_by_seed(record: RunRecord) -> dict[tuple[str, str, str, float], dict[int, float]]:
    """Return (model as named in the recipe, threat model, norm, eps) -> replicate -> accuracy."""
    groups: dict[tuple[str, str, str, float], dict[int, float]] = {}
    for worst in record.worst_case or ():
        base, replicate = record.replicates[worst.model]
        groups.setdefault((base, worst.threat_model, worst.norm, worst.eps), {})[replicate] = worst.accuracy
    return groups


def worst_over_seeds(record: RunRecord) -> list[Row]:
    """Return mean and spread of the worst case over each model's replicates; [] for one seed."""
    if record.experiment.seeds < 2:
        return []
    return [
        {"model": base, "norm": norm, "eps": eps, "threat_model": threat, **spread(list(accuracies.values()))}
        for (base, threat, norm, eps), accuracies in _worst_by_seed(record).items()
    ]
