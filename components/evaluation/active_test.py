"""The active test: adversarial examples are planted, and the attack must find them.

This is the binarization test of Zimmermann, Brendel, Tramer, Carlini (NeurIPS 2022,
https://arxiv.org/abs/2206.13991). A linear readout calls the image and random points at 0.95 eps
class 0, and one random point at eps class 1.

Differences from the authors' code:

- The readout sees the network's outputs, not its features. So any module will do, and outputs that
  hide a gradient are part of the test.
- It is Fisher's discriminant for the best separable of 64 points, not a logistic regression for
  one.
- Its logits are as large as the network's own margin, and at least 1, the authors' value. So a loss
  that saturates on the network saturates here.
- Each image is attacked alone, because it has a readout of its own and an attack may drop samples
  from its batch.

AutoAttack is tested part by part, without its Square. Square needs no gradient, so on a network
that masks gradients it would pass for all four. Square is tested if it is an attack of its own.

An attack that chooses a target is tested with the runner-up as its target, which is the planted
class. No other class can be reached, whatever the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks.autoattack import gradient_parts
from components.attacks.common import check_batch
from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.noise import moved
from components.attacks.projections import Norm
from components.attacks.spec import AttackSpec
from components.evaluation.judge import judge, verify_examples
from components.evaluation.metrics import broken
from components.evaluation.probe import POINTS_AT_ONCE, checked_outputs
from components.evaluation.statistics import wilson_interval
from components.precision import true_float32

AUTOATTACK = "autoattack"
"""The attack that combines gradients and Square, each on the images that the others left."""
RANDOM_POINTS = 100
"""Points of the random search that is the control."""
_FEWEST = 8
"""Fewest images that decide anything."""
_THRESHOLD = 0.95
"""Share of the planted examples that an attack must find (Zimmermann et al.)."""
_INNER_RADIUS = 0.95
"""Distance of the inner points, as a share of eps (the authors' value)."""
_CANDIDATES = 64
_BOUNDARY = 0.9
"""Place of the boundary on the way from the inner points to the planted one."""
_RIDGE = 1e-3


class PlantedReadout(nn.Module):
    """A network with a readout of its own: class 1 where weight . (outputs - origin) > threshold.

    It has as many logits as the network has outputs, so that an attack that needs some number of
    classes can run. The further logits are negative and max(score, -score) >= 0, so they never win.
    """

    def __init__(self, model: nn.Module, origin: Tensor, weight: Tensor, threshold: float, never: float) -> None:
        super().__init__()
        self.model, self.origin, self.weight, self.threshold, self.never = model, origin, weight, threshold, never

    def on(self, model: nn.Module) -> PlantedReadout:
        """Return the same readout on a fast copy of the network."""
        return PlantedReadout(model, self.origin, self.weight, self.threshold, self.never)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N,K] of images [N,C,H,W]."""
        score = (self.model(images) - self.origin) @ self.weight - self.threshold
        two = torch.stack([-score / 2, score / 2], dim=1)
        return nn.functional.pad(two, (0, len(self.weight) - 2), value=self.never)


@true_float32()
def active_test(
    model: nn.Module,
    inputs: Tensor,
    spec: AttackSpec,
    *,
    eps: float,
    fast: nn.Module | None = None,
    generator: torch.Generator | None = None,
    n_inner: int = 64,
    batch: int = POINTS_AT_ONCE,
) -> dict[str, Any]:
    """Plant an adversarial example beside each image, and count how many the attack finds.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2. Put it into eval mode first.
        inputs: float32 [N,C,H,W] in [0,1]. 16 to 32 images are enough.
        spec: the attack. It runs as for white-box examples.
        eps: distance of the planted point in the norm of ``spec``; that of ``spec`` if it has one.
        fast: the copy of ``model`` that the attack searches on, as it does for examples
            (components/attacks/fast_copy.py). Points are planted in ``model``, which also judges.
        generator: CPU generator of all points and of the attack.
        n_inner: class-0 points per image, the clean image included.
        batch: points that go through the network at a time.

    Returns:
        JSON types; see :func:`_result`.

    Raises:
        ValueError: inputs have a wrong type, shape or range, eps is not above 0 or not that of
            ``spec``, n_inner is below 2, or the model's output is not finite or not [N,K], K >= 2.
        AttackViolation: the attack broke its own rules.
    """
    check_batch(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
    if not eps > 0 or spec.eps not in (None, eps):
        raise ValueError(f"eps={eps} must be above 0 and that of {spec}")
    if n_inner < 2:
        raise ValueError(f"n_inner={n_inner} is below 2")
    norm: Norm = "linf" if spec.norm == "linf" else "l2"
    aimed = dataclasses.replace(spec, target="runner_up") if spec.target else spec
    parts = gradient_parts(spec) if spec.name == AUTOATTACK else (aimed,)
    label = torch.zeros(1, dtype=torch.int64, device=inputs.device)

    def finds(part: AttackSpec, planted: PlantedReadout, sample: int) -> bool:
        clean = inputs[sample : sample + 1]
        copy = None if fast is None else planted.on(fast)
        early = part.can_stop_on_success
        adversarial = run_attack_on_copy(part, planted, copy, clean, label, stop_on_success=early, generator=generator)
        verify_examples(clean, adversarial, [sample], part)
        return bool(broken(judge(planted, clean, adversarial, label), norm, eps)[0])

    n = found = random_found = 0
    for i in range(len(inputs)):
        clean = inputs[i : i + 1]
        planted = plant(model, clean, eps, norm, n_inner, generator, batch)
        if planted is None:
            continue
        n += 1
        random_points = points_around(clean, eps, norm, RANDOM_POINTS, generator)
        random_found += int((checked_outputs(planted, random_points, batch).argmax(dim=1) == 1).any())
        found += any(finds(part, planted, i) for part in parts)
    counts = {"n": n, "left_out": len(inputs) - n, "found": found, "random_found": random_found}
    return _result(spec, parts, norm, eps, **counts)


def _result(
    spec: AttackSpec,
    parts: Sequence[AttackSpec],
    norm: str,
    eps: float,
    n: int,
    left_out: int,
    found: int,
    random_found: int,
) -> dict[str, Any]:
    """Return the result of an active test, in JSON types.

    Returns:
        - ``attack`` (canonical text), ``norm``, ``eps``
        - ``parts``: the attacks that ran: ``attack`` itself, AutoAttack's gradient parts, or the
          targeted attack with the runner-up as target
        - ``n`` images tested, ``left_out``: images for which no planted point could be separated
        - ``found``, ``share`` (None if n is 0), ``low``, ``high`` (95 % Wilson interval)
        - ``random_found``, ``random_share``: the same of 100 random points at eps, the control
        - ``threshold``, ``passed``: False if the interval lies below the threshold; None if n is
          below 8 or if random points would pass too
    """
    low, high = wilson_interval(found, n)
    passed: bool | None = high >= _THRESHOLD
    if n < _FEWEST or (passed and wilson_interval(random_found, n)[1] >= _THRESHOLD):
        passed = None
    return {
        "attack": str(spec),
        "parts": [str(part) for part in parts],
        "norm": norm,
        "eps": float(eps),
        "n": n,
        "left_out": left_out,
        "found": found,
        "share": found / n if n else None,
        "low": low,
        "high": high,
        "random_found": random_found,
        "random_share": random_found / n if n else None,
        "threshold": _THRESHOLD,
        "passed": passed,
    }


def points_around(clean: Tensor, eps: float, norm: Norm, n: int, generator: torch.Generator | None) -> Tensor:
    """Return ``n`` points of [0,1] at distance eps from one image [1,C,H,W].

    Their signs (linf) or directions (l2) are random.
    """
    shape = (n, *clean.shape[1:])
    if norm == "linf":
        signs = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
        return (clean + eps * signs.to(clean)).clamp_(0, 1)
    return moved(clean, torch.randn(shape, generator=generator).to(clean), eps)


def plant(
    model: nn.Module, clean: Tensor, eps: float, norm: Norm, n_inner: int, generator: torch.Generator | None, batch: int
) -> PlantedReadout | None:
    """Return a readout that separates one point at eps from the image and inner points.

    Args:
        model: the network.
        clean: the image [1,C,H,W].
        eps: distance of the planted point.
        norm: linf or l2.
        n_inner: number of class-0 points, the image included.
        generator: CPU generator of the points.
        batch: points that go through the network at a time.

    Returns:
        None if no point can be separated.
    """
    inner_images = torch.cat([clean, points_around(clean, eps * _INNER_RADIUS, norm, n_inner - 1, generator)])
    candidates = points_around(clean, eps, norm, _CANDIDATES, generator)
    inner, outer = (checked_outputs(model, points, batch).double().cpu() for points in (inner_images, candidates))

    origin = inner.mean(dim=0)
    inner, outer = inner - origin, outer - origin
    covariance = inner.T @ inner / (n_inner - 1)
    ridge = _RIDGE * covariance.diagonal().mean()
    if not ridge > 0:  # All outputs are equal.
        return None
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64), outer.T).T
    reached = (weights * outer).sum(dim=1)
    nearest = (weights @ inner.T).amax(dim=1)
    # The gap is in standard deviations of the inner points.
    gap = (reached - nearest) / reached.clamp_min(1e-300).sqrt()
    best = int(gap.argmax())
    if not gap[best] > 0:
        return None
    threshold = nearest[best] + _BOUNDARY * (reached[best] - nearest[best])
    top = checked_outputs(model, clean).double().topk(2, dim=1).values[0]
    certainty = float(top[0] - top[1])
    scale = max(certainty, 1.0) / float(threshold - (inner @ weights[best]).min())
    weight, never = (scale * weights[best]).to(clean), -(10 + 2 * certainty)
    planted = PlantedReadout(model, origin.to(clean), weight, float(scale * threshold), never)
    # The readout was computed in float64. What counts is the network itself in float32.
    classes = torch.zeros(n_inner + 1, dtype=torch.int64, device=clean.device)
    classes[-1] = 1
    predicted = checked_outputs(planted, torch.cat([inner_images, candidates[best : best + 1]]), batch).argmax(dim=1)
    return planted if torch.equal(predicted, classes) else None
