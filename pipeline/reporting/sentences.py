"""The sentences of a report."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from components.config.roles import control_of
from components.threat_models import BLACK_BOX, GREY_BOX, RANDOM, TRANSFER, WHITE_BOX, split_threat_model
from pipeline.records import RunRecord
from pipeline.reporting import over_seeds
from pipeline.reporting.labels import (
    THREATS,
    UNTRUSTED,
    attack_text,
    attack_title,
    is_untrusted,
    mark,
    parsed_attack,
    percent,
    role_titles,
)
from pipeline.reporting.results import evaluated_models, table
from pipeline.reporting.verdicts import near_chance, raised_flags, worst_cases

_MADE_ON = {
    WHITE_BOX: "White-box: the attacker knows everything about the model under test and makes the examples on it. This "
    "is the number that says how much a model withstands. It is an upper bound: a stronger attack can only lower it.",
    BLACK_BOX: "Black-box: the attacker sees only the scores of the model under test, and has no gradients.",
    GREY_BOX: "Grey-box: the attacker knows the classifier and makes the examples on it, but does not know the defense "
    "in front of it.",
}
_TRANSFER_CAUTION = (
    "and then shown to the model under test. A high number says that these examples do not carry over. It does not say "
    "that the model withstands an attacker who knows it."
)
_UNDECIDED = "there were too few images, or random search finds the planted examples too"


def norms_note(record: RunRecord) -> str:
    """Return the sentence that explains median norms; "" if no attack minimises a norm."""
    if not any(e.curve for e in record.evaluations):
        return ""
    return (
        "Attacks of any norm: the table gives the median norm (pixels in [0,1]) of the examples that broke a correctly "
        "classified image, and the number of these images. With fewer than "
        f"{over_seeds.MIN_FOR_MEDIAN} images, no median is shown."
    )


def explanation(record: RunRecord) -> list[str]:
    """Return sentences on how to read the numbers. Each one is about something that the run has."""
    return [*_threat_models_explained(record), *_controls_explained(record), *_exceptions_explained(record)]


def _threat_models_explained(record: RunRecord) -> list[str]:
    sources: dict[str, dict[str, None]] = {}
    for e in record.evaluations:
        sources.setdefault(e.threat_model, {})[str(e.source)] = None
    sentences = [sentence for threat, sentence in _MADE_ON.items() if threat in sources]
    if made_on := sources.get(TRANSFER):
        undefended = f"an undefended model ({', '.join(made_on)})"
        sentences.append(f"Transfer: the examples were made on {undefended} {_TRANSFER_CAUTION}")
    if names := [name for base, name in map(split_threat_model, sources) if base == TRANSFER and name]:
        that = names[0] if len(names) == 1 else "that model"
        sentences.append(f"Transfer from {', '.join(names)}: the examples were made on {that} {_TRANSFER_CAUTION}")
    return sentences


def _controls_explained(record: RunRecord) -> list[str]:
    """Return which controls the run has, or which defended models lack one."""
    role, experiment = record.roles, record.experiment
    transferred = [e for e in record.evaluations if e.threat_model == TRANSFER]
    controlled = {experiment.transfer_source_of(name) for name, r in role.items() if r == "control"}
    without_control = dict.fromkeys(
        e.model for e in transferred if role[e.model] == "defended" and e.source not in controlled
    )
    if without_control:
        return [
            f"There is no control for {', '.join(without_control)}: this run has no second undefended model of the "
            "same architecture. Any other network of another seed might have the same transfer numbers, so they do "
            'not show an effect of the defense. Add a control to "models", e.g. "control:defense=none,seed=1", and '
            "run the command again."
        ]
    evaluated = evaluated_models(record)
    role_of = {base: role[name] for name, base in record.bases.items()}
    controls = []
    if any(role[name] == "control" for name in evaluated):
        same = " on the same examples" if any(role[e.model] == "control" for e in transferred) else ""
        controls.append(f"an undefended model of another seed{same}")
    trained = dict.fromkeys(c for c in control_of(experiment).values() if role_of[c] == "defended")
    if trained:
        controls.append(f"the same adversarial training without the auto-encoder ({', '.join(trained)})")
    if any(e.threat_model == RANDOM for e in record.evaluations):
        controls.append("random noise of the same size without any attacker")
    if not controls:
        return []
    sentence = f"Control: {', and '.join(controls)}."
    if any(role[name] == "defended" for name in evaluated):
        sentence += " Only what a defended model does better than its controls can be an effect of its defense."
    return [sentence]


def _exceptions_explained(record: RunRecord) -> list[str]:
    """Return which evaluations ran in smaller batches or in bfloat16."""
    sentences = []
    split = [
        f"{e.model} under {e.threat_model}, {attack_text(e.attack)}"
        for e in record.evaluations
        if e.chunks_split_for_memory
    ]
    if split:
        sentences.append(
            f"GPU memory was short, so these ran in smaller batches, with other random starts: {'; '.join(split)}."
        )
    if record.experiment.evaluation.search_precision != "bfloat16":
        return sentences
    attacks = dict.fromkeys(e.attack for e in record.evaluations)
    searching = [a for a in attacks if (spec := parsed_attack(a)) and spec.may_search_in_bfloat16]
    searched = dict.fromkeys(attack_title(attack)[0] for attack in searching)
    in_float32 = dict.fromkeys(
        f"{attack_text(e.attack)} on {e.source}" for e in record.evaluations if e.chunks_searched_in_float32
    )
    if searched:
        sentence = (
            f"{', '.join(searched)} searched in bfloat16 (evaluation.search_precision). All verdicts are float32."
        )
        if in_float32:
            sentence += f" These networks have no bfloat16 copy, so the search was in float32: {'; '.join(in_float32)}."
        sentences.append(sentence)
    return sentences


def untrusted_note(record: RunRecord) -> str:
    """Return the footnote of :data:`UNTRUSTED`, with attacks and models; "" if no attack failed."""
    failed = {
        model: [attack_text(attack) for attack, test in tested.active.items() if test["passed"] is False]
        for model, tested in (record.reliability or {}).items()
    }
    where = "; ".join(f"on {model}: {', '.join(attacks)}" for model, attacks in failed.items() if attacks)
    if not where:
        return ""
    return (
        f"{UNTRUSTED} Do not trust this number. The attack did not find adversarial examples that were planted for it "
        f"(active test, docs/reliability.md), so high accuracy under it is no sign of robustness. This holds {where}. "
        f"A worst case with {UNTRUSTED} counts such an attack."
    )


def reliability_in_short(record: RunRecord) -> str:
    """Return one sentence on whether the numbers can be trusted; "" if nothing was tested."""
    tested = record.reliability or {}
    if not tested:
        return ""
    raised = raised_flags(record)
    where = ", ".join(dict.fromkeys(flag["model"] for flag in raised))
    flags = f"{_counted(len(raised), 'flag')} raised ({where})" if raised else "no flag raised"
    tests = [test for model in tested.values() for test in model.active.values()]
    return (
        f"Reliability: {flags} on {_counted(len(tested), 'model')}; "
        f"{_active_tests_in_short(tests, len(tested))} (docs/reliability.md)."
    )


def _active_tests_in_short(tests: Sequence[Mapping[str, Any]], models: int) -> str:
    """Return how many active tests were passed, and how many are undecided."""
    decided = [test for test in tests if test["passed"] is not None]
    undecided = len(tests) - len(decided)
    if not tests:
        return f"none of {'its' if models == 1 else 'their'} attacks has an active test"
    if not decided:
        return f"the active test of {_counted(undecided, 'attack')} is undecided: {_UNDECIDED}"
    passed = sum(test["passed"] for test in decided)
    text = f"{passed} of {len(decided)} attacks found the adversarial examples that were planted for them"
    return text + (f", {undecided} {'is' if undecided == 1 else 'are'} undecided: {_UNDECIDED}" if undecided else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_short(record: RunRecord) -> list[str]:
    """Return one sentence per model: clean accuracy, and accuracy under the worst attacks."""
    sentences = [row["sentence"] for row in near_chance(record)]
    titles = role_titles(record)
    for row in table(record)["rows"]:
        model = row["model"]
        clean = row["cells"].get("clean")
        parts = [] if clean is None else [f"{percent(clean['accuracy'])} % clean"]
        parts += [text for threat in (WHITE_BOX, TRANSFER) if (text := _worst_attack(record, model, threat))]
        parts += [
            f"{percent(worst['accuracy'])}{mark(worst)} % in the worst case per sample at {worst['budget']}"
            for worst in worst_cases(record)
            if (worst["model"], worst["threat_model"]) == (model, WHITE_BOX)
        ]
        if parts:
            sentences.append(f"{model} ({titles[model]}): {', '.join(parts)}.")
    return [*sentences, *filter(None, [reliability_in_short(record)])]


def _worst_attack(record: RunRecord, model: str, threat: str) -> str:
    """Return the accuracy under the most harmful attack within a budget; "" if there was none."""
    evaluations = [e for e in record.evaluations if (e.model, e.threat_model) == (model, threat) and not e.curve]
    if not evaluations:
        return ""
    worst = min(evaluations, key=lambda e: (e.accuracy, e.attack))
    marked = mark({"untrusted": is_untrusted(record, worst)})
    return f"{percent(worst.accuracy)}{marked} % under the worst {THREATS[threat]} attack ({attack_text(worst.attack)})"


def missing(
    record: RunRecord, gallery: Mapping[str, Any], histories: Mapping[str, Any], plots: Container[str]
) -> list[str]:
    """Return what a partial run lacks; [] for a complete run. ``plots`` names those that it has."""
    missing = []
    diverged = record.diverged or {}
    if diverged:
        steps = ", ".join(f"{name} at step {step}" for name, step in diverged.items())
        missing.append(f"training diverged, so these were not evaluated: {steps}")
    unfinished = {
        name: role for name, role in record.roles.items() if name not in record.models and name not in diverged
    }
    for text, external in (("not trained yet", False), ("not read yet", True)):
        if names := [name for name, role in unfinished.items() if (role == "given") == external]:
            missing.append(f"{text}: {', '.join(names)}")
    trained = [name for name, model in record.models.items() if model.train.get("epochs", 1)]
    if without_history := [name for name in trained if not histories.get(name)]:
        missing.append(f"no training history of: {', '.join(without_history)}")
    if not record.evaluations:
        missing.append("no evaluations yet")
    if not gallery:
        missing.append("no gallery of images yet")
    if undrawn := [figure for figure in record.experiment.figures if figure not in plots]:
        missing.append(f"the records have no data for: {', '.join(undrawn)}")
    if not record.finished:
        missing.append("the run has not finished")
    return missing
