"""What the evaluations of a model say together: the worst case per sample, and whether the attacks could find anything at all.

Both come from records; what is measured besides (the probe and the active test of docs/reliability.md) runs as Ray tasks, one file
each under ``reliability/``, so that what is done is never done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.metrics import usual_budgets, worst_case
from components.evaluation.statistics import mcnemar, wilson_interval
from components.threat_models import ANY, DIRECT, WHITE_BOX
from pipeline.evaluation.chunks import read_chunks
from pipeline.runtime.storage import Storage

Columns = dict[str, Any]


class EvaluationRecords:
    """The records of a run's evaluations, each read once."""

    def __init__(self, root: Storage, evaluations: Sequence[dict[str, Any]], chunk_size: int) -> None:
        self.root, self.evaluations, self.chunk_size = root, evaluations, chunk_size
        self._read: dict[str, Columns] = {}

    def of(self, model: str) -> list[tuple[dict[str, Any], Columns]]:
        """(evaluation, its columns) for every attack that a model was judged under; clean images are none."""
        return [(e, self._columns(e)) for e in self.evaluations if e["model"] == model and e["attack"] != "none"]

    def _columns(self, e: dict[str, Any]) -> Columns:
        if e["path"] not in self._read:
            chunks = -(-e["n"] // self.chunk_size)
            self._read[e["path"]] = read_chunks(self.root / e["path"], chunks)
        return self._read[e["path"]]


def budgets(experiment: Experiment) -> list[tuple[str, float]]:
    """(norm, eps) at which a worst case is told: the attacks' own, and the usual one of a norm that a minimal-norm attack has."""
    usual = usual_budgets(experiment.data.channels, experiment.data.image_size)
    found: dict[tuple[str, float], None] = {}
    for text in experiment.evaluation.attacks:
        spec = AttackSpec.parse(text)
        assert spec.norm is not None
        if spec.name == "noise":
            continue
        for eps in usual.get(spec.norm, ()) if spec.eps is None else (spec.eps,):
            found[spec.norm, eps] = None
    return sorted(found)


def worst_cases(models: Iterable[str], experiment: Experiment, judgements: EvaluationRecords) -> list[dict[str, Any]]:
    """Accuracy when, for every sample, the most harmful example of all attacks counts whose norm is within the budget.

    Returns:
        For each model and budget {model, threat_model, norm, eps, n, accuracy, accuracy_low, accuracy_high, attacks}: "white_box"
        over what was made on the model itself (with or without gradients), "any" over transferred examples too.
    """
    out = []
    for model in models:
        for norm, eps in budgets(experiment):
            for threat in (WHITE_BOX, ANY):
                robust, attacks = _withstands(model, norm, eps, threat, judgements)
                if robust is None:
                    continue
                low, high = wilson_interval(int(robust.sum()), len(robust))
                out.append(
                    {
                        "model": model,
                        "threat_model": threat,
                        "norm": norm,
                        "eps": eps,
                        "n": len(robust),
                        "accuracy": float(robust.mean()),
                        "accuracy_low": low,
                        "accuracy_high": high,
                        "attacks": attacks,
                    }
                )
    return out


def paired_worst_cases(
    pairs: Iterable[tuple[str, str]], experiment: Experiment, judgements: EvaluationRecords
) -> list[dict[str, Any]]:
    """Whether one model withstands more samples than another in the worst case (exact McNemar test over the samples).

    Args:
        pairs: (model, the one that it is compared with), both of the run.

    Returns:
        {model, against, threat_model, norm, eps, n, only_model, only_against, p} for each pair, budget and threat model that
        both have.
    """
    out = []
    for model, against in pairs:
        for norm, eps in budgets(experiment):
            for threat in (WHITE_BOX, ANY):
                first, second = (_withstands(m, norm, eps, threat, judgements)[0] for m in (model, against))
                if first is None or second is None:
                    continue
                out.append(
                    {
                        "model": model,
                        "against": against,
                        "threat_model": threat,
                        "norm": norm,
                        "eps": eps,
                        "n": len(first),
                        "only_model": int((first & ~second).sum()),
                        "only_against": int((second & ~first).sum()),
                        "p": mcnemar(first, second),
                    }
                )
    return out


def _withstands(
    model: str, norm: str, eps: float, threat: str, judgements: EvaluationRecords
) -> tuple[np.ndarray[Any, Any] | None, int]:
    """Bool [N]: the samples that no example of a threat model breaks, and over how many evaluations; None where there is none."""
    judged = judgements.of(model)
    taken = [(e, c) for e, c in judged if threat == ANY or e["threat_model"] in DIRECT]
    if not taken or (threat == ANY and all(e["threat_model"] in DIRECT for e, _ in taken)):
        return None, 0
    # transfer and transfer:NAME may be the same examples on the same model, judged once
    return worst_case([c for _, c in taken], norm, eps), len({e["path"] for e, _ in taken})
