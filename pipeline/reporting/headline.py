"""The verdict of a run in words: what a model withstands, and whether it is more than its control does.

A difference counts only if a test of significance of the record shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from components.config import roles
from components.evaluation.statistics import sign_test
from components.threat_models import CLEAN, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord, WorstCase
from pipeline.reporting import over_seeds, sentences, verdicts
from pipeline.reporting.labels import attack_text, attack_title, budget_text, count_text, parsed_attack, percent
from pipeline.reporting.records import Row

SIGNIFICANCE = 0.05
"""A difference counts below this p-value, divided by the number of tests on one pair of models."""
FEW_IMAGES = 50
"""With fewer images than this, the verdict says how large a difference must be to show."""
MANY_MODELS = 2
"""With more defended models than this, the verdict gives fewer reasons for each."""
_DEFENSES = {"defend++": "Defend++", "adversarial": "adversarial training", "comdefend": "ComDefend"}
_MORE, _LESS = "more robust", "less robust"
_MIXED = "more robust at one budget and less robust at another"
_NOT_MORE, _SAME = "not more robust than", "not distinguishable in robustness from"
_GUESSING, _CONTROL_GUESSES, _NOT_COMPARED = "guessing", "control guesses", "not compared"


@dataclass(frozen=True)
class Verdict:
    """A headline, and the sentences that give its reasons. Both are empty before any attack."""

    headline: str
    reasons: Sequence[str]


@dataclass(frozen=True)
class _Finding:
    """A defended model and its control at one budget.

    ``direction`` is 1 if the model is more robust, -1 if the control is, 0 if no test shows either.
    """

    direction: int
    nothing_left: bool
    sentence: str


def main_budget(record: RunRecord) -> tuple[str, float] | None:
    """Return the (norm, eps) that tells most about a run; None for a record without worst cases.

    A budget that leaves something of a model comes first, then that of most attacks, then Linf,
    then the smaller eps.
    """
    left: dict[tuple[str, float], float] = {}
    for w in record.worst_case or ():
        if w.threat_model == WHITE_BOX:
            left[w.norm, w.eps] = max(w.accuracy, left.get((w.norm, w.eps), 0.0))
    specs = [parsed_attack(attack) for attack in {e.attack for e in record.evaluations if not e.curve}]
    own = [(spec.norm, spec.eps) for spec in specs if spec is not None and spec.name != "noise"]
    return max(left, key=lambda case: (left[case] > 0, own.count(case), case[0] == "linf", -case[1]), default=None)


def verdict(record: RunRecord, comparisons: Sequence[Row] = ()) -> Verdict:
    """Return the verdict of a run.

    Args:
        comparisons: the result of :func:`pipeline.reporting.results.comparisons`, for the reasons.
    """
    if not any(e.source for e in record.evaluations):
        return Verdict("", [])
    controls = _controls(record)
    groups: dict[str, list[str]] = {}
    reasons = _guessing(record)
    for model, control in controls.items():
        findings = _findings(record, model, control)
        phrase = _phrase(record, model, control, findings)
        groups.setdefault(phrase, []).append(model)
        if phrase in (_GUESSING, _CONTROL_GUESSES):
            continue
        # With many models, the other budgets are left to the tables unless they show a difference.
        shown = [f for i, f in enumerate(findings) if i == 0 or f.direction or len(controls) <= MANY_MODELS]
        reasons += [finding.sentence for finding in shown]
        reasons += _transfer(comparisons, model, control)
    if any(phrase in (_SAME, _NOT_MORE) for phrase in groups):
        reasons += _too_few(record)
    if len(controls) > 1 and groups.keys() - {_GUESSING, _CONTROL_GUESSES, _NOT_COMPARED}:
        reasons.append("The tests are corrected for the number of budgets, not for the number of models.")
    alone = [name for name in _subjects(record) if name not in controls]
    headlines = [_group_headline(record, phrase, models, controls) for phrase, models in groups.items()]
    for model in alone:
        headline, sentence = _without_control(record, model)
        headlines += [headline] if headline else []
        reasons += [sentence] if sentence else []
    return Verdict("; ".join(headlines), [*reasons, *_trust(record)])


def _subjects(record: RunRecord) -> list[str]:
    """Return the attacked models that the run is about, as named in the recipe."""
    attacked = {record.bases[e.model] for e in record.evaluations if e.source}
    role = {base: record.roles[name] for name, base in record.bases.items() if base in attacked}
    return [base for base, r in role.items() if r in ("defended", "given")] or list(role)


def _controls(record: RunRecord) -> dict[str, str]:
    """Return each attacked defended model and its attacked control, both as named in the recipe."""
    controls = roles.control_of(record.experiment)
    evaluated = {record.bases[e.model] for e in record.evaluations if e.source}
    return {model: controls[model] for model in _subjects(record) if controls.get(model) in evaluated}


def _findings(record: RunRecord, model: str, control: str) -> list[_Finding]:
    if record.experiment.seeds > 1:
        return _findings_over_seeds(record, model, control)
    kept = {(w.model, w.norm, w.eps): w for w in record.worst_case or () if w.threat_model == WHITE_BOX}
    pairs = [
        pair
        for pair in record.worst_case_pairs or ()
        if (pair.model, pair.against, pair.threat_model) == (model, control, WHITE_BOX)
        # A damaged part of a record is left out when it is read.
        and {(model, pair.norm, pair.eps), (control, pair.norm, pair.eps)} <= kept.keys()
    ]
    budget, findings = main_budget(record), []
    level = SIGNIFICANCE / max(1, len(pairs))
    for pair in sorted(pairs, key=lambda pair: (pair.norm, pair.eps) != budget):
        ours, theirs = (kept[name, pair.norm, pair.eps] for name in (model, control))
        differs = pair.p < level
        direction = (1 if pair.only_model > pair.only_against else -1) if differs else 0
        at = f"At {budget_text(pair.norm, pair.eps)}, white-box"
        if pair.only_model == pair.only_against == 0:
            left = "leaves" if _alone(record, (ours, theirs)) else "leave"
            attacks = _alone(record, (ours, theirs)) or "attacks"
            sentence = f"{at} {attacks} {left} {_count(ours)} images of both {model} and {control}."
        else:
            p = "p < 0.0001" if pair.p < 0.0001 else f"p = {pair.p:.2g}"
            test = f"exact McNemar test, {p}" if differs else f"no significant difference: exact McNemar test, {p}"
            if level <= pair.p < SIGNIFICANCE:
                test += f"; with {len(pairs)} budgets it must be below {level:.2g}"
            sentence = (
                f"{at} attacks leave {_count(ours)} images of {model} and {_count(theirs)} of {control} ({test})."
            )
        findings.append(_Finding(direction, ours.accuracy == 0, sentence))
    return findings or _findings_of_single_attacks(record, model, control)


def _findings_over_seeds(record: RunRecord, model: str, control: str) -> list[_Finding]:
    """Compare the worst cases seed by seed. A difference must exceed the noise of seeds and of images."""
    findings = []
    means = {(w["model"], w["norm"], w["eps"]): w for w in _worst_over_seeds(record)}
    budget = main_budget(record)
    tests = sum(row["model"] == model for row in over_seeds.worst_differences(record, control))
    level = SIGNIFICANCE / max(1, tests)
    rows = [row for row in over_seeds.worst_differences(record, control, level) if row["model"] == model]
    for row in sorted(rows, key=lambda row: (row["norm"], row["eps"]) != budget):
        difference, half, mean = row["difference"], row["half_width"], means[model, row["norm"], row["eps"]]
        in_images = _differs_in_images(record, row, level)
        direction = (1 if difference > 0 else -1) if row["resolved"] and in_images else 0
        together = f", 95 % for {tests} budgets together" if tests > 1 else ""
        explained = "more than seeds alone explain" if row["resolved"] else "no more than seeds alone explain"
        if row["resolved"] and not in_images:
            explained += ", but too few images to be significant"
        sentence = (
            f"At {budget_text(row['norm'], row['eps'])}, white-box attacks leave {model} {percent(mean['mean'])} % on "
            f"average over {mean['seeds']} seeds, {100 * difference:+.1f} points against {control} "
            f"(± {100 * half:.1f}{together}): {explained}."
        )
        findings.append(_Finding(direction, mean["mean"] == 0, sentence))
    return findings


def _worst_over_seeds(record: RunRecord) -> list[Row]:
    """Return the worst cases over the seeds, of examples made on each model itself."""
    return [row for row in over_seeds.worst_over_seeds(record) if row["threat_model"] == WHITE_BOX]


def _differs_in_images(record: RunRecord, row: Row, level: float) -> bool:
    """Tell whether a difference over the seeds is significant over the images too.

    All seeds are attacked on the same images. So the test takes the mean counts of a pair as those
    of one pair. Without it, one image more in each of two seeds would be a difference without noise.
    A record without pairs passes.
    """
    case = tuple(row[key] for key in ("model", "reference", "threat_model", "norm", "eps"))
    pairs = [
        pair
        for pair in record.worst_case_pairs or ()
        if (record.bases[pair.model], record.bases[pair.against], pair.threat_model, pair.norm, pair.eps) == case
    ]
    if not pairs:
        return True
    counts = (fmean(pair.only_model for pair in pairs), fmean(pair.only_against for pair in pairs))
    return sign_test(*map(round, counts)) < level


def _findings_of_single_attacks(record: RunRecord, model: str, control: str) -> list[_Finding]:
    """Compare the most harmful attacks: records of early revisions have no worst case per sample."""
    ours, theirs = (most_harmful(record, name) for name in (model, control))
    if ours is None or theirs is None:
        return []
    (low, high), (low_control, high_control) = ours.interval, theirs.interval
    direction = 1 if low > high_control else -1 if high < low_control else 0
    overlap = "do not overlap" if direction else "overlap"
    sentence = (
        f"White-box {attack_text(ours.attack)} leaves {_count(ours)} images of {model}; the most harmful attack on "
        f"{control} leaves {_count(theirs)}. The 95 % intervals {overlap}."
    )
    return [_Finding(direction, ours.accuracy == 0, sentence)]


def most_harmful(record: RunRecord, model: str) -> EvaluationEntry | None:
    """Return the most harmful white-box attack within a budget on a model; None without one."""
    attacks = [e for e in record.evaluations if (e.model, e.threat_model) == (model, WHITE_BOX) and not e.curve]
    return min(attacks, key=lambda e: e.accuracy, default=None)


def _alone(record: RunRecord, cases: Sequence[WorstCase]) -> str:
    """Return the title of an attack that alone does as much harm as all together; "" without one."""
    titles: list[dict[str, None]] = []
    for case in cases:
        specs = {e.attack: parsed_attack(e.attack) for e in record.evaluations if not e.curve}
        alone = [
            attack_title(e.attack)[0]
            for e in record.evaluations
            if (e.model, e.threat_model, e.accuracy) == (case.model, WHITE_BOX, case.accuracy)
            and (spec := specs.get(e.attack)) is not None
            and (spec.norm, spec.eps) == (case.norm, case.eps)
        ]
        titles.append(dict.fromkeys(alone))
    common = [title for title in titles[0] if all(title in other for other in titles)]
    return next((title for title in common if title == "PGD"), common[0] if common else "")


def _count(case: WorstCase | EvaluationEntry) -> str:
    return f"{round(case.accuracy * case.n):,} of {case.n:,}"


def _transfer(comparisons: Sequence[Row], model: str, control: str) -> list[str]:
    """Say under which transferred attacks a model is right more or less often than its control."""
    rows = [row for row in comparisons if (row["defended"], row["control"]) == (model, control)]
    if not rows:
        return []

    differing = [row for row in rows if row["p"] < SIGNIFICANCE / len(rows)]
    names: dict[str, dict[str, None]] = {"more": {}, "less": {}}
    for row in differing:
        side = "more" if row["only_defended"] > row["only_control"] else "less"
        names[side][attack_title(row["attack"])[0]] = None
    where = f"On examples transferred from {rows[0]['source']}"
    compared = f"({len(rows)} attack{'s' if len(rows) > 1 else ''} compared)"
    if not differing:
        return [f"{where}, no difference between {model} and {control} is significant {compared}."]
    parts = [f"{side} often than {control} under {_joined(list(titles))}" for side, titles in names.items() if titles]
    return [f"{where}, {model} is right significantly {', and '.join(parts)} {compared}."]


def _guessing(record: RunRecord) -> list[str]:
    """Name the models whose clean accuracy cannot be told from chance."""
    rows = verdicts.near_chance(record)
    if not rows:
        return []
    accuracies = ", ".join(f"{row['model']} {percent(row['accuracy'])} %" for row in rows)
    n = count_text(sorted({row["n"] for row in rows}))
    return [f"Clean accuracy that cannot be told from chance ({percent(rows[0]['chance'])} %): {accuracies} ({n})."]


def _too_few(record: RunRecord) -> list[str]:
    n = min(w.n for w in record.worst_case or record.evaluations)
    budgets = len({(w.norm, w.eps) for w in record.worst_case or ()}) or 1
    least = next(m for m in range(1, 100) if 2 * 0.5**m < SIGNIFICANCE / budgets)
    if n >= FEW_IMAGES or record.experiment.seeds > 1:
        return []
    return [f"With n = {n}, a difference shows only from {least} images on, all in one direction."]


def _phrase(record: RunRecord, model: str, control: str, findings: Sequence[_Finding]) -> str:
    guessing = {record.bases[row["model"]] for row in verdicts.near_chance(record)}
    if model in guessing:
        return _GUESSING
    if control in guessing:
        return _CONTROL_GUESSES
    if not findings:
        return _NOT_COMPARED
    directions = {finding.direction for finding in findings} - {0}
    if not directions:
        return _NOT_MORE if all(finding.nothing_left for finding in findings) else _SAME
    compared = _MIXED if len(directions) > 1 else _MORE if 1 in directions else _LESS
    # An attack that fails on a model leaves too much of it, so the more robust one is in doubt.
    if any(_doubted(record, model if direction > 0 else control) for direction in directions):
        return f"apparently {compared}, but under attacks that cannot be trusted, than"
    return f"{compared} than"


def _doubted(record: RunRecord, model: str) -> bool:
    """Tell whether a flag was raised on a model, or an attack on it failed its active test."""
    names = [name for name, base in record.bases.items() if base == model]
    raised = any(flag["model"] in names for flag in verdicts.raised_flags(record))
    return raised or any(w["model"] in names and w["untrusted"] for w in verdicts.worst_cases(record))


def _group_headline(record: RunRecord, phrase: str, models: Sequence[str], controls: Mapping[str, str]) -> str:
    is_, its = ("is", "its") if len(models) == 1 else ("are", "their")
    if phrase == _GUESSING:
        return f"{_joined(models)} cannot be told from guessing on clean images, so {its} robustness means nothing"
    subject = _joined(models)
    if len(controls) == 1:
        defense = record.experiment.first_replicates()[models[0]].defense
        subject = f"{models[0]} ({_DEFENSES.get(defense, defense)})"
    if phrase == _CONTROL_GUESSES:
        return f"{subject} cannot be compared with {its} control, which cannot be told from guessing on clean images"
    if phrase == _NOT_COMPARED:
        return f"{subject} {is_} not compared with {its} control, because the run lacks comparable white-box results"
    return f"{subject} {is_} {phrase} {its} control here"


def _without_control(record: RunRecord, model: str) -> tuple[str, str]:
    """Return headline and reason for a model that is compared with no control; "" without attacks."""
    names = [name for name, base in record.bases.items() if base == model]
    left = _left(record, model, names)
    if left is None:
        return "", ""
    if any(row["model"] in names for row in verdicts.near_chance(record)):
        return _group_headline(record, _GUESSING, [model], {}), ""
    headline, texts = left
    clean = [e for e in record.evaluations if e.model in names and e.threat_model == CLEAN]
    without = ""
    if clean:
        right = _count(clean[0]) if len(clean) == 1 else f"{percent(fmean(e.accuracy for e in clean))} % on average"
        without = f" Without an attack, {right} are right."
    missing = ""
    if record.roles[names[0]] == "defended":
        missing = " This run has no control for it, so nothing of that can be attributed to the defense."
    return headline, f"{texts}{without}{missing}".strip()


def _left(record: RunRecord, model: str, names: Sequence[str]) -> tuple[str, str] | None:
    """Return headline and numbers of what attacks leave of a model; None if it met none of its own."""
    budget = main_budget(record)
    # A model that is broken needs no trust in the attacks.
    doubt = ", but its attacks cannot be trusted" if _doubted(record, model) else ""
    # If all seeds but one diverged, that one is shown by its own name.
    if rows := [row for row in _worst_over_seeds(record) if row["model"] == model and row["seeds"] > 1]:
        row = next((row for row in rows if (row["norm"], row["eps"]) == budget), rows[0])
        share = f"{percent(row['mean'])} % of the images on average over {row['seeds']} seeds"
        values = [(r["norm"], r["eps"], r["mean"], r["min"], r["max"]) for r in rows]
        at, brackets = (row["norm"], row["eps"]), "lowest to highest seed"
        headline = f"{model} withstands the attacks on {share} at {budget_text(*at)}{doubt}"
        if row["max"] == 0:
            headline = f"{model} is broken on all images in all {row['seeds']} seeds at {budget_text(*at)}"
        return headline, _worst_text(model, brackets, values)
    own = [w for w in record.worst_case or () if w.model in names and w.threat_model == WHITE_BOX]
    name = own[0].model if own else names[0]
    cases = [w for w in own if w.model == name]
    case: WorstCase | EvaluationEntry | None
    case = next((w for w in cases if (w.norm, w.eps) == budget), None) or most_harmful(record, name)
    if case is None:
        return None
    where = f" at {budget_text(*budget)}" if isinstance(case, WorstCase) and budget else ""
    headline = f"{name} withstands the attacks on {_count(case)} images{where}{doubt}"
    if case.accuracy == 0:
        headline = f"{name} is broken on all {case.n:,} images{where}"
    values = [(w.norm, w.eps, w.accuracy, w.accuracy_low, w.accuracy_high) for w in cases]
    return headline, _worst_text(name, "95 % interval", values)


def _worst_text(model: str, brackets: str, values: Sequence[tuple[str, float, float, float, float]]) -> str:
    """Return a sentence with (norm, eps, accuracy, low, high) of each budget; "" without any."""
    texts = (
        f"{percent(accuracy)} % ({percent(low)}–{percent(high)}) at {budget_text(norm, eps)}"
        for norm, eps, accuracy, low, high in values
    )
    return f"{model}, accuracy in the worst case of each image ({brackets}): {', '.join(texts)}." if values else ""


def _trust(record: RunRecord) -> list[str]:
    """Return what limits the verdict: the tests of the attacks, and the number of seeds."""
    reasons = [sentences.reliability_in_short(record)]
    if record.experiment.trains and record.experiment.seeds == 1:
        reasons.append("There is one seed per model. Models of other seeds may differ by more than these tests show.")
    return [reason for reason in reasons if reason]


def _joined(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
