"""From adversarial examples to numbers: nothing an attack says is believed, everything is measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.attacks.spec import AttackSpec
from components.evaluation.judge import Columns, largest_norm
from components.evaluation.statistics import wilson_interval

Budgets = Mapping[str, Sequence[float]]
"""Norm ("l2", "linf") -> values of eps at which accuracy is reported."""

_MNIST: Budgets = {"l2": (1.5,), "linf": (0.3,)}
_CIFAR10: Budgets = {"l2": (0.5,), "linf": (8 / 255,)}
_IMAGENET: Budgets = {"l2": (3.0,), "linf": (4 / 255,)}  # l2: Engstrom et al.'s robustness library, 2019
_ALL: Budgets = {norm: sorted({*_MNIST[norm], *_CIFAR10[norm], *_IMAGENET[norm]}) for norm in ("l2", "linf")}

_CURVE_POINTS = 101


def usual_budgets(channels: int, image_size: int) -> Budgets:
    """The field's usual budgets: MNIST (grey), CIFAR-10 (RGB up to 64 pixels) or ImageNet (larger RGB)."""
    if channels == 1:
        return _MNIST
    return _CIFAR10 if image_size <= 64 else _IMAGENET


def usual_eps(channels: int, image_size: int, norm: str) -> float:
    """The first of :func:`usual_budgets` in a norm ("l2", "linf")."""
    return usual_budgets(channels, image_size)[norm][0]


def summarize(
    columns: Columns, spec: AttackSpec | None, seconds: float, *, budgets: Budgets | None = None
) -> dict[str, Any]:
    """The ``metrics`` of one evaluation, in JSON types; docs/records.md says what each key means.

    Args:
        columns: what :func:`judge` returned, of all samples.
        spec: the attack, or None for clean images (``adversarial`` being the clean images themselves).
        seconds: what the attack took.
        budgets: where minimal-norm attacks report accuracy; default: every usual budget of the attack's norm.

    Raises:
        ValueError: no samples.
    """
    label, n = columns["label"], len(columns["label"])
    if not n:
        raise ValueError("no samples to summarize")
    right_before = columns["clean_prediction"] == label
    right = columns["adversarial_prediction"] == label
    success = right_before & ~right
    low, high = wilson_interval(int(right.sum()), n)
    metrics: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_rounded": float((columns["rounded_prediction"] == label).mean()),
        "clean_accuracy": float(right_before.mean()),
        # where no sample was right there was nothing to break
        "success_rate": float(success.sum() / max(int(right_before.sum()), 1)),
    }
    for norm in ("l2", "linf"):
        q25, median, q75 = (
            np.quantile(columns[norm][success], (0.25, 0.5, 0.75)).tolist() if success.any() else [None] * 3
        )
        metrics |= {f"{norm}_median": median, f"{norm}_q25": q25, f"{norm}_q75": q75}
    metrics["seconds"] = float(seconds)
    if spec is not None and spec.kind == "minimal_norm":
        assert spec.norm is not None
        norms = columns[spec.norm]
        at = (_ALL if budgets is None else budgets)[spec.norm]

        def survivors(eps: float) -> int:
            return int((right_before & (right | (norms > eps))).sum())

        grid = np.linspace(0, max([*norms[success], *at, 0.0]), _CURVE_POINTS).tolist()
        metrics["curve"] = {"norm": spec.norm, "eps": grid, "accuracy": [survivors(eps) / n for eps in grid]}
        left = {f"{spec.norm}<={eps:.4g}": survivors(eps) for eps in at}
        metrics["accuracy_at_budget"] = {budget: count / n for budget, count in left.items()}
        metrics["accuracy_at_budget_interval"] = {b: list(wilson_interval(count, n)) for b, count in left.items()}
    return metrics


def worst_case(evaluations: Sequence[Columns], norm: str, eps: float) -> np.ndarray[Any, Any]:
    """Bool [N]: samples that are right on the clean image and on every example whose norm is at most ``eps``.

    Every example counts where it lies, whatever attack made it and whatever budget it was made for.

    Args:
        evaluations: what :func:`judge` returned for one model, at least one; with ``index``, where that is recorded.
        norm: "l2" or "linf".
        eps: in [0,1] pixel units; the attacks' own tolerance (``verify_examples``) is granted here too.

    Raises:
        ValueError: no evaluation, or evaluations of different samples.
    """
    if not evaluations:
        raise ValueError("no evaluations")
    first = evaluations[0]
    key = "index" if "index" in first else "label"
    robust: np.ndarray[Any, Any] = first["clean_prediction"] == first["label"]
    limit = largest_norm(norm, eps)
    for columns in evaluations:
        if not np.array_equal(columns[key], first[key]):
            raise ValueError("the evaluations are not of the same samples")
        robust = robust & ((columns["adversarial_prediction"] == columns["label"]) | (columns[norm] > limit))
    return robust


def broken(columns: Columns, norm: str, eps: float) -> np.ndarray[Any, Any]:
    """Bool [N]: misclassified by an example within eps, or before any attack."""
    broken: np.ndarray[Any, Any] = ~worst_case([columns], norm, eps)
    return broken
