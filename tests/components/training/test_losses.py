"""Eq. 3 against NumPy, in both readings of its squared norm."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from components.training.losses import reconstruction_loss, reconstruction_terms

Reduction = Literal["mean", "sum"]


def pairs(levels: int = 3, channels: int = 3, n: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rng = np.random.default_rng(1)
    shapes = [(n, channels, 8 // 2**m, 8 // 2**m) for m in range(levels)]
    return (
        [torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes],
        [torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes],
    )


def eq3(outputs: list[torch.Tensor], targets: list[torch.Tensor], lam: float, reduction: Reduction) -> float:
    """|r_0|^2 + lam * sum_{m>=1} |r_m|^2, image by image, then the mean over the batch."""
    total = 0.0
    for i in range(len(outputs[0])):
        for m, (o, t) in enumerate(zip(outputs, targets, strict=True)):
            r = o[i].numpy().astype(np.float64) - t[i].numpy().astype(np.float64)
            squared = float((r**2).sum())
            if reduction == "mean":
                squared /= r.size
            total += squared * (1.0 if m == 0 else lam)
    return total / len(outputs[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("lam", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_equation_3(reduction: Reduction, lam: float, levels: int) -> None:
    outputs, targets = pairs(levels)
    terms = reconstruction_terms(outputs, targets, reduction)
    assert len(terms) == levels
    assert float(reconstruction_loss(terms, lam)) == pytest.approx(eq3(outputs, targets, lam, reduction), rel=1e-6)


def test_mean_and_sum_differ_by_the_number_of_values() -> None:
    outputs, targets = pairs()
    mean, total = (reconstruction_terms(outputs, targets, r) for r in ("mean", "sum"))
    for m, values in enumerate((3 * 8 * 8, 3 * 4 * 4, 3 * 2 * 2)):
        assert float(total[m]) == pytest.approx(values * float(mean[m]), rel=1e-6)


def test_lambda_zero_is_level_zero_alone() -> None:
    outputs, targets = pairs()
    terms = reconstruction_terms(outputs, targets, "mean")
    assert float(reconstruction_loss(terms, 0.0)) == float(terms[0])
    assert float(reconstruction_loss(terms, 0.01)) > float(terms[0])


def test_without_multi_scale_targets_only_level_0_counts() -> None:
    """w/o MS-LP: the decoder gives all levels, one has a target."""
    outputs, targets = pairs()
    terms = reconstruction_terms(outputs, targets[:1], "mean")
    assert len(terms) == 1
    assert float(reconstruction_loss(terms, 5.0)) == pytest.approx(eq3(outputs[:1], targets[:1], 5.0, "mean"), rel=1e-6)


def test_a_target_of_another_shape_is_an_error_not_a_broadcast() -> None:
    outputs, targets = pairs()
    with pytest.raises(ValueError, match=r"level 1: output \(5, 3, 4, 4\) against target \(5, 1, 4, 4\)"):
        reconstruction_terms(outputs, [targets[0], targets[1][:, :1], targets[2]], "mean")
    with pytest.raises(ValueError, match="level 0"):
        reconstruction_terms(outputs, [targets[0][:1]], "mean")


def test_gradient() -> None:
    """d L / d o_m = weight_m * 2 (o_m - t_m) / (batch or number of values)."""
    outputs, targets = pairs()
    leaves = [o.clone().requires_grad_() for o in outputs]
    reconstruction_loss(reconstruction_terms(leaves, targets, "sum"), 0.01).backward()
    for m, leaf in enumerate(leaves):
        weight = 1.0 if m == 0 else 0.01
        torch.testing.assert_close(leaf.grad, weight * 2 * (outputs[m] - targets[m]) / 5)


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    outputs = [torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)]
    (term,) = reconstruction_terms(outputs, [torch.full((1, 1, 64, 64), 1.001)], "sum")
    assert term.dtype == torch.float32
    assert float(term) == pytest.approx(4096 * 1e-6, rel=1e-3)  # 1.001 is 1 in bfloat16
