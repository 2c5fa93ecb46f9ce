"""What several evaluations say together: over the seeds, against a reference, and beside the paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.errors import ConfigError
from components.fields import from_dict
from pipeline import paper

Row = dict[str, Any]
CONFIDENCE = 0.95
MIN_FOR_MEDIAN = 10
"""Fewest images of which a report shows a median or quartile. That of fewer describes those images, not the attack."""


def experiment_of(record: Mapping[str, Any]) -> Experiment:
    """The config of a run out of its record."""
    return from_dict(Experiment, record["experiment"])


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
    firsts = experiment.firsts()
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


def references(record: Mapping[str, Any], roles: Mapping[str, str]) -> list[str]:
    """Models that others of their architecture are compared with, as named in the recipe: of each architecture the first
    control, and what the paper calls ours (``defend``, or ``defend-ARCH`` where a table has several); where no model is named
    so, the first Defend++, or the first defended one."""
    experiment = experiment_of(record)
    role = {base: roles[name] for name, base in experiment.bases().items()}
    firsts = experiment.firsts()
    out = []
    for arch in dict.fromkeys(config.arch for config in firsts.values()):
        here = [base for base, config in firsts.items() if config.arch == arch]
        defended = [base for base in here if role[base] == "defended"]
        ours = [base for base in defended if firsts[base].defense == "defend++"]
        named = [base for base in ours if base.partition("-")[0] == "defend"]
        out += [base for base in here if role[base] == "control"][:1]
        out += (named or ours or defended)[:1]
    return out


def pairs(record: Mapping[str, Any], roles: Mapping[str, str]) -> list[tuple[str, str]]:
    """(model, what it is compared with): each model and the :func:`references` of its architecture, of the same replicate."""
    experiment = experiment_of(record)
    variants, replicates = experiment.variants(), experiment.replicates()
    named = {found: name for name, found in replicates.items()}
    compared = references(record, roles)
    out = []
    for i, reference in enumerate(compared):
        for name, (base, replicate) in replicates.items():
            against = named[reference, replicate]
            # a pair of references is told once
            if base not in compared[: i + 1] and variants[name].arch == variants[against].arch:
                out.append((name, against))
    return out


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


def beside_paper(record: Mapping[str, Any]) -> list[Row]:
    """Each cell of the paper's table with all that this run has for it.

    A recipe's model is named as the paper's row (``pipeline/paper.py``), with ``-ARCH`` behind it where a table has several.
    The paper says "white-box" of all its columns; some can only be transfer (docs/evaluation.md), so both stand here.

    Returns:
        One entry per printed number: where, row, column, arch, made_on, paper (text as printed), note, ours: a list of
        {model, arch (as built), threat_model, attack, n, low, high, seeds, mean, sd, min, max}; ``ours`` is empty where the
        run has nothing.
    """
    experiment = experiment_of(record)
    if not experiment.paper:
        return []
    built = {base: config.arch for base, config in experiment.firsts().items()}
    archs = {base: arch.removesuffix("_bn") for base, arch in built.items()}
    cells = by_seed(record)
    out = []
    for printed in paper.printed(experiment.paper):
        entry: Row = {
            "where": printed.where,
            "row": printed.row,
            "title": printed.printed_row,
            "column": printed.column,
            "arch": printed.arch,
            "made_on": printed.made_on,
            "paper": printed.text,
            "note": printed.note,
            "ours": [],
        }
        for (base, threat, attack), found in cells.items():
            if not _is_row(printed.row, base.partition("-")[0], threat):
                continue
            if archs[base] != printed.arch or _column(threat, attack) != printed.column:
                continue
            if printed.made_on and not _made_on(threat, printed.made_on, archs, base):
                continue
            if not printed.made_on and ":" in threat:
                continue
            ours = list(found.values())
            metrics = [e["metrics"] for e in ours]
            entry["ours"].append(
                {
                    "model": base,
                    "arch": built[base],
                    "threat_model": threat,
                    "attack": attack,
                    "n": ours[0]["n"],
                    "low": min(m["accuracy_low"] for m in metrics),
                    "high": max(m["accuracy_high"] for m in metrics),
                    **spread([m["accuracy"] for m in metrics]),
                }
            )
        out.append(entry)
    return out


def _is_row(printed_row: str, row: str, threat: str) -> bool:
    """Whether evaluations of a model named ``row`` under a threat model belong to a row of the paper."""
    if printed_row == "comdefend":  # grey-box; the white-box one has a row of its own
        return row == "comdefend" and threat != "white_box"
    if printed_row == "comdefend_wb":
        return row == "comdefend" and threat in ("clean", "white_box")
    if printed_row == "shared4":  # "ours is equivalent to 4 shared blocks"
        return row == "defend"
    return row == printed_row


def _column(threat: str, attack: str) -> str:
    """The attack by the name that a column of the paper would have; empty where it could have none."""
    if threat == "clean":
        return "clean"
    if threat == "random":
        return ""
    try:
        spec = AttackSpec.parse(attack)
    except ConfigError:  # an attack of another version
        return ""
    return spec.short_name  # with another norm or a target it is no column of the paper's


def _made_on(threat: str, arch: str, archs: Mapping[str, str], base: str) -> bool:
    """Whether examples of this threat model are made on a network of that architecture (tables 7 and 8)."""
    if threat == "clean":
        return True
    if threat in ("white_box", "transfer"):
        return archs[base] == arch
    named = threat.partition(":")[2]
    return bool(named) and named != base and archs.get(named) == arch
