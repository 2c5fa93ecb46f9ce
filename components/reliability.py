"""Signs that an attack failed, so that a weak evaluation is not mistaken for a robust network (docs/reliability.md).

Sources: Carlini et al. 2019, https://arxiv.org/abs/1902.06705; Croce & Hein 2020, https://arxiv.org/abs/2003.01690;
Pintor et al. 2022, https://arxiv.org/abs/2106.09947; Zimmermann et al. 2022, https://arxiv.org/abs/2206.13991
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks.autoattack import gradient_parts
from components.attacks.common import check_batch, cross_entropy_gradient, input_gradient, margin
from components.attacks.noise import moved
from components.attacks.pgd import pgd
from components.attacks.projections import Norm
from components.attacks.search import search
from components.attacks.spec import AttackSpec
from components.precision import true_float32
from components.robustness import (
    Columns,
    judge,
    mcnemar,
    verify_examples,
    wilson_interval,
    worst_case,
)

_P = 0.01  # a paired difference is significant below
_SUM_TOLERANCE = 1e-4  # of the sum of probabilities, absolute
_NOISE_TOLERANCE = 1e-4  # of two outputs for one input, relative to the largest output
_BATCH_TOLERANCE = 1e-4
"""Most by which the outputs for one image may differ from batch to batch, relative to the largest output."""
_NOISE_FACTOR = 3
"""A random network's outputs must differ by this many times its own noise to depend on the batch."""
_DEPENDENT_SHARE = 0.05
"""Share of images, beyond one, that may differ: rounding moves an honest network across a step of its own, but rarely."""
_DEAD_SHARE = 0.05  # of images without a usable gradient
_TINY_GRADIENT = 1e-30  # L2 norm; below, attacks in either norm begin to fail (docs/reliability.md)
_UNBOUNDED_LIMIT = 0.01  # what the accuracy at unbounded eps may be
_NO_ITERATED_ASCENT = ("noise", "fgsm", "square", "adaptive")  # of the loss alone
_MIXTURE = "autoattack"  # of gradients and Square, each on what the others left
_PASSES = 5
_EPS_STEPS = 20
_STEPS = (5, 20, 50)

_FEWEST = 8  # images to decide by
_THRESHOLD = 0.95  # share of planted examples to be found (Zimmermann et al.)
_INNER_RADIUS = 0.95  # of eps (the authors' value)
_CANDIDATES = 64
_RANDOM_POINTS = 100
_BOUNDARY = 0.9  # where the boundary lies on the way from the inner points to the planted one
_RIDGE = 1e-3


POINTS_AT_ONCE = 64
"""So many images at most go through a network without gradient at a time."""


# --- probe


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
    passes = [_outputs(model, inputs, at_once) for _ in range(_PASSES)]
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
                    early_leaving=True,
                    generator=generator,
                )
                for p in parts
            ]
        )
        kept: list[bool] = (right & (_outputs(model, adversarial, at_once).argmax(dim=1) == labels)).tolist()
        return kept

    noise = max(float((other - first).abs().max()) for other in passes)
    gradients = {
        "cross_entropy": torch.cat([cross_entropy_gradient(model, inputs[p], labels[p], False)[0] for p in parts]),
        "margin": torch.cat([_margin_gradient(model, inputs[p], labels[p]) for p in parts]),
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
        "unbounded_accuracy": sum(_survivors(by_eps)) / n,
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
    among_negatives = _outputs(model, torch.cat([inputs, 1 - inputs])[order], at_once)[order.argsort()]
    others = [
        _outputs(model, inputs, 1),
        _outputs(model, inputs.flip(0), min(3, at_once)).flip(0),
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


def _margin_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return input_gradient(model, inputs, lambda logits: margin(logits, labels))[0]


def _outputs(model: nn.Module, images: Tensor, batch: int = POINTS_AT_ONCE) -> Tensor:
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
        "tiny": int(((norms > 0) & (norms < _TINY_GRADIENT)).sum()),
    }


def _survivors(by_eps: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Correct at every eps: what is found in a smaller ball is in the larger one as well."""
    return [all(correct) for correct in zip(*(run["correct"] for run in by_eps), strict=True)]


# --- active test


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
        fast: what :func:`components.attacks.search.stand_in` made of ``model``; the attack searches on it, as it does for
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
        at_random = _outputs(planted, _around(clean, eps, norm, _RANDOM_POINTS, generator), batch)
        random_found += int((at_random.argmax(dim=1) == 1).any())
        searched = None if fast is None else planted.on(fast)
        for part in parts:
            early = part.can_leave_early
            adversarial = search(part, planted, searched, clean, label, early_leaving=early, generator=generator)
            verify_examples(clean, adversarial, [i], part)
            if _broken(judge(planted, clean, adversarial, label), norm, eps)[0]:
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
    inner, outer = (_outputs(model, points, batch).double().cpu() for points in (inner_images, candidates))

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
    top = _outputs(model, clean).double().topk(2, dim=1).values[0]
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
    predicted = _outputs(planted, torch.cat([inner_images, candidates[best : best + 1]]), batch).argmax(dim=1)
    return planted if torch.equal(predicted, wanted) else None


def _broken(columns: Columns, norm: str, eps: float) -> np.ndarray[Any, Any]:
    """Bool [N]: misclassified by an example within eps, or before any attack."""
    broken: np.ndarray[Any, Any] = ~worst_case([columns], norm, eps)
    return broken


# --- flags


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One evaluation: what :func:`components.robustness.judge` returned for the examples of ``spec``.

    ``threat_model``: "white_box", "grey_box", "transfer", "transfer:NAME", "black_box" or "random".
    """

    threat_model: str
    spec: AttackSpec
    columns: Columns


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One sign of a failed attack.

    ``measured`` is a sentence with the numbers, or why nothing could be measured; ``remedy`` says what to do if it
    fired; ``attacks`` are those that it fired for, where it is decided attack by attack.
    """

    name: str
    fired: bool
    measured: str
    remedy: str
    attacks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**dataclasses.asdict(self), "attacks": list(self.attacks)}


def flags(
    probe: Mapping[str, Any], judged: Sequence[Judged], active: Sequence[Mapping[str, Any]] | None = None
) -> list[Flag]:
    """All flags of one model, fired or not, always in the same order; docs/reliability.md explains each.

    Args:
        probe: of :func:`probe`.
        judged: every evaluation of the model, on the same samples in the same order.
        active: of :func:`active_test`, one for each attack tested.

    Raises:
        ValueError: evaluations of different samples.
    """
    for other in judged[1:]:
        if not np.array_equal(other.columns["label"], judged[0].columns["label"]):
            raise ValueError(f"{other.threat_model} {other.spec} was judged on other samples than {judged[0].spec}")
    return [
        _iterative_weaker(judged),
        _others_stronger(judged),
        _not_zero(probe),
        _not_falling_with_eps(probe),
        _not_falling_with_steps(probe),
        _zero_gradients(probe),
        _random_output(probe),
        _batch_dependent(probe),
        _not_logits(probe),
        _active_test_failed(active or ()),
    ]


def _iterative_weaker(judged: Sequence[Judged]) -> Flag:
    # white-box alone: of examples made elsewhere, those of a single step often transfer better
    white = [j for j in judged if j.threat_model == "white_box" and j.spec.kind == "budget"]
    said, weaker = [], []
    for single in white:
        for iterated in white:
            a, b = single.spec, iterated.spec
            same = (a.norm, a.eps, a.target) == (b.norm, b.eps, b.target)  # a target makes any attack weaker
            if a.name != "fgsm" or b.name in _NO_ITERATED_ASCENT or not same:
                continue
            fired, sentence = _breaks_more(single, [iterated], str(iterated.spec), _limit(single))
            said.append(sentence)
            weaker += [str(iterated.spec)] if fired else []
    return Flag(
        name="iterative_weaker_than_single_step",
        fired=bool(weaker),
        measured="; ".join(said) or "Not measurable: no white-box FGSM beside an iterative attack of the same eps.",
        remedy="The iterations follow a masked gradient or too short or too long a step: raise steps, vary the step "
        "size and restarts, attack with APGD; if that does not help, replace what masks the gradient (BPDA).",
        attacks=tuple(weaker),
    )


def _others_stronger(judged: Sequence[Judged]) -> Flag:
    said, evidence, stronger = [], [], []
    for other in judged:
        if other.threat_model in ("white_box", "clean"):
            continue
        beside = [j for j in judged if j.threat_model == "white_box" and j.spec.norm == other.spec.norm]
        # its own Square would hide that gradients find nothing
        white = [j for j in beside if j.spec.name != _MIXTURE]
        limits = [_limit(j) for j in white if _limit(j) >= _limit(other)]
        if not limits:
            continue
        # an attack of minimal norm has an answer for every budget
        eps = _limit(other) if math.inf in limits else min(limits)
        without = f" (without {_MIXTURE}, which ends in a Square of its own)" if len(white) < len(beside) else ""
        fired, sentence = _breaks_more(other, white, f"all white-box attacks together{without}", eps)
        said.append(sentence)
        if fired:
            evidence.append(sentence)
            stronger.append(f"{other.threat_model} {other.spec}")
    if stronger and len(said) > len(stronger):  # beside it, dozens that fail would bury it
        evidence.append(f"of {len(said) - len(stronger)} others none breaks significantly more")
    return Flag(
        name="black_box_or_transfer_stronger",
        fired=bool(stronger),
        measured="; ".join(evidence or said)
        or "Not measurable: no white-box attack (autoattack, which ends in a Square, is none here) beside "
        "another one of its norm and budget.",
        remedy="The white-box gradient is masked or its attack is too weak, as it could have made the same examples: "
        "approximate what masks it (BPDA), add a score-based attack (Square), and report the worst case over all.",
        attacks=tuple(stronger),
    )


def _limit(judged: Judged) -> float:
    return math.inf if judged.spec.eps is None else judged.spec.eps


def _breaks_more(one: Judged, others: Sequence[Judged], said: str, eps: float) -> tuple[bool, str]:
    """Whether ``one`` breaks significantly more samples within ``eps`` than ``others`` together, and the sentence."""
    by_one = _broken(one.columns, str(one.spec.norm), eps)
    by_others = np.logical_or.reduce([_broken(j.columns, str(j.spec.norm), eps) for j in others])
    more, fewer = int((by_one & ~by_others).sum()), int((by_others & ~by_one).sum())
    p = mcnemar(~by_one, ~by_others)
    sentence = (
        f"{one.threat_model} {one.spec} breaks {more} of {len(by_one)} samples that {said} cannot break, "
        f"and fails on {fewer} that can be broken so (p = {p:.2g})"
    )
    return more > fewer and p < _P, sentence


def _not_zero(probe: Mapping[str, Any]) -> Flag:
    left, n = sum(_survivors(probe["accuracy_by_eps"])), probe["clean_correct"]
    return Flag(
        name="not_zero_at_unbounded_eps",
        fired=_is_not_zero(probe),
        measured=f"PGD up to the whole pixel range ({probe['norm']} norm {probe['accuracy_by_eps'][-1]['eps']:.4g}) "
        f"leaves {left} of {n} images correct."
        if n
        else _NOTHING_CORRECT,
        remedy="An attack that may show any image must always succeed, so this one does not work here: look for masked "
        "or saturated gradients, then use BPDA, a margin loss or a score-based attack.",
    )


_NOTHING_CORRECT = "Not measurable: no image of the probe is classified correctly without an attack."


def _is_not_zero(probe: Mapping[str, Any]) -> bool:
    left = sum(_survivors(probe["accuracy_by_eps"]))
    return wilson_interval(left, probe["clean_correct"])[0] > _UNBOUNDED_LIMIT


def _not_falling_with_eps(probe: Mapping[str, Any]) -> Flag:
    runs = probe["accuracy_by_eps"]
    flat = len(runs) > 1 and _is_not_zero(probe) and not _rises(runs[-1], runs[0])
    return Flag(
        name="not_falling_with_eps",
        fired=flat or _any_rises(runs),
        measured=_said(runs, "eps", probe) if len(runs) > 1 else "Not measurable: eps is the whole range already.",
        remedy="A larger ball contains the smaller one, so the attack loses its way in it: give it more steps and "
        "restarts, then look for masked gradients (BPDA, score-based attack).",
    )


def _not_falling_with_steps(probe: Mapping[str, Any]) -> Flag:
    runs = probe["accuracy_by_steps"]
    return Flag(
        name="not_falling_with_steps",
        fired=_any_rises(runs),
        measured=_said(runs, "steps", probe),
        remedy="More steps must not make an attack weaker: tune its step size or use APGD, which adapts it; if the "
        "output is random, average the gradient (EOT).",
    )


def _any_rises(runs: Sequence[Mapping[str, Any]]) -> bool:
    return any(_rises(a, b) for i, a in enumerate(runs) for b in runs[i + 1 :])


def _rises(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether significantly more images are correct in run ``b`` than in run ``a``."""
    before, after = np.array(a["correct"], dtype=bool), np.array(b["correct"], dtype=bool)
    return bool(after.sum() > before.sum()) and mcnemar(before, after) < _P


def _said(runs: Sequence[Mapping[str, Any]], key: str, probe: Mapping[str, Any]) -> str:
    if not probe["clean_correct"]:
        return _NOTHING_CORRECT
    points = ", ".join(f"{sum(run['correct'])} at {key} {run[key]:.4g}" for run in runs)
    return f"Of {probe['clean_correct']} images PGD leaves correct: {points}."


def _zero_gradients(probe: Mapping[str, Any]) -> Flag:
    counted = probe["zero_gradients"]
    n, entropy, margin = int(counted["n"]), counted["cross_entropy"], counted["margin"]

    def dead(loss: Mapping[str, int]) -> bool:
        return loss["zero"] + loss["tiny"] + loss["not_finite"] > _DEAD_SHARE * n

    said = [
        f"that of the {name} is zero for {loss['zero']}, below {_TINY_GRADIENT:g} for {loss['tiny']} and not finite for "
        f"{loss['not_finite']}"
        for name, loss in (("cross entropy", entropy), ("margin", margin))
    ]
    return Flag(
        name="zero_gradients",
        fired=dead(entropy) or dead(margin),
        measured=f"Gradients of {n} correct images: {'; '.join(said)}." if n else _NOTHING_CORRECT,
        remedy="The network itself passes no gradient on: replace the step that stops it by a differentiable one in the "
        "backward pass (BPDA), or attack by scores alone (Square)."
        if dead(margin)
        else "Only the loss saturates: attack the margin of the logits, free of their scale (DLR), instead of the cross "
        "entropy, or divide the logits by a constant.",
    )


def _random_output(probe: Mapping[str, Any]) -> Flag:
    seen = probe["random_output"]
    return Flag(
        name="random_output",
        fired=seen["largest_difference"] > _NOISE_TOLERANCE * seen["largest_output"],
        measured=f"The outputs of {seen['passes']} passes of one batch differ by up to {seen['largest_difference']:.3g} "
        f"(largest output {seen['largest_output']:.3g}); {seen['changed']} of {probe['n']} predictions change.",
        remedy="Attack the expectation: average the gradient over many passes at each step (EOT), and judge every "
        "example by many passes, too.",
    )


def _batch_dependent(probe: Mapping[str, Any]) -> Flag:
    seen = probe["batch_dependence"]
    n = seen["n"]
    return Flag(
        name="batch_dependent_output",
        fired=seen["dependent"] > max(_DEPENDENT_SHARE * n, min(1, n - 1)),
        measured=f"The outputs of {seen['dependent']} of {n} images depend on the batch that they are shown in: in "
        f"{seen['batches']} batches of other images, number or order they differ by up to "
        f"{seen['largest_difference']:.3g} (largest output {seen['largest_output']:.3g}); {seen['changed']} of {n} "
        "predictions change.",
        remedy="Accuracy depends on evaluation.chunk_size and on the neighbours of each image, and an attack on one "
        "image moves the outputs of others: no number here is that of a classifier of single images. Put every batch "
        "norm into eval mode, with running statistics (track_running_stats=True), and remove whatever averages or "
        "normalises over the batch; then evaluate again. A network that computes in bfloat16 or TF32 by itself may differ "
        "for that alone: evaluate it in float32.",
    )


def _not_logits(probe: Mapping[str, Any]) -> Flag:
    return Flag(
        name="not_logits",
        fired=probe["output"] != "logits",
        measured={
            "logits": "The outputs are no probabilities.",
            "probabilities": "The outputs are probabilities: the cross entropy applies a second softmax to them.",
            "log_probabilities": "The outputs are logarithms of probabilities; the cross entropy and the margin are those "
            "of the logits.",
        }[probe["output"]],
        remedy="Attack the logits before the (log-)softmax: its gradient vanishes where the network is sure.",
    )


def _active_test_failed(active: Sequence[Mapping[str, Any]]) -> Flag:
    failed = tuple(test["attack"] for test in active if test["passed"] is False)
    said = [
        f"{t['attack']}{' (without its Square)' if len(t['parts']) > 1 else ''} found {t['found']} of {t['n']} planted examples ({t['norm']} {t['eps']:.4g}), {_RANDOM_POINTS} random points "
        f"{t['random_found']}, {t['left_out']} left out" + (" (decides nothing)" if t["passed"] is None else "")
        for t in active
    ]
    return Flag(
        name="active_test_failed",
        fired=bool(failed),
        measured="; ".join(said) or "Not measurable: no attack was tested.",
        remedy="Do not report these attacks as robustness on this network: strengthen them (steps, restarts, margin loss, "
        "BPDA, EOT) until they find what was planted.",
        attacks=failed,
    )
