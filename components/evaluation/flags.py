"""Signs that an attack failed, so that a weak evaluation is not taken for a robust network.

docs/reliability.md explains each flag. Sources: Carlini et al. 2019,
https://arxiv.org/abs/1902.06705; Croce & Hein 2020, https://arxiv.org/abs/2003.01690; Pintor et al.
2022, https://arxiv.org/abs/2106.09947; Zimmermann et al. 2022, https://arxiv.org/abs/2206.13991
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.attacks.spec import AttackSpec
from components.evaluation.active_test import AUTOATTACK, RANDOM_POINTS
from components.evaluation.judge import Columns
from components.evaluation.metrics import broken
from components.evaluation.probe import TINY_GRADIENT, survivors
from components.evaluation.statistics import mcnemar, wilson_interval
from components.threat_models import CLEAN, WHITE_BOX

_P = 0.01
"""A paired difference is significant below this p-value."""
_NOISE_TOLERANCE = 1e-4
"""Most by which two outputs for one input may differ, relative to the largest output."""
_DEPENDENT_SHARE = 0.05
"""Share of images, beyond one, whose outputs may differ between batches.

Rounding moves an honest network across a step of its own, but rarely.
"""
_DEAD_SHARE = 0.05
"""Share of images that may have no usable gradient."""
_UNBOUNDED_LIMIT = 0.01
"""Highest accuracy at unbounded eps."""
_NO_ITERATED_ASCENT = ("noise", "fgsm", "square", "adaptive")
"""Attacks that are no iterated ascent of the loss alone."""
_NOTHING_CORRECT = "Not measurable: no image of the probe is classified correctly without an attack."


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One evaluation of a model."""

    threat_model: str
    """"white_box", "grey_box", "transfer", "transfer:NAME", "black_box" or "random"."""
    spec: AttackSpec
    columns: Columns
    """The columns of :func:`components.evaluation.judge.judge` for the examples of ``spec``."""

    @property
    def limit(self) -> float:
        """The budget of the attack; infinite for an attack of minimal norm."""
        return math.inf if self.spec.eps is None else self.spec.eps


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One sign of a failed attack."""

    name: str
    fired: bool
    measured: str
    """A sentence with the numbers, or with the reason why nothing could be measured."""
    remedy: str
    """What to do if the flag fired."""
    attacks: tuple[str, ...] = ()
    """The attacks that the flag fired for, if it is decided for each attack."""

    def to_dict(self) -> dict[str, Any]:
        """Return the flag in JSON types."""
        return {**dataclasses.asdict(self), "attacks": list(self.attacks)}


def flags(
    probe: Mapping[str, Any], judged: Sequence[Judged], active: Sequence[Mapping[str, Any]] | None = None
) -> list[Flag]:
    """Return all flags of one model, fired or not, always in the same order.

    Args:
        probe: the result of :func:`components.evaluation.probe.probe`.
        judged: every evaluation of the model, with the same samples in the same order.
        active: the results of :func:`components.evaluation.active_test.active_test`, one for each
            attack that was tested.

    Raises:
        ValueError: evaluations have different samples.
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
    # Only white-box evaluations count: examples of a single step often transfer better.
    white_box = [j for j in judged if j.threat_model == WHITE_BOX and j.spec.kind == "budget"]
    sentences, weaker = [], []
    for single in (j for j in white_box if j.spec.name == "fgsm"):
        for iterated in (j for j in white_box if j.spec.name not in _NO_ITERATED_ASCENT):
            a, b = single.spec, iterated.spec
            # The target must be the same too, because a target makes any attack weaker.
            if (a.norm, a.eps, a.target) != (b.norm, b.eps, b.target):
                continue
            fired, sentence = _breaks_more(single, [iterated], str(b), single.limit)
            sentences.append(sentence)
            weaker += [str(b)] if fired else []
    return Flag(
        name="iterative_weaker_than_single_step",
        fired=bool(weaker),
        measured="; ".join(sentences)
        or "Not measurable: no white-box FGSM beside an iterative attack of the same eps.",
        remedy="The iterations follow a masked gradient, or their step is too short or too long. Raise steps, vary the "
        "step size and restarts, and attack with APGD. If that does not help, replace what masks the gradient (BPDA).",
        attacks=tuple(weaker),
    )


def _others_stronger(judged: Sequence[Judged]) -> Flag:
    sentences, evidence, stronger = [], [], []
    for other in judged:
        if other.threat_model in (WHITE_BOX, CLEAN):
            continue
        white_box = [j for j in judged if j.threat_model == WHITE_BOX and j.spec.norm == other.spec.norm]
        # AutoAttack's own Square would hide that gradients find nothing.
        by_gradients = [j for j in white_box if j.spec.name != AUTOATTACK]
        limits = [j.limit for j in by_gradients if j.limit >= other.limit]
        if not limits:
            continue
        # An attack of minimal norm has an answer for every budget.
        eps = other.limit if math.inf in limits else min(limits)
        without = f" (without {AUTOATTACK}, which ends in a Square)" if len(by_gradients) < len(white_box) else ""
        fired, sentence = _breaks_more(other, by_gradients, f"all white-box attacks together{without}", eps)
        sentences.append(sentence)
        if fired:
            evidence.append(sentence)
            stronger.append(f"{other.threat_model} {other.spec}")
    if stronger and len(sentences) > len(stronger):
        # Count the other comparisons instead of listing them: dozens would bury the evidence.
        evidence.append(f"none of {len(sentences) - len(stronger)} others breaks significantly more")
    return Flag(
        name="black_box_or_transfer_stronger",
        fired=bool(stronger),
        measured="; ".join(evidence or sentences)
        or "Not measurable: no white-box attack beside another attack of its norm and budget (autoattack, which ends "
        "in a Square, does not count).",
        remedy="A white-box attack could have made the same examples, so its gradient is masked or the attack is too "
        "weak. Approximate what masks the gradient (BPDA), add a score-based attack (Square), and report the worst "
        "case over all attacks.",
        attacks=tuple(stronger),
    )


def _breaks_more(attack: Judged, others: Sequence[Judged], title: str, eps: float) -> tuple[bool, str]:
    """Return whether an attack breaks significantly more samples than others, and the sentence.

    Args:
        attack: the attack.
        others: the others, which count together.
        title: name of the others in the sentence.
        eps: the budget.
    """
    norm = str(attack.spec.norm)
    by_attack = broken(attack.columns, norm, eps)
    by_others = np.logical_or.reduce([broken(other.columns, norm, eps) for other in others])
    more, fewer = int((by_attack & ~by_others).sum()), int((by_others & ~by_attack).sum())
    p = mcnemar(~by_attack, ~by_others)
    sentence = (
        f"{attack.threat_model} {attack.spec} breaks {more} of {len(by_attack)} samples that {title} cannot break, "
        f"and cannot break {fewer} that these can (p = {p:.2g})"
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
        remedy="An attack that may show any image must always succeed, so this one does not work on this network. Look "
        "for masked or saturated gradients, then use BPDA, a margin loss or a score-based attack.",
    )


def _is_not_zero(probe: Mapping[str, Any]) -> bool:
    left = sum(survivors(probe["accuracy_by_eps"]))
    return wilson_interval(left, probe["clean_correct"])[0] > _UNBOUNDED_LIMIT


def _not_falling_with_eps(probe: Mapping[str, Any]) -> Flag:
    runs = probe["accuracy_by_eps"]
    flat = len(runs) > 1 and _is_not_zero(probe) and not _rises(runs[-1], runs[0])
    return Flag(
        name="not_falling_with_eps",
        fired=flat or _any_rises(runs),
        measured=_points(runs, "eps", probe) if len(runs) > 1 else "Not measurable: eps is the whole range already.",
        remedy="A larger ball contains the smaller one, so the attack misses examples in it. Give it more steps and "
        "restarts, then look for masked gradients (BPDA, score-based attack).",
    )


def _not_falling_with_steps(probe: Mapping[str, Any]) -> Flag:
    runs = probe["accuracy_by_steps"]
    return Flag(
        name="not_falling_with_steps",
        fired=_any_rises(runs),
        measured=_points(runs, "steps", probe),
        remedy="More steps must not make an attack weaker. Tune its step size or use APGD, which adapts it. If the "
        "output is random, average the gradient (EOT).",
    )


def _any_rises(runs: Sequence[Mapping[str, Any]]) -> bool:
    return any(_rises(a, b) for i, a in enumerate(runs) for b in runs[i + 1 :])


def _rises(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Tell whether significantly more images are correct in run ``b`` than in run ``a``."""
    before, after = np.array(a["correct"], dtype=bool), np.array(b["correct"], dtype=bool)
    return bool(after.sum() > before.sum()) and mcnemar(before, after) < _P


def _points(runs: Sequence[Mapping[str, Any]], key: str, probe: Mapping[str, Any]) -> str:
    """Return a sentence with the number of correct images of each run."""
    if not probe["clean_correct"]:
        return _NOTHING_CORRECT
    points = ", ".join(f"{sum(run['correct'])} at {key} {run[key]:.4g}" for run in runs)
    return f"Of {probe['clean_correct']} images PGD leaves correct: {points}."


def _zero_gradients(probe: Mapping[str, Any]) -> Flag:
    gradients = probe["zero_gradients"]
    n = int(gradients["n"])
    losses = {"cross entropy": gradients["cross_entropy"], "margin": gradients["margin"]}
    dead = {name: c["zero"] + c["tiny"] + c["not_finite"] > _DEAD_SHARE * n for name, c in losses.items()}
    parts = [
        f"the gradient of the {name} is zero for {counts['zero']}, below {TINY_GRADIENT:g} for {counts['tiny']} and "
        f"not finite for {counts['not_finite']}"
        for name, counts in losses.items()
    ]
    return Flag(
        name="zero_gradients",
        fired=any(dead.values()),
        measured=f"Of {n} correct images, {'; '.join(parts)}." if n else _NOTHING_CORRECT,
        remedy="The network itself passes no gradient on. Replace the step that stops it by a differentiable one in "
        "the backward pass (BPDA), or attack by scores alone (Square)."
        if dead["margin"]
        else "Only the loss saturates. Instead of the cross entropy, attack the margin of the logits, free of their "
        "scale (DLR), or divide the logits by a constant.",
    )


def _random_output(probe: Mapping[str, Any]) -> Flag:
    measured = probe["random_output"]
    difference, largest = measured["largest_difference"], measured["largest_output"]
    return Flag(
        name="random_output",
        fired=difference > _NOISE_TOLERANCE * largest,
        measured=f"The outputs of {measured['passes']} passes of one batch differ by up to {difference:.3g} (largest "
        f"output {largest:.3g}). {measured['changed']} of {probe['n']} predictions change.",
        remedy="Attack the expectation: average the gradient over many passes at each step (EOT), and also judge every "
        "example by many passes.",
    )


def _batch_dependent(probe: Mapping[str, Any]) -> Flag:
    measured = probe["batch_dependence"]
    n = measured["n"]
    return Flag(
        name="batch_dependent_output",
        fired=measured["dependent"] > max(_DEPENDENT_SHARE * n, min(1, n - 1)),
        measured=f"The outputs of {measured['dependent']} of {n} images depend on the batch that they are shown in: in "
        f"{measured['batches']} batches of other images, number or order they differ by up to "
        f"{measured['largest_difference']:.3g} (largest output {measured['largest_output']:.3g}). "
        f"{measured['changed']} of {n} predictions change.",
        remedy="Accuracy depends on evaluation.chunk_size and on the neighbours of each image, and an attack on one "
        "image moves the outputs of others. So no number here is that of a classifier of single images. Put every "
        "batch norm into eval mode, with running statistics (track_running_stats=True), remove every average or "
        "normalisation over the batch, and evaluate again. A network that computes in bfloat16 or TF32 by itself may "
        "differ for that reason alone: evaluate it in float32.",
    )


def _not_logits(probe: Mapping[str, Any]) -> Flag:
    return Flag(
        name="not_logits",
        fired=probe["output"] != "logits",
        measured={
            "logits": "The outputs are not probabilities.",
            "probabilities": "The outputs are probabilities: the cross entropy applies a second softmax to them.",
            "log_probabilities": "The outputs are logarithms of probabilities. Their cross entropy and margin are "
            "those of the logits.",
        }[probe["output"]],
        remedy="Attack the logits before the (log-)softmax: its gradient vanishes where the network is sure.",
    )


def _active_test_failed(active: Sequence[Mapping[str, Any]]) -> Flag:
    failed = tuple(test["attack"] for test in active if test["passed"] is False)
    return Flag(
        name="active_test_failed",
        fired=bool(failed),
        measured="; ".join(map(_active_test, active)) or "Not measurable: no attack was tested.",
        remedy="Do not report these attacks as a sign of robustness of this network. Strengthen them (steps, restarts, "
        "margin loss, BPDA, EOT) until they find the planted examples.",
        attacks=failed,
    )


def _active_test(test: Mapping[str, Any]) -> str:
    """Return the result of an active test in words."""
    without = " (without its Square)" if len(test["parts"]) > 1 else ""
    undecided = " (decides nothing)" if test["passed"] is None else ""
    return (
        f"{test['attack']}{without} found {test['found']} of {test['n']} planted examples ({test['norm']} "
        f"{test['eps']:.4g}), {RANDOM_POINTS} random points {test['random_found']}, "
        f"{test['left_out']} left out{undecided}"
    )
