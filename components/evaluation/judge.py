"""Verification of adversarial examples and the model's predictions on them."""

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
"""How far a linf norm may exceed eps: absolute, but at most eps itself."""
L2_TOLERANCE = 1e-5
"""How far an L2 norm may exceed eps (relative)."""

Columns = Mapping[str, np.ndarray[Any, Any]]
"""Columns of equal length: the "judged rows" of docs/records.md."""


def largest_norm(norm: str, eps: float) -> float:
    """Return the largest norm that an example of budget ``eps`` may have, rounding included."""
    return eps + min(LINF_TOLERANCE, eps) if norm == "linf" else eps * (1 + L2_TOLERANCE)


class AttackViolation(UserError):
    """An attack returned an example that breaks the attack's own rules. Do not use its results."""


def verify_examples(
    clean: Tensor, adversarial: Tensor, indices: Sequence[int] | np.ndarray[Any, Any] | Tensor, spec: AttackSpec
) -> None:
    """Check that examples are what ``spec`` allows. Norms are computed in float64.

    Args:
        clean: float32 [N,C,H,W] in [0,1].
        adversarial: the examples that the attack returned for ``clean``.
        indices: N sample numbers, for the message.
        spec: the attack.

    Raises:
        AttackViolation: the shape or dtype is wrong, or an example is not finite, leaves [0,1] or
            has a norm above eps (tolerance: linf 1e-6 but at most eps, L2 1e-5 relative). The
            message names the attack, the worst sample and its excess.
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
        model: maps [0,1] images to logits. Put it into eval mode first.
        clean: float32 [N,C,H,W] in [0,1].
        adversarial: the same shape. Verify the examples first.
        labels: int64 [N], true classes.

    Returns:
        Columns of N rows. ``label``, ``clean_prediction``, ``adversarial_prediction`` and
        ``rounded_prediction`` (of the example rounded to 8 bits) are int32 class numbers. A
        prediction is -1 (no class, so wrong) if the largest logit is not finite, as with any NaN.
        ``l2`` and ``linf`` are float64 norms of adversarial - clean.
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
