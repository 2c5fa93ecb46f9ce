"""The active test of an attack: adversarial examples are planted, and the attack must find them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks.autoattack import gradient_parts
from components.attacks.common import check_batch
from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.noise import moved
from components.attacks.projections import Norm
from components.attacks.spec import AttackSpec
from components.evaluation.flags import _MIXTURE, _RANDOM_POINTS
from components.evaluation.judge import judge, verify_examples
from components.evaluation.metrics import broken
from components.evaluation.probe import POINTS_AT_ONCE, checked_outputs
from components.evaluation.statistics import wilson_interval
from components.precision import true_float32

_FEWEST = 8  # images to decide by
_THRESHOLD = 0.95  # share of planted examples to be found (Zimmermann et al.)
_INNER_RADIUS = 0.95  # of eps (the authors' value)
_CANDIDATES = 64
_BOUNDARY = 0.9  # where the boundary lies on the way from the inner points to the planted one
_RIDGE = 1e-3


class _Planted(nn.Module):
    """A network with a readout of its own: score = weight . (outputs - origin) - threshold, class 1 where it is above 0.

    There are as many logits as the network has outputs, so that an attack that needs some number of classes runs here
    where it runs there. max(score, -score) >= 0, so the further ones, which are negative, never win.
    """

    def __init__(self, model: nn.Module, origin: Tensor, weight: Tensor, threshold: float, never: float) -> None:
        super().__init__()
        self.model, self.origin, self.weight, self.threshold, self.never = model, origin, weight, threshold, never

    def on(self, model: nn.Module) -> _Planted:
        """The same readout on a stand-in of the network."""
        return _Planted(model, self.origin, self.weight, self.threshold, self.never)

    def forward(self, images: Tensor) -> Tensor:
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
    """Plant an adversarial example beside each image and see whether the attack finds one.

    The binarization test of Zimmermann, Brendel, Tramer, Carlini (NeurIPS 2022, https://arxiv.org/abs/2206.13991): a
    linear readout calls the image and random points at 0.95 eps class 0 and one random point at eps class 1.

    Differences from the authors' code: the readout sees the network's outputs, not its features, so that any module
    will do and outputs that hide a gradient are part of the test; it is Fisher's discriminant for the best separable of
    64 points, not a logistic regression for one; its logits are as large as the network's own margin (1 at least, the
    authors' value), so that a loss which saturates there saturates here. Each image is attacked alone, as it has a
    readout of its own and an attack may drop samples from its batch.

    AutoAttack is tested without its Square, part by part: Square needs no gradient, so on a network that masks them it
    would pass for all four. It is tested where it is an attack of its own.

    An attack that chooses a target is tested with the runner-up, here the planted class: no other class can be reached,
    whatever the network.

    Args:
        model: maps [0,1] images to logits [N,K], K >= 2; put it into eval mode first.
        inputs: float32 [N,C,H,W] in [0,1]; 16 to 32 images are enough.
        spec: the attack, run as for white-box examples (leaving early where it can).
        eps: distance of the planted point in the norm of ``spec``; that of ``spec`` itself if it has one.
        fast: what :func:`components.attacks.fast_copy.make_fast_copy` made of ``model``; the attack searches on it, as it does for
            examples. Points are planted in ``model`` and found where ``model`` says so.
        generator: CPU generator of all points and of the attack.
        n_inner: class-0 points per image, the clean one included.
        batch: how many points go through the network at a time.

    Returns:
        JSON types: ``attack`` (canonical text), ``parts`` (what was run of it: itself, AutoAttack's gradient parts, or
        the targeted attack with the target above), ``norm``, ``eps``, ``n`` images tested, ``left_out`` (no planted point could be separated), ``found``, ``share``
        (None if n is 0), ``low``, ``high`` (95 % Wilson interval), ``random_found`` and ``random_share``: by 100 random
        points at eps, the control; ``threshold``; ``passed``: False if the interval lies below the threshold; None if n
        is below 8 or if random points would pass, too.

    Raises:
        ValueError: inputs of the wrong type, shape or range, an eps that is not above 0 or not that of ``spec``,
            n_inner below 2, or a model whose output is not finite or not [N,K], K >= 2.
        AttackViolation: the attack broke its own rules.
    """
    check_batch(inputs, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))
    if not eps > 0 or spec.eps not in (None, eps):
        raise ValueError(f"eps={eps} is not above 0 and that of {spec}")
    if n_inner < 2:
        raise ValueError(f"n_inner={n_inner} is below 2")
    norm: Norm = "linf" if spec.norm == "linf" else "l2"
    aimed = dataclasses.replace(spec, target="runner_up") if spec.target else spec
    parts = gradient_parts(spec) if spec.name == _MIXTURE else (aimed,)
    label = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    n = found = random_found = 0
    for i in range(len(inputs)):
        clean = inputs[i : i + 1]
        planted = _plant(model, clean, eps, norm, n_inner, generator, batch)
        if planted is None:
            continue
        n += 1
        at_random = checked_outputs(planted, _around(clean, eps, norm, _RANDOM_POINTS, generator), batch)
        random_found += int((at_random.argmax(dim=1) == 1).any())
        searched = None if fast is None else planted.on(fast)
        for part in parts:
            early = part.can_stop_on_success
            adversarial = run_attack_on_copy(
                part, planted, searched, clean, label, stop_on_success=early, generator=generator
            )
            verify_examples(clean, adversarial, [i], part)
            if broken(judge(planted, clean, adversarial, label), norm, eps)[0]:
                found += 1
                break
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
        "left_out": len(inputs) - n,
        "found": found,
        "share": found / n if n else None,
        "low": low,
        "high": high,
        "random_found": random_found,
        "random_share": random_found / n if n else None,
        "threshold": _THRESHOLD,
        "passed": passed,
    }


def _around(clean: Tensor, eps: float, norm: Norm, n: int, generator: torch.Generator | None) -> Tensor:
    """``n`` points of [0,1] at distance eps from one image: random signs (linf) or directions (l2)."""
    shape = (n, *clean.shape[1:])
    if norm == "linf":
        signs = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
        return (clean + eps * signs.to(clean)).clamp_(0, 1)
    return moved(clean, torch.randn(shape, generator=generator).to(clean), eps)


def _plant(
    model: nn.Module, clean: Tensor, eps: float, norm: Norm, n_inner: int, generator: torch.Generator | None, batch: int
) -> _Planted | None:
    inner_images = torch.cat([clean, _around(clean, eps * _INNER_RADIUS, norm, n_inner - 1, generator)])
    candidates = _around(clean, eps, norm, _CANDIDATES, generator)
    inner, outer = (checked_outputs(model, points, batch).double().cpu() for points in (inner_images, candidates))

    origin = inner.mean(dim=0)
    inner, outer = inner - origin, outer - origin
    covariance = inner.T @ inner / (n_inner - 1)
    ridge = _RIDGE * covariance.diagonal().mean()
    if not ridge > 0:  # all outputs are equal
        return None
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64), outer.T).T
    reached = (weights * outer).sum(dim=1)
    nearest = (weights @ inner.T).amax(dim=1)
    gap = (reached - nearest) / reached.clamp_min(1e-300).sqrt()  # in standard deviations of the inner points
    best = int(gap.argmax())
    if not gap[best] > 0:
        return None
    threshold = nearest[best] + _BOUNDARY * (reached[best] - nearest[best])
    top = checked_outputs(model, clean).double().topk(2, dim=1).values[0]
    certainty = float(top[0] - top[1])
    scale = max(certainty, 1.0) / float(threshold - (inner @ weights[best]).min())
    planted = _Planted(
        model,
        origin.to(clean),
        (scale * weights[best]).to(clean),
        float(scale * threshold),
        never=-(10 + 2 * certainty),
    )
    # by the network itself in float32, which has the last word
    wanted = torch.zeros(n_inner + 1, dtype=torch.int64, device=clean.device)
    wanted[-1] = 1
    predicted = checked_outputs(planted, torch.cat([inner_images, candidates[best : best + 1]]), batch).argmax(dim=1)
    return planted if torch.equal(predicted, wanted) else None
