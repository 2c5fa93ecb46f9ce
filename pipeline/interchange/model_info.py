"""Measured robustness in the form of RobustBench's ``model_info``, for its tools and leaderboard.

RobustBench's own update_json writes null for what it does not know. So does this module: link, title,
authors and venue are not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from components.attacks.spec import AttackSpec
from components.evaluation.metrics import standard_eps
from components.threat_models import WHITE_BOX
from pipeline.data import hub
from pipeline.records import EvaluationEntry, RunRecord

_THREAT_MODELS = {"linf": "Linf", "l2": "L2"}
_STANDARD = AttackSpec.parse("autoattack:eps=0.1")


def model_infos(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Return file name -> content for each model that met AutoAttack at the standard budget.

    The name is ``DATASET/THREAT_MODEL/MODEL.json``, as below RobustBench's ``model_info/``. AutoAttack
    with fewer steps or queries than the standard ones does not count.
    """
    data = record.experiment.data
    infos = {}
    for evaluation in record.evaluations:
        if evaluation.threat_model != WHITE_BOX or not evaluation.attack.startswith("autoattack"):
            continue
        spec = AttackSpec.parse(evaluation.attack)
        norm, eps = str(spec.norm), float(spec.eps or 0)
        standard = math.isclose(eps, standard_eps(data.channels, data.image_size, norm), rel_tol=1e-6)
        if standard and (spec.steps, spec.queries) == (_STANDARD.steps, _STANDARD.queries):
            file = f"{dataset(data.source)}/{_THREAT_MODELS[norm]}/{evaluation.model}.json"
            infos[file] = _info(record, evaluation, eps)
    return infos


def dataset(source: str) -> str:
    """Return the data set's name as RobustBench spells it: the last name in ``data.source``.

    Images that a caller held in memory have no name: "unknown".
    """
    if source.startswith("memory:"):
        return "unknown"
    place = hub.parse(source, "data.source").repo if source.startswith(hub.PREFIX) else source.rstrip("/")
    return re.sub(r"[^a-z0-9]+", "", re.split(r"[:/]", place)[-1].lower()) or "unknown"


def _info(record: RunRecord, evaluation: EvaluationEntry, eps: float) -> dict[str, Any]:
    config = record.model_config(evaluation.model)
    trained_here = int(config["epochs"]) > 0
    clean = [
        e
        for e in record.evaluations
        if e.threat_model == "clean" and (e.model, e.n) == (evaluation.model, evaluation.n)
    ]
    return {
        "link": None,
        "name": None,
        "authors": None,
        # Models from weights of others may have seen other images.
        "additional_data": False if trained_here and not config["pretrained"] else None,
        "number_forward_passes": 1 if trained_here else None,
        "dataset": dataset(record.experiment.data.source),
        "venue": None,
        "architecture": _architecture(config),
        "eps": _eps_text(eps),
        "clean_acc": _percent(clean[0].accuracy) if clean else None,
        "reported": None,
        "autoattack_acc": _percent(evaluation.accuracy),
        "footnote": _footnote(record, evaluation),
    }


def _architecture(config: Mapping[str, Any]) -> str:
    arch = str(config["arch"])
    return arch if ":" in arch or config["width"] == 64 else f"{arch} (width {config['width']})"


def _eps_text(eps: float) -> str:
    """Return a budget as RobustBench writes it: ``8/255``, or ``0.5``."""
    levels = Fraction(eps * 255).limit_denominator(100)
    return f"{levels}/255" if levels.denominator == 1 and abs(levels - eps * 255) < 1e-4 else f"{eps:g}"


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def _footnote(record: RunRecord, evaluation: EvaluationEntry) -> str:
    """Return what a reader of the numbers must know, and RobustBench has no field for."""
    low, high = evaluation.interval
    reliability = (record.reliability or {}).get(evaluation.model)
    raised = [flag["name"] for flag in reliability.flags if flag.get("fired")] if reliability else []
    revision = f"{record.git.get('revision') or ''}{'-dirty' if record.git.get('dirty') else ''}"
    return " ".join(
        [
            f"{evaluation.n} test images; 95 % interval of autoattack_acc: {_percent(low)} to {_percent(high)}.",
            f"AutoAttack of defendpp{f' at revision {revision}' if revision else ''}, not run by RobustBench.",
            *([f"Reliability flags raised: {', '.join(raised)}."] if raised else []),
            "null: not known.",
        ]
    )
