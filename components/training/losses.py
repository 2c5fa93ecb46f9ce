"""The reconstruction loss of eq. 3 and the loss of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def reconstruction_terms(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], reduction: Literal["mean", "sum"]
) -> list[Tensor]:
    """Squared error of each level: mean over the batch, and mean or sum over an image's values (eq. 3 can be read as both).

    Args:
        outputs: reconstructed levels [N, C, W_m, W_m], level 0 first.
        targets: as many levels or fewer (without the multi-scale objective only level 0 has a target).
        reduction: over C, W_m and W_m.

    Raises:
        ValueError: a target whose shape is not its output's.
    """
    terms = []
    for m, target in enumerate(targets):
        output = outputs[m]
        if output.shape != target.shape:
            raise ValueError(f"level {m}: output {tuple(output.shape)} against target {tuple(target.shape)}")
        # float32 even under autocast: a sum over pixels loses small errors in bfloat16
        squared = (output.float() - target.float()).square()
        terms.append(squared.mean() if reduction == "mean" else squared.sum() / len(squared))
    return terms


def reconstruction_loss(terms: Sequence[Tensor], lam: float) -> Tensor:
    """L_rec = term_0 + lam * (term_1 + ... + term_{M-1}) (eq. 3)."""
    loss = terms[0]
    if len(terms) > 1:
        loss = loss + lam * torch.stack(list(terms[1:])).sum()
    return loss
