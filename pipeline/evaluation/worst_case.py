"""Worst case per sample over all attacks on a model, from the records of its evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.metrics import standard_budgets, worst_case
from components.evaluation.statistics import mcnemar, wilson_interval
from components.threat_models import ANY, DIRECT, WHITE_BOX
from pipeline.evaluation.chunks import read_chunks
from pipeline.runtime.storage import Storage

Columns = dict[str, Any]


class EvaluationRecords:
    """The records of a run's evaluations, each read once."""

    def __init__(self, root: Storage, evaluations: Sequence[dict[str, Any]], chunk_size: int) -> None:
        self.root, self.evaluations, self.chunk_size = root, evaluations, chunk_size
        self._columns_of: dict[str, Columns] = {}

    def of(self, model: str) -> list[tuple[dict[str, Any], Columns]]:
        """Return each attack on a model, without clean images, as (evaluation, its columns)."""
        return [(e, self._columns(e)) for e in self.evaluations if e["model"] == model and e["attack"] != "none"]

    def _columns(self, e: dict[str, Any]) -> Columns:
        if e["path"] not in self._columns_of:
            chunks = -(-e["n"] // self.chunk_size)
            self._columns_of[e["path"]] = read_chunks(self.root / e["path"], chunks)
        return self._columns_of[e["path"]]


def budgets(experiment: Experiment) -> list[tuple[str, float]]:
    """List (norm, eps) of the worst cases. Minimal-norm attacks have the standard eps."""
    usual = standard_budgets(experiment.data.channels, experiment.data.image_size)
    pairs: set[tuple[str, float]] = set()
    for spec in map(AttackSpec.parse, experiment.evaluation.attacks):
        assert spec.norm is not None
        if spec.name != "noise":
            allowed = usual.get(spec.norm, ()) if spec.eps is None else (spec.eps,)
            pairs |= {(spec.norm, eps) for eps in allowed}
    return sorted(pairs)


def worst_cases(models: Iterable[str], experiment: Experiment, judgements: EvaluationRecords) -> list[dict[str, Any]]:
    """Compute the accuracy under the most harmful example of each sample within a budget.

    Returns:
        For each model and budget {model, threat_model, norm, eps, n, accuracy, accuracy_low,
        accuracy_high, attacks}. "white_box" takes the examples made on the model itself, with or
        without gradients; "any" takes transferred examples too.
    """
    entries = []
    for model in models:
        for case in _cases(experiment):
            robust, attacks = _withstands(model, judgements, **case)
            if robust is None:
                continue
            low, high = wilson_interval(int(robust.sum()), len(robust))
            entries.append(
                {
                    "model": model,
                    **case,
                    "n": len(robust),
                    "accuracy": float(robust.mean()),
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "attacks": attacks,
                }
            )
    return entries


def paired_worst_cases(
    pairs: Iterable[tuple[str, str]], experiment: Experiment, judgements: EvaluationRecords
) -> list[dict[str, Any]]:
    """Compare the worst cases of two models sample by sample (exact McNemar test).

    Args:
        pairs: (model, model that it is compared with), both of the run.

    Returns:
        {model, against, threat_model, norm, eps, n, only_model, only_against, p} for each pair,
        budget and threat model that both have.
    """
    entries = []
    for model, against in pairs:
        for case in _cases(experiment):
            first, second = (_withstands(m, judgements, **case)[0] for m in (model, against))
            if first is None or second is None:
                continue
            entries.append(
                {
                    "model": model,
                    "against": against,
                    **case,
                    "n": len(first),
                    "only_model": int((first & ~second).sum()),
                    "only_against": int((second & ~first).sum()),
                    "p": mcnemar(first, second),
                }
            )
    return entries


def _cases(experiment: Experiment) -> list[dict[str, Any]]:
    return [
        {"threat_model": threat_model, "norm": norm, "eps": eps}
        for norm, eps in budgets(experiment)
        for threat_model in (WHITE_BOX, ANY)
    ]


def _withstands(
    model: str, judgements: EvaluationRecords, *, threat_model: str, norm: str, eps: float
) -> tuple[np.ndarray[Any, Any] | None, int]:
    """Return the samples, bool [N], that no example breaks, and the number of evaluations.

    The samples are None if the threat model has no evaluations of its own.
    """
    judged = judgements.of(model)
    if threat_model != ANY:
        judged = [(e, columns) for e, columns in judged if e["threat_model"] in DIRECT]
    if not judged or (threat_model == ANY and all(e["threat_model"] in DIRECT for e, _ in judged)):
        return None, 0
    # transfer and transfer:NAME may be the same examples on the same model, judged once.
    return worst_case([columns for _, columns in judged], norm, eps), len({e["path"] for e, _ in judged})
