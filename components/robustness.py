"""From adversarial examples to numbers: nothing an attack says is believed, everything is measured again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks.common import predicted_classes
from components.attacks.spec import AttackSpec
from components.errors import UserError
from components.precision import true_float32

LINF_TOLERANCE = 1e-6
"""How far a linf norm may exceed eps: absolute, but by no more than eps itself."""
L2_TOLERANCE = 1e-5
"""How far an L2 norm may exceed eps (relative)."""

Columns = Mapping[str, np.ndarray[Any, Any]]
"""Columns of equal length; see "judged rows" in docs/records.md."""
Budgets = Mapping[str, Sequence[float]]
"""Norm ("l2", "linf") -> values of eps at which accuracy is reported."""

_MNIST: Budgets = {"l2": (1.5,), "linf": (0.3,)}
_CIFAR10: Budgets = {"l2": (0.5,), "linf": (8 / 255,)}
_IMAGENET: Budgets = {"l2": (3.0,), "linf": (4 / 255,)}  # l2: Engstrom et al.'s robustness library, 2019
_ALL: Budgets = {norm: sorted({*_MNIST[norm], *_CIFAR10[norm], *_IMAGENET[norm]}) for norm in ("l2", "linf")}

_CURVE_POINTS = 101
_Z95 = 1.959963984540054


def largest_norm(norm: str, eps: float) -> float:
    """Return the largest norm ("l2", "linf") that an example of budget ``eps`` may have, for rounding."""
    return eps + min(LINF_TOLERANCE, eps) if norm == "linf" else eps * (1 + L2_TOLERANCE)


class AttackViolation(UserError):
    """An attack returned something that is no example within its own rules. Its results must not be used."""


def verify_examples(
    clean: Tensor, adversarial: Tensor, indices: Sequence[int] | np.ndarray[Any, Any] | Tensor, spec: AttackSpec
) -> None:
    """Check that examples are what ``spec`` allows; norms are computed in float64.

    Args:
        clean: float32 [N,C,H,W] in [0,1].
        adversarial: what the attack returned for ``clean``.
        indices: N sample numbers, to name the culprit by.

    Raises:
        AttackViolation: wrong shape or dtype, not finite, outside [0,1], or norm > eps (tolerance: linf 1e-6 but
            at most eps, L2 1e-5 relative). Names the attack, the worst sample and its excess.
    """
    if adversarial.shape != clean.shape or adversarial.dtype != torch.float32:
        raise AttackViolation(
            f"{spec} returned {adversarial.dtype} {list(adversarial.shape)}, not float32 {list(clean.shape)}"
        )
    if not len(clean):
        return
    flat = adversarial.flatten(1)
    bad = ~flat.isfinite().all(dim=1)
    if bad.any():
        _violation(spec, indices, int(bad.int().argmax()), "has pixels that are not finite")
    outside = torch.maximum(-flat, flat - 1).amax(dim=1).double()
    worst = int(outside.argmax())
    if outside[worst] > 0:
        _violation(spec, indices, worst, f"leaves [0,1] by {outside[worst].item():.3g}")
    if spec.eps is None:
        return
    l2, linf = _norms(clean, adversarial)
    norm = linf if spec.norm == "linf" else l2
    worst = int(norm.argmax())
    if norm[worst] > largest_norm(str(spec.norm), spec.eps):
        excess = norm[worst] - spec.eps
        _violation(spec, indices, worst, f"has {spec.norm} norm {norm[worst]:.9g}, {excess:.3g} over eps={spec.eps}")


def _violation(spec: AttackSpec, indices: Sequence[int] | np.ndarray[Any, Any] | Tensor, row: int, what: str) -> None:
    raise AttackViolation(f"{spec}: the example of sample {int(indices[row])} {what}")


def _norms(clean: Tensor, adversarial: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    delta = (adversarial.double() - clean.double()).flatten(1)
    l2 = torch.linalg.vector_norm(delta, dim=1)
    linf = torch.linalg.vector_norm(delta, ord=math.inf, dim=1)
    return l2.cpu().numpy(), linf.cpu().numpy()


@true_float32()
def judge(model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Judge examples by fresh forward passes in true float32, whatever the process has switched on.

    Args:
        model: maps [0,1] images to logits; eval mode is the caller's duty.
        clean: float32 [N,C,H,W] in [0,1].
        adversarial: the same shape; verify them first.
        labels: int64 [N], true classes.

    Returns:
        Columns of N rows: ``label``, ``clean_prediction``, ``adversarial_prediction``, ``rounded_prediction`` (the
        example rounded to 8 bits), all int32: class numbers, or -1 (no class, so wrong) where the largest logit is not
        finite, as with any NaN; ``l2``, ``linf`` of adversarial - clean, float64.
    """
    rounded = (adversarial * 255).round() / 255
    l2, linf = _norms(clean, adversarial)
    return {
        "label": labels.cpu().numpy().astype(np.int32),
        "clean_prediction": _predict(model, clean),
        "adversarial_prediction": _predict(model, adversarial),
        "rounded_prediction": _predict(model, rounded),
        "l2": l2,
        "linf": linf,
    }


def _predict(model: nn.Module, images: Tensor) -> np.ndarray[Any, Any]:
    if not len(images):
        return np.empty(0, dtype=np.int32)
    with torch.no_grad():
        logits = model(images)
    predictions: np.ndarray[Any, Any] = predicted_classes(logits).cpu().numpy().astype(np.int32)
    return predictions


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


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927). n = 0: (0, 1), nothing is known.

    Raises:
        ValueError: successes outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is not in 0..{n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends the bound is exactly 0 or 1, rounding apart
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mcnemar(correct_a: np.ndarray[Any, Any], correct_b: np.ndarray[Any, Any]) -> float:
    """Exact two-sided p-value that two models, judged on the same samples, are equally accurate.

    Args:
        correct_a, correct_b: bool [N], the same samples in the same order.

    Raises:
        ValueError: the arrays differ in shape or are not bool.
    """
    if correct_a.shape != correct_b.shape or correct_a.dtype != bool or correct_b.dtype != bool:
        raise ValueError(
            f"two bool arrays of one shape wanted, got {correct_a.dtype} {correct_a.shape} "
            f"and {correct_b.dtype} {correct_b.shape}"
        )
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    n = only_a + only_b
    # binomial tail in exact integers: floats would underflow beyond n = 1074
    tail = term = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return float(min(1.0, 2 * tail / 2**n))
