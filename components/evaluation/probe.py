"""A probe of a model: how its outputs and gradients behave around the test images."""

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

_SUM_TOLERANCE = 1e-4
"""Tolerance of the sum of probabilities, absolute."""
_BATCH_TOLERANCE = 1e-4
"""Most by which outputs for an image may differ between batches, relative to the largest output."""
_NOISE_FACTOR = 3
"""A random network depends on the batch if its outputs differ by this many times its noise."""
TINY_GRADIENT = 1e-30
"""L2 norm below which attacks in either norm begin to fail (docs/reliability.md)."""
_PASSES = 5
_EPS_STEPS = 20
_STEPS = (5, 20, 50)

POINTS_AT_ONCE = 64
"""Most images that go through a network at a time without gradient."""


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
    """Measure, on a few dozen images, what most of :func:`flags.flags` are decided by.

    An image is *correct* under attack if it is classified correctly both before and under it.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2. Put it into eval mode first.
        inputs: float32 [N,C,H,W] in [0,1], N >= 1.
        labels: int64 [N], true classes.
        eps: the standard budget in [0,1] pixel units, at most that of the whole range (linf: 1,
            l2: sqrt(C*H*W)).
        norm: linf or l2.
        generator: CPU generator of PGD's random starts.
        batch: images that go through the network at a time, for short memory. With it, PGD starts
            elsewhere.

    Returns:
        JSON types.

        - ``n``, ``clean_correct`` (a count), ``norm``, ``eps``
        - ``output``: "logits", "probabilities" (rows >= 0 that sum to 1) or "log_probabilities"
            (rows <= 0 with logsumexp 0), both within 1e-4
        - ``random_output``: see :func:`_random_output`
        - ``batch_dependence``: see :func:`batch_dependence`
        - ``zero_gradients``: {``n`` correct clean images, and for ``cross_entropy`` and ``margin``
            the counts of their gradients, see :func:`_dead_gradients`}
        - ``accuracy_by_eps``: PGD of 20 steps at eps, 2 eps, 4 eps ... and the whole range, each
            {``eps``, ``correct``: N booleans}
        - ``unbounded_accuracy``: share of N that withstood all of these
        - ``accuracy_by_steps``: PGD at eps, each {``steps``, ``correct``}

    Raises:
        ValueError: there are no images, inputs or labels have a wrong type, shape or range, eps is
            out of range, or the model's output is not finite or not [N,K], K >= 2.
    """
    check_batch(inputs, labels)
    n = len(inputs)
    whole = 1.0 if norm == "linf" else math.sqrt(inputs[:1].numel())
    if not n:
        raise ValueError("no images to probe a model with")
    if not 0 < eps <= whole:
        raise ValueError(f"eps={eps} is not in (0, {whole:.6g}], the {norm} norm of the whole range")

    at_once = batch or n
    parts = [(inputs[i : i + at_once], labels[i : i + at_once]) for i in range(0, n, at_once)]
    passes = [checked_outputs(model, inputs, at_once) for _ in range(_PASSES)]
    first = passes[0]
    right = first.argmax(dim=1) == labels

    def correct_after(eps: float, steps: int) -> list[bool]:
        options: dict[str, Any] = {"norm": norm, "steps": steps, "stop_on_success": True, "generator": generator}
        adversarial = torch.cat([pgd(model, images, classes, eps=eps, **options) for images, classes in parts])
        correct: list[bool] = (right & (checked_outputs(model, adversarial, at_once).argmax(dim=1) == labels)).tolist()
        return correct

    randomness = _random_output(passes)
    gradients = {
        "cross_entropy": torch.cat([cross_entropy_gradient(model, *part, False)[0] for part in parts]),
        "margin": torch.cat([_margin_gradient(model, *part) for part in parts]),
    }
    radii = [eps * 2**k for k in range(math.ceil(math.log2(whole / eps)))] + [whole]
    by_eps = [{"eps": float(radius), "correct": correct_after(radius, _EPS_STEPS)} for radius in radii]
    return {
        "n": n,
        "clean_correct": int(right.sum()),
        "norm": norm,
        "eps": float(eps),
        "output": kind_of_output(first),
        "random_output": randomness,
        "batch_dependence": batch_dependence(model, inputs, first, randomness["largest_difference"], at_once),
        "zero_gradients": {
            "n": int(right.sum()),
            **{loss: _dead_gradients(gradient[right]) for loss, gradient in gradients.items()},
        },
        "accuracy_by_eps": by_eps,
        "unbounded_accuracy": sum(survivors(by_eps)) / n,
        "accuracy_by_steps": [{"steps": steps, "correct": correct_after(eps, steps)} for steps in _STEPS],
    }


def _random_output(passes: Sequence[Tensor]) -> dict[str, Any]:
    """Compare the outputs [N,K] of several passes of one batch with those of the first.

    Returns:
        {``passes``, ``largest_difference``, ``largest_output``, ``changed`` predictions}.
    """
    first = passes[0]
    return {
        "passes": len(passes),
        "largest_difference": max(float((other - first).abs().max()) for other in passes),
        "largest_output": float(first.abs().max()),
        "changed": _changed(first, passes),
    }


def _changed(first: Tensor, others: Sequence[Tensor]) -> int:
    """Count the images whose predicted class is not the same in all outputs."""
    return int(torch.stack([o.argmax(dim=1) != first.argmax(dim=1) for o in others]).any(dim=0).sum())


def batch_dependence(model: nn.Module, inputs: Tensor, first: Tensor, noise: float, at_once: int) -> dict[str, Any]:
    """Compare the outputs for each image alone, in reversed batches of three, and among negatives.

    Args:
        model: the network.
        inputs: images [N,C,H,W].
        first: outputs [N,K] of ``inputs`` in their order, ``at_once`` at a time.
        noise: largest difference between passes of the same batches.
        at_once: images that go through the network at a time.

    Returns:
        {``n``, ``batches``: number of other batches that each image was shown in,
        ``largest_difference`` from ``first``, ``largest_output``, ``dependent``: images whose
        outputs differ by more than 1e-4 of the largest output and three times the noise,
        ``changed`` predictions}.
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
        "changed": _changed(first, others),
    }


def _margin_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return input_gradient(model, inputs, lambda logits: margin(logits, labels))[0]


def checked_outputs(model: nn.Module, images: Tensor, batch: int = POINTS_AT_ONCE) -> Tensor:
    """Return float32 outputs [N,K], computed without gradient.

    Raises:
        ValueError: the outputs are not finite or not [N,K], K >= 2.
    """
    with torch.no_grad():
        out = torch.cat([model(part) for part in torch.split(images, min(batch, POINTS_AT_ONCE))])
    if out.ndim != 2 or out.shape[1] < 2:
        raise ValueError(f"the model's output must be [N,K], K >= 2, got {list(out.shape)}")
    if not out.isfinite().all():
        raise ValueError(f"the model's output is not finite for {int((~out.isfinite()).any(dim=1).sum())} images")
    return out.float()


def kind_of_output(out: Tensor) -> str:
    """Return "logits", "probabilities" or "log_probabilities" for outputs [N,K]."""
    out = out.double()
    if bool((out >= 0).all()) and bool(((out.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all()):
        return "probabilities"
    if bool((out <= 0).all()) and bool((out.logsumexp(dim=1).abs() <= _SUM_TOLERANCE).all()):
        return "log_probabilities"
    return "logits"


def _dead_gradients(gradient: Tensor) -> dict[str, int]:
    """Count gradients that are zero in every pixel, not finite, or tiny (L2 norm in (0, 1e-30))."""
    # Compute in float64: the squares of gradients below 1e-23 are zero in float32.
    flat = gradient.double().flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1)
    return {
        "zero": int((flat == 0).all(dim=1).sum()),
        "not_finite": int((~norms.isfinite()).sum()),
        "tiny": int(((norms > 0) & (norms < TINY_GRADIENT)).sum()),
    }


def survivors(by_eps: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return which images are correct at every eps. A larger ball contains the smaller ones."""
    return [all(correct) for correct in zip(*(run["correct"] for run in by_eps), strict=True)]
