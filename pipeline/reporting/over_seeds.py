"""What several evaluations say together: over the seeds, against a reference, and beside the paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from components.config import Experiment
from pipeline.reporting.records import experiment_of

Row = dict[str, Any]
CONFIDENCE = 0.95
MIN_FOR_MEDIAN = 10
"""Fewest images of which a report shows a median or quartile. That of fewer describes those images, not the attack."""


def by_seed(record: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[int, Row]]:
    """(model as named in the recipe, threat model, attack) -> replicate -> evaluation."""
    replicates = experiment_of(record).replicates()
    out: dict[tuple[str, str, str], dict[int, Row]] = {}
    for e in record["evaluations"]:
        base, replicate = replicates[e["model"]]
        out.setdefault((base, e["threat_model"], e["attack"]), {})[replicate] = e
    return out


def spread(values: Sequence[float]) -> Row:
    """Mean, standard deviation over the seeds (None for one), least and greatest."""
    return {
        "seeds": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def over_seeds(record: Mapping[str, Any]) -> list[Row]:
    """Mean and spread over the replicates of each model under each attack; empty for a run of one seed."""
    if experiment_of(record).seeds < 2:
        return []
    out = []
    for (model, threat, attack), replicates in by_seed(record).items():
        metrics = [e["metrics"] for e in replicates.values()]
        row = {"model": model, "threat_model": threat, "attack": attack, "n": sum(e["n"] for e in replicates.values())}
        row |= {f"accuracy_{k}" if k != "seeds" else k: v for k, v in spread([m["accuracy"] for m in metrics]).items()}
        out.append({**row, **_norms_over_seeds([shown_metrics(e) for e in replicates.values()])})
    return out


def _norms_over_seeds(several: Sequence[Row]) -> Row:
    """Return the norm that an attack minimises, the mean of its median over the seeds, and how many images these broke.

    The mean is None unless every seed has a median: a mean over some of them would not be of the seeds that the row counts.
    """
    norm = several[0]["norm"]
    medians = [m.get(f"{norm}_median") for m in several]
    known = [m["broken"] for m in several if m["broken"] is not None]
    return {
        "norm": norm,
        "norm_median_mean": statistics.fmean(medians) if norm and None not in medians else None,
        "broken_min": min(known, default=None),
        "broken_max": max(known, default=None),
    }


def shown_metrics(evaluation: Mapping[str, Any]) -> Row:
    """Return the metrics of an evaluation as every table, file and tracker shows them.

    A median or quartile of a norm is over the images that the attack broke, and None if these are fewer than MIN_FOR_MEDIAN.

    Args:
        evaluation: an entry of run.json's ``evaluations``.

    Returns:
        Its metrics, with ``norm``, which the attack minimises ("l2" or "linf"; None for an attack within a budget), and
        ``broken``, the number of images that were classified correctly and that it broke (None in records that lack the
        rates it follows from).
    """
    metrics = dict(evaluation["metrics"])
    broken = None
    if "clean_accuracy" in metrics and "success_rate" in metrics:
        broken = round(metrics["success_rate"] * round(metrics["clean_accuracy"] * evaluation["n"]))
    if broken is None or broken < MIN_FOR_MEDIAN:
        metrics |= dict.fromkeys((k for k in metrics if k.endswith(("_median", "_q25", "_q75"))), None)
    return {**metrics, "norm": (metrics.get("curve") or {}).get("norm"), "broken": broken}


def differences(record: Mapping[str, Any], reference: str) -> list[Row]:
    """Accuracy of every other model of its architecture less the reference's, paired by replicate, with a 95 % interval over
    the seeds.

    ``resolved`` says whether the interval leaves out 0: the difference is larger than what seeds alone make (Student's t over
    the paired differences; with three seeds that takes 2.5 standard deviations of them). Not corrected for the number of
    comparisons.
    """
    experiment = experiment_of(record)
    if experiment.seeds < 2:
        return []
    cells = {
        key: {r: e["metrics"]["accuracy"] for r, e in replicates.items()} for key, replicates in by_seed(record).items()
    }
    return [
        {"model": model, "reference": reference, "threat_model": threat, "attack": attack, **found}
        for (model, threat, attack), found in _less(experiment, cells, reference)
    ]


def _less(
    experiment: Experiment, cells: Mapping[Any, Mapping[int, float]], reference: str
) -> Iterator[tuple[Any, Row]]:
    """(key, :func:`_paired` with the reference's value of the same key) of each other model of its architecture; a key is
    (model, ...)."""
    firsts = experiment.first_replicates()
    for key, ours in cells.items():
        model, *rest = key
        if model == reference or firsts[model].arch != firsts[reference].arch:
            continue
        if found := _paired(ours, cells.get((reference, *rest), {})):
            yield key, found


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Row:
    """Difference of two models that have a value for each replicate; empty with fewer than two in common."""
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return {}
    values = [ours[r] - theirs[r] for r in common]
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    # Student's t; scipy.stats has it too, but takes seconds to import
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * sd / len(values) ** 0.5
    return {"seeds": len(values), "difference": mean, "half_width": half, "resolved": abs(mean) > half}


def _worst_by_seed(record: Mapping[str, Any]) -> dict[tuple[str, str, float, str], dict[int, float]]:
    """(model as named in the recipe, norm, eps, threat model) -> replicate -> accuracy in the worst case."""
    replicates = experiment_of(record).replicates()
    out: dict[tuple[str, str, float, str], dict[int, float]] = {}
    for w in record.get("worst_case") or []:
        base, replicate = replicates[w["model"]]
        out.setdefault((base, w["norm"], w["eps"], w["threat_model"]), {})[replicate] = w["accuracy"]
    return out


def worst_over_seeds(record: Mapping[str, Any]) -> list[Row]:
    """Mean and spread of the worst case over the replicates of each model; empty for a run of one seed."""
    if experiment_of(record).seeds < 2:
        return []
    return [
        {"model": base, "norm": norm, "eps": eps, "threat_model": threat, **spread(list(found.values()))}
        for (base, norm, eps, threat), found in _worst_by_seed(record).items()
    ]


def worst_differences(record: Mapping[str, Any], reference: str) -> list[Row]:
    """:func:`differences` of the worst case over what was made on each model itself, with norm and eps in place of the attack."""
    experiment = experiment_of(record)
    if experiment.seeds < 2:
        return []
    return [
        {"model": model, "reference": reference, "threat_model": threat, "norm": norm, "eps": eps, **found}
        for (model, norm, eps, threat), found in _less(experiment, _worst_by_seed(record), reference)
        if threat == "white_box"
    ]
