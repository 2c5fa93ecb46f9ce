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

from components.attacks.spec import AttackSpec
from components.evaluation.judge import Columns
from components.evaluation.metrics import broken
from components.evaluation.probe import TINY_GRADIENT, survivors
from components.evaluation.statistics import mcnemar, wilson_interval

_P = 0.01  # a paired difference is significant below
_NOISE_TOLERANCE = 1e-4  # of two outputs for one input, relative to the largest output
_DEPENDENT_SHARE = 0.05
"""Share of images, beyond one, that may differ: rounding moves an honest network across a step of its own, but rarely."""
_DEAD_SHARE = 0.05  # of images without a usable gradient
_UNBOUNDED_LIMIT = 0.01  # what the accuracy at unbounded eps may be
_NO_ITERATED_ASCENT = ("noise", "fgsm", "square", "adaptive")  # of the loss alone
_MIXTURE = "autoattack"  # of gradients and Square, each on what the others left
_RANDOM_POINTS = 100


# --- flags


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One evaluation: what :func:`components.evaluation.judge.judge` returned for the examples of ``spec``.

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
    by_one = broken(one.columns, str(one.spec.norm), eps)
    by_others = np.logical_or.reduce([broken(j.columns, str(j.spec.norm), eps) for j in others])
    more, fewer = int((by_one & ~by_others).sum()), int((by_others & ~by_one).sum())
    p = mcnemar(~by_one, ~by_others)
    sentence = (
        f"{one.threat_model} {one.spec} breaks {more} of {len(by_one)} samples that {said} cannot break, "
        f"and fails on {fewer} that can be broken so (p = {p:.2g})"
    )
    return more > fewer and p < _P, sentence


def _not_zero(probe: Mapping[str, Any]) -> Flag:
    left, n = sum(survivors(probe["accuracy_by_eps"])), probe["clean_correct"]
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
    left = sum(survivors(probe["accuracy_by_eps"]))
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
        f"that of the {name} is zero for {loss['zero']}, below {TINY_GRADIENT:g} for {loss['tiny']} and not finite for "
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
