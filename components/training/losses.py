"""Reconstruction loss of eq. 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def reconstruction_terms(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], reduction: Literal["mean", "sum"]
) -> list[Tensor]:
    """Compute each level's squared error: mean over the batch, mean or sum over values.

    Equation 3 can be read both ways.

    Args:
        outputs: reconstructed levels [N, C, W_m, W_m], level 0 first.
        targets: targets of as many levels or fewer; without the multi-scale objective, of level 0.
        reduction: over C, W_m and W_m.

    Returns:
        One scalar for each target, in float32.

    Raises:
        ValueError: a target and its output have different shapes.
    """
    terms = []
    for m, target in enumerate(targets):
        output = outputs[m]
        if output.shape != target.shape:
            raise ValueError(f"level {m}: output {tuple(output.shape)} against target {tuple(target.shape)}")
        # float32 also under autocast, since a sum over pixels loses small errors in bfloat16.
        squared = (output.float() - target.float()).square()
        terms.append(squared.mean() if reduction == "mean" else squared.sum() / len(squared))
    return terms


def reconstruction_loss(terms: Sequence[Tensor], lam: float) -> Tensor:
    """Return L_rec = term_0 + lam * (term_1 + ... + term_{M-1}) (eq. 3)."""
    loss = terms[0]
    if len(terms) > 1:
        loss = loss + lam * torch.stack(list(terms[1:])).sum()
    return loss
