"""Accuracy and norms of adversarial examples, from the columns of judged examples."""

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
_IMAGENET: Budgets = {"l2": (3.0,), "linf": (4 / 255,)}
"""L2: the robustness library of Engstrom et al., 2019."""
_ALL: Budgets = {norm: sorted({*_MNIST[norm], *_CIFAR10[norm], *_IMAGENET[norm]}) for norm in ("l2", "linf")}

_CURVE_POINTS = 101

Mask = np.ndarray[Any, Any]
"""Bool [N]."""


def standard_budgets(channels: int, image_size: int) -> Budgets:
    """Return the budgets of MNIST (grey), CIFAR-10 (RGB up to 64 pixels) or ImageNet (larger)."""
    if channels == 1:
        return _MNIST
    return _CIFAR10 if image_size <= 64 else _IMAGENET


def standard_eps(channels: int, image_size: int, norm: str) -> float:
    """Return the first of :func:`standard_budgets` in a norm ("l2", "linf")."""
    return standard_budgets(channels, image_size)[norm][0]


def summarize(
    columns: Columns, spec: AttackSpec | None, seconds: float, *, budgets: Budgets | None = None
) -> dict[str, Any]:
    """Return the ``metrics`` of one evaluation, in JSON types; docs/records.md explains each key.

    Args:
        columns: the columns of :func:`judge`, for all samples.
        spec: the attack; None for clean images, which are then their own "adversarial" examples.
        seconds: time that the attack took.
        budgets: eps at which the accuracy under minimal-norm attacks is reported; default: every
            standard budget of the attack's norm.

    Raises:
        ValueError: there are no samples.
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
        # The rate is 0 if no sample was right before: then nothing can be broken.
        "success_rate": float(success.sum() / max(int(right_before.sum()), 1)),
    }
    for norm in ("l2", "linf"):
        quantiles = np.quantile(columns[norm][success], (0.25, 0.5, 0.75)).tolist() if success.any() else [None] * 3
        metrics |= dict(zip((f"{norm}_q25", f"{norm}_median", f"{norm}_q75"), quantiles, strict=True))
    metrics["seconds"] = float(seconds)
    if spec is not None and spec.kind == "minimal_norm":
        assert spec.norm is not None
        eps = (_ALL if budgets is None else budgets)[spec.norm]
        metrics |= _minimal_norm_metrics(columns, spec.norm, right_before, right, eps)
    return metrics


def _minimal_norm_metrics(
    columns: Columns, norm: str, right_before: Mask, right: Mask, budgets: Sequence[float]
) -> dict[str, Any]:
    """Return the accuracy over the norm allowed, as a curve and at each budget.

    Args:
        columns: the judged samples.
        norm: the norm that the attack minimises.
        right_before: bool [N], whether the clean image is classified correctly.
        right: bool [N], whether the example is.
        budgets: values of eps.
    """
    n, norms = len(right), columns[norm]
    largest = max([*norms[right_before & ~right], *budgets, 0.0])
    grid = np.linspace(0, largest, _CURVE_POINTS).tolist()

    def survivors(eps: float) -> int:
        return int((right_before & (right | (norms > eps))).sum())

    counts = {f"{norm}<={eps:.4g}": survivors(eps) for eps in budgets}
    return {
        "curve": {"norm": norm, "eps": grid, "accuracy": [survivors(eps) / n for eps in grid]},
        "accuracy_at_budget": {budget: count / n for budget, count in counts.items()},
        "accuracy_at_budget_interval": {budget: list(wilson_interval(count, n)) for budget, count in counts.items()},
    }


def worst_case(evaluations: Sequence[Columns], norm: str, eps: float) -> Mask:
    """Find the samples that are right on the clean image and on every example within ``eps``.

    An example counts by its own norm, whatever attack made it and whatever budget it was made for.

    Args:
        evaluations: the columns of :func:`judge` for one model, at least one evaluation. Columns
            that have an ``index`` are compared by it.
        norm: "l2" or "linf".
        eps: in [0,1] pixel units. The tolerance of ``verify_examples`` holds here too.

    Returns:
        Bool [N].

    Raises:
        ValueError: there is no evaluation, or evaluations have different samples.
    """
    if not evaluations:
        raise ValueError("no evaluations")
    first = evaluations[0]
    key = "index" if "index" in first else "label"
    robust: Mask = first["clean_prediction"] == first["label"]
    limit = largest_norm(norm, eps)
    for columns in evaluations:
        if not np.array_equal(columns[key], first[key]):
            raise ValueError("the evaluations are not of the same samples")
        robust = robust & ((columns["adversarial_prediction"] == columns["label"]) | (columns[norm] > limit))
    return robust


def broken(columns: Columns, norm: str, eps: float) -> Mask:
    """Return bool [N]: samples misclassified without an attack or by an example within eps."""
    broken: Mask = ~worst_case([columns], norm, eps)
    return broken
