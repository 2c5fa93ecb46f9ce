"""A probe of a model: how its gradients and outputs behave around the test images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks.common import check_batch, cross_entropy_gradient, input_gradient, margin
from components.attacks.pgd import pgd
from components.attacks.projections import Norm
from components.precision import true_float32

_SUM_TOLERANCE = 1e-4  # of the sum of probabilities, absolute
_BATCH_TOLERANCE = 1e-4
"""Most by which the outputs for one image may differ from batch to batch, relative to the largest output."""
_NOISE_FACTOR = 3
"""A random network's outputs must differ by this many times its own noise to depend on the batch."""
TINY_GRADIENT = 1e-30  # L2 norm; below, attacks in either norm begin to fail (docs/reliability.md)
_PASSES = 5
_EPS_STEPS = 20
_STEPS = (5, 20, 50)


POINTS_AT_ONCE = 64
"""So many images at most go through a network without gradient at a time."""


@true_float32()
def probe(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    generator: torch.Generator | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Measure on a few dozen images what most of :func:`flags` are decided by.

    An image is *correct* under attack if it was classified correctly before and still is.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; put it into eval mode first.
        inputs: float32 [N,C,H,W] in [0,1], N >= 1.
        labels: int64 [N], true classes.
        eps: the usual budget in [0,1] pixel units, at most that of the whole range (linf: 1, l2: sqrt(C*H*W)).
        norm: linf or l2.
        generator: CPU generator of PGD's random starts.
        batch: how many images go through the network at a time, where memory is short; PGD starts elsewhere then.

    Returns:
        JSON types: ``n``; ``clean_correct`` (how many); ``norm``; ``eps``; ``output``: "logits", "probabilities" (rows
        >= 0 that sum to 1) or "log_probabilities" (rows <= 0 with logsumexp 0; both within 1e-4);
        ``random_output``: {``passes``, ``largest_difference`` between the outputs of one batch, ``largest_output``,
        ``changed`` predictions}; ``zero_gradients``: {``n`` correct clean images, and of their gradients of
        ``cross_entropy`` and ``margin`` how many are ``zero`` in every pixel, ``not_finite``, ``tiny`` (L2 norm in
        (0, 1e-30))}; ``batch_dependence``: {``n``, ``batches`` of other images, number or order that each image was
        shown in, ``largest_difference`` from the outputs of the first pass, ``largest_output``, ``dependent`` images
        whose outputs differ by more than 1e-4 of it and three times ``random_output``, ``changed`` predictions};
        ``accuracy_by_eps``: PGD of 20 steps at eps, 2 eps, 4 eps ... and the whole range, each
        {``eps``, ``correct``: N booleans}; ``unbounded_accuracy``: share of N that withstood every one of them;
        ``accuracy_by_steps``: PGD at eps, each {``steps``, ``correct``}.

    Raises:
        ValueError: no images, inputs or labels of the wrong type, shape or range, eps out of range, or a model whose
            output is not finite or not [N,K], K >= 2.
    """
    check_batch(inputs, labels)
    n = len(inputs)
    whole = 1.0 if norm == "linf" else math.sqrt(inputs[:1].numel())
    if not n:
        raise ValueError("no images to probe a model with")
    if not 0 < eps <= whole:
        raise ValueError(f"eps={eps} is not in (0, {whole:.6g}], the {norm} norm of the whole range")

    at_once = batch or n
    parts = [slice(i, i + at_once) for i in range(0, n, at_once)]
    passes = [checked_outputs(model, inputs, at_once) for _ in range(_PASSES)]
    first = passes[0]
    right = first.argmax(dim=1) == labels

    def correct_after(eps: float, steps: int) -> list[bool]:
        adversarial = torch.cat(
            [
                pgd(
                    model,
                    inputs[p],
                    labels[p],
                    eps=eps,
                    norm=norm,
                    steps=steps,
                    stop_on_success=True,
                    generator=generator,
                )
                for p in parts
            ]
        )
        kept: list[bool] = (right & (checked_outputs(model, adversarial, at_once).argmax(dim=1) == labels)).tolist()
        return kept

    noise = max(float((other - first).abs().max()) for other in passes)
    gradients = {
        "cross_entropy": torch.cat([cross_entropy_gradient(model, inputs[p], labels[p], False)[0] for p in parts]),
        "margin": torch.cat([margin_gradient(model, inputs[p], labels[p]) for p in parts]),
    }
    radii = [eps * 2**k for k in range(math.ceil(math.log2(whole / eps)))] + [whole]
    by_eps = [{"eps": float(e), "correct": correct_after(e, _EPS_STEPS)} for e in radii]
    return {
        "n": n,
        "clean_correct": int(right.sum()),
        "norm": norm,
        "eps": float(eps),
        "output": _kind_of_output(first),
        "random_output": {
            "passes": _PASSES,
            "largest_difference": noise,
            "largest_output": float(first.abs().max()),
            "changed": int(torch.stack([p.argmax(dim=1) != first.argmax(dim=1) for p in passes]).any(dim=0).sum()),
        },
        "batch_dependence": _batch_dependence(model, inputs, first, noise, at_once),
        "zero_gradients": {
            "n": int(right.sum()),
            **{loss: _dead_gradients(gradient[right]) for loss, gradient in gradients.items()},
        },
        "accuracy_by_eps": by_eps,
        "unbounded_accuracy": sum(survivors(by_eps)) / n,
        "accuracy_by_steps": [{"steps": steps, "correct": correct_after(eps, steps)} for steps in _STEPS],
    }


def _batch_dependence(model: nn.Module, inputs: Tensor, first: Tensor, noise: float, at_once: int) -> dict[str, Any]:
    """Compare the outputs for each image alone, in reversed batches of three, and among negatives of all images.

    Args:
        first: outputs [N,K] of ``inputs`` in their order, ``at_once`` at a time.
        noise: largest difference between passes of the same batches.
    """
    n = len(inputs)
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(0)).to(inputs.device)
    among_negatives = checked_outputs(model, torch.cat([inputs, 1 - inputs])[order], at_once)[order.argsort()]
    others = [
        checked_outputs(model, inputs, 1),
        checked_outputs(model, inputs.flip(0), min(3, at_once)).flip(0),
        among_negatives[:n],
    ]
    differences = torch.stack([(other - first).abs().amax(dim=1) for other in others]).amax(dim=0)
    largest = float(first.abs().max())
    return {
        "n": n,
        "batches": len(others),
        "largest_difference": float(differences.max()),
        "largest_output": largest,
        "dependent": int((differences > max(_BATCH_TOLERANCE * largest, _NOISE_FACTOR * noise)).sum()),
        "changed": int(torch.stack([o.argmax(dim=1) != first.argmax(dim=1) for o in others]).any(dim=0).sum()),
    }


def margin_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return input_gradient(model, inputs, lambda logits: margin(logits, labels))[0]


def checked_outputs(model: nn.Module, images: Tensor, batch: int = POINTS_AT_ONCE) -> Tensor:
    """Return float32 outputs [N,K], computed without gradient."""
    with torch.no_grad():
        out = torch.cat([model(part) for part in torch.split(images, min(batch, POINTS_AT_ONCE))])
    if out.ndim != 2 or out.shape[1] < 2:
        raise ValueError(f"a model of [N,K], K >= 2, outputs is needed, got {list(out.shape)}")
    if not out.isfinite().all():
        raise ValueError(f"the model's output is not finite for {int((~out.isfinite()).any(dim=1).sum())} images")
    return out.float()


def _kind_of_output(out: Tensor) -> str:
    out = out.double()
    if bool((out >= 0).all()) and bool(((out.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all()):
        return "probabilities"
    if bool((out <= 0).all()) and bool((out.logsumexp(dim=1).abs() <= _SUM_TOLERANCE).all()):
        return "log_probabilities"
    return "logits"


def _dead_gradients(gradient: Tensor) -> dict[str, int]:
    # in float64: the squares of gradients below 1e-23 are zero in float32
    flat = gradient.double().flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1)
    return {
        "zero": int((flat == 0).all(dim=1).sum()),
        "not_finite": int((~norms.isfinite()).sum()),
        "tiny": int(((norms > 0) & (norms < TINY_GRADIENT)).sum()),
    }


def survivors(by_eps: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Correct at every eps: what is found in a smaller ball is in the larger one as well."""
    return [all(correct) for correct in zip(*(run["correct"] for run in by_eps), strict=True)]
