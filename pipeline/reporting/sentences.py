"""What a report says in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from components.attacks.spec import AttackSpec
from components.config.roles import roles_of
from components.errors import ConfigError
from pipeline.reporting import over_seeds, records
from pipeline.reporting.labels import (
    THREATS,
    UNTRUSTED,
    attack_text,
    attack_title,
    is_untrusted,
    mark,
    percent,
    role_titles,
)
from pipeline.reporting.records import experiment_of, in_order
from pipeline.reporting.results import evaluated, table
from pipeline.reporting.verdicts import near_chance, raised_flags, worst_cases


def norms_note(record: Mapping[str, Any]) -> str:
    """Return the sentence that explains :func:`median_norm`; empty if no attack of the run minimises a norm."""
    if not any(e["metrics"].get("curve") for e in record["evaluations"]):
        return ""
    return (
        "Attacks of any norm: the median norm ([0,1] pixels) of the examples that broke an image which was classified "
        f"correctly, and how many such images there are. With fewer than {over_seeds.MIN_FOR_MEDIAN}, no median is shown."
    )


def explanation(record: Mapping[str, Any]) -> list[str]:
    """Return plain sentences on how to read the numbers of a run, each about something that is in it."""
    return [*_threat_models_explained(record), *_controls_explained(record), *_exceptions_explained(record)]


def _threat_models_explained(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each threat model that the run has."""
    sources: dict[str, dict[str, None]] = {}
    for e in record["evaluations"]:
        sources.setdefault(e["threat_model"], {})[str(e.get("source"))] = None
    fixed = {
        "white_box": "White-box: the examples were made on the very model under test. This is the number that says how much a "
        "model withstands, and no more than that: a stronger attack can only lower it.",
        "black_box": "Black-box: the examples were made on the very model under test, from its scores alone, without gradients.",
        "grey_box": "Grey-box: the examples were made on the classifier behind the defense. The attacker does not know what "
        "stands in front of it.",
    }
    caution = (
        "and then shown to the model under test. A high number says that these examples do not carry over, not that the model "
        "withstands an attacker who knows it."
    )
    out = [sentence for threat, sentence in fixed.items() if threat in sources]
    for threat, made_on in sources.items():
        base, _, name = threat.partition(":")
        if base == "transfer":
            where = name or f"an undefended model ({', '.join(made_on)})"
            head = f"Transfer from {name}" if name else "Transfer"
            out.append(f"{head}: the examples were made on {where} {caution}")
    return out


def _controls_explained(record: Mapping[str, Any]) -> list[str]:
    """Return what the controls of the run are, or which defended models lack one."""
    role, experiment = roles_of(experiment_of(record)), records.experiment_of(record)
    transferred = [e for e in record["evaluations"] if e["threat_model"] == "transfer"]
    controlled = {experiment.transfer_source_of(name) for name, r in role.items() if r == "control"}
    alone = dict.fromkeys(
        e["model"] for e in transferred if role[e["model"]] == "defended" and e["source"] not in controlled
    )
    if alone:
        return [
            f"There is no control for {', '.join(alone)}: no other undefended model of its architecture is in this run. So the "
            "transfer numbers may be what any other network of another seed would have, and nothing of them can be owed to the "
            'defense. Add one to "models", e.g. "control:defense=none,seed=1", and run the command again.'
        ]
    judged = evaluated(record)
    controls = []
    if any(role[name] == "control" for name in judged):
        same = " on the same examples" if any(role[e["model"]] == "control" for e in transferred) else ""
        controls.append(f"an undefended model of another seed{same}")
    if any(e["threat_model"] == "random" for e in record["evaluations"]):
        controls.append("random noise of the same size without any attacker")
    if not controls:
        return []
    said = f"Control: {', and '.join(controls)}."
    if any(role[name] == "defended" for name in judged):
        said += " Only what a defended model does better than its controls can be owed to its defense."
    return [said]


def _exceptions_explained(record: Mapping[str, Any]) -> list[str]:
    """Return what was computed otherwise than usual: in smaller batches, or in bfloat16."""
    out = []
    split = [
        f"{e['model']} under {e['threat_model']}, {attack_text(e['attack'])}"
        for e in record["evaluations"]
        if e.get("chunks_split_for_memory")
    ]
    if split:
        out.append(f"In smaller batches, where memory was short, so with other random starts: {'; '.join(split)}.")
    if records.experiment_of(record).evaluation.search_precision != "bfloat16":
        return out
    searched = dict.fromkeys(
        attack_title(e["attack"])[0] for e in record["evaluations"] if _may_search_in_bfloat16(e["attack"])
    )
    in_float32 = dict.fromkeys(
        f"{attack_text(e['attack'])} on {e['source']}"
        for e in record["evaluations"]
        if e.get("chunks_searched_in_float32")
    )
    if searched:
        said = f"{', '.join(searched)} searched in bfloat16 (evaluation.search_precision). All verdicts are float32."
        if in_float32:
            said += f" In float32 after all, where there is no such copy of the network: {'; '.join(in_float32)}."
        out.append(said)
    return out


def _may_search_in_bfloat16(attack: str) -> bool:
    try:
        return AttackSpec.parse(attack).may_search_in_bfloat16
    except ConfigError:  # "none", or an attack of another version
        return False


def untrusted_note(record: Mapping[str, Any]) -> str:
    """The footnote of :data:`UNTRUSTED`: which attacks failed on which models. Empty where none did."""
    failed: dict[str, list[str]] = {}
    for model in in_order(record.get("reliability") or {}, tuple(roles_of(experiment_of(record)))):
        for attack, test in record["reliability"][model]["active"].items():
            if test["passed"] is False:
                failed.setdefault(model, []).append(attack_text(attack))
    if not failed:
        return ""
    where = "; ".join(f"on {model}: {', '.join(attacks)}" for model, attacks in failed.items())
    return (
        f"{UNTRUSTED} Not to be trusted, {where}. The attack did not find adversarial examples that were planted for it there (active "
        f"test, docs/reliability.md), so what withstands it is no sign of robustness. A worst case with {UNTRUSTED} counts such an attack."
    )


def reliability_in_short(record: Mapping[str, Any]) -> str:
    """One sentence that says whether the numbers can be trusted; empty where nobody looked."""
    tested = record.get("reliability") or {}
    if not tested:
        return ""
    fired = raised_flags(record)
    where = ", ".join(dict.fromkeys(f["model"] for f in fired))
    flags = f"{_counted(len(fired), 'flag')} raised ({where})" if fired else "no flag raised"
    found = _active_tests_in_short([a for one in tested.values() for a in one["active"].values()], len(tested))
    return f"Reliability: {flags} on {_counted(len(tested), 'model')}; {found} (docs/reliability.md)."


def _active_tests_in_short(tests: Sequence[Mapping[str, Any]], models: int) -> str:
    """Return how many active tests were passed, and how many are undecided."""
    decided = [t for t in tests if t["passed"] is not None]
    undecided = len(tests) - len(decided)
    why = "too few images, or random search finds the planted examples too"
    if not tests:
        return f"none of {'its' if models == 1 else 'their'} attacks has an active test"
    if not decided:
        return f"the active test of {_counted(undecided, 'attack')} is undecided: {why}"
    passed = sum(t["passed"] for t in decided)
    said = f"{passed} of {len(decided)} attacks found the adversarial examples that were planted for them"
    return said + (f", {undecided} {'is' if undecided == 1 else 'are'} undecided: {why}" if undecided else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def in_short(record: Mapping[str, Any]) -> list[str]:
    """One sentence per model: clean accuracy and the attack within a budget that leaves least of it."""
    said, titles = [row["sentence"] for row in near_chance(record)], role_titles(record)
    for row in table(record)["rows"]:
        clean = row["cells"].get("clean")
        parts = [] if clean is None else [f"{percent(clean['accuracy'])} % clean"]
        for threat in ("white_box", "transfer"):
            found = [
                (e["metrics"]["accuracy"], e["attack"], mark({"untrusted": is_untrusted(record, e)}))
                for e in record["evaluations"]
                if (e["model"], e["threat_model"]) == (row["model"], threat) and not e["metrics"].get("curve")
            ]
            if found:
                lowest, attack, marked = min(found)
                parts.append(
                    f"{percent(lowest)}{marked} % under the worst {THREATS[threat]} attack ({attack_text(attack)})"
                )
        parts += [
            f"{percent(w['accuracy'])}{mark(w)} % in the worst case per sample at {w['budget']}"
            for w in worst_cases(record)
            if w["model"] == row["model"] and w["threat_model"] == "white_box"
        ]
        if parts:
            said.append(f"{row['model']} ({titles[row['model']]}): " + ", ".join(parts) + ".")
    return [*said, *filter(None, [reliability_in_short(record)])]


def missing(
    record: Mapping[str, Any], gallery: Mapping[str, Any], histories: Mapping[str, Any], drawn: Iterable[str]
) -> list[str]:
    """What a partial run lacks, in words; empty for a complete one. ``drawn``: names of the plots that were made."""
    out = []
    untrained = [name for name in roles_of(experiment_of(record)) if name not in record["models"]]
    if diverged := record.get("diverged"):
        said = ", ".join(f"{name} at step {step}" for name, step in diverged.items())
        out.append(f"training diverged, so it was not evaluated: {said}")
        untrained = [name for name in untrained if name not in diverged]
    for what, given in (("not trained yet", False), ("not read yet", True)):
        if names := [name for name in untrained if (roles_of(experiment_of(record))[name] == "given") == given]:
            out.append(f"{what}: {', '.join(names)}")
    trained = [name for name, model in record["models"].items() if model.get("train", {}).get("epochs", 1)]
    no_history = [name for name in trained if not histories.get(name)]
    if no_history:
        out.append("no training history of: " + ", ".join(no_history))
    if not record["evaluations"]:
        out.append("no evaluations yet")
    if not gallery:
        out.append("no gallery of images yet")
    if undrawn := [f for f in record["experiment"].get("figures", ()) if f not in drawn]:
        out.append(f"the records hold nothing to draw these from: {', '.join(undrawn)}")
    if not record.get("finished"):
        out.append("the run has not finished")
    return out
