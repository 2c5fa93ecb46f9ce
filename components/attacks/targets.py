"""Target classes of targeted attacks."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.common import check_batch

Choice = Literal["random", "least_likely", "runner_up"]


def choose_targets(
    model: nn.Module, inputs: Tensor, labels: Tensor, how: Choice, generator: torch.Generator | None = None
) -> Tensor:
    """Choose a wrong class for each sample.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; its mode is left as it is.
        inputs: float32 [N,C,H,W] in [0,1].
        labels: int64 [N], true classes, which are never chosen.
        how: "random" draws each wrong class with equal probability. "least_likely" and "runner_up"
            take the wrong class of the lowest and of the highest logit of the clean image.
        generator: CPU generator of "random", so that every device gets the same draw.

    Returns:
        int64 [N], on the device of ``labels``.

    Raises:
        ValueError: inputs or labels of the wrong type, shape or range; a model with fewer than two
            classes.
    """
    check_batch(inputs, labels)
    if not len(inputs):
        return labels.clone()
    with torch.no_grad():
        logits = model(inputs)
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"a model of {classes} class has no wrong class to aim at")
    if how == "random":
        drawn = torch.randint(0, classes - 1, labels.shape, generator=generator).to(labels.device)
        return drawn + (drawn >= labels)
    if how == "runner_up":
        return likeliest_others(logits, labels, 1).squeeze(1)
    return likeliest_others(-logits, labels, 1).squeeze(1)


def likeliest_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the wrong classes of the highest logits, highest first.

    Returns:
        int64 [N,T]; T is ``count``, but at most K - 1.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_label, -math.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices
