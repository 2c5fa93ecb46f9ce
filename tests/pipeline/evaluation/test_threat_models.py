"""Which attack meets which model, under which threat model and address."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment
from components.errors import ConfigError
from pipeline.data import shards
from pipeline.evaluation import plan, reliability
from pipeline.evaluation.addresses import example_sets
from pipeline.runtime.storage import Storage

MODELS = tuple(
    plan.Model(name=name, path=f"models/{name}", sha256=name, autoencoder="ae" if name == "defend" else "")
    for name in ("no_defense", "control", "defend")
)


SUITE = ("noise:eps=0.2", "fgsm:eps=0.2", "autoattack:eps=0.2", "square:eps=0.2", "adaptive:eps=0.2", "ddn")


def planned(*threat_models: str) -> set[tuple[str, str | None, str, str]]:
    """(model, source, threat model, attack) of every evaluation that attacks."""
    evaluation = EvaluationConfig(attacks=SUITE, threat_models=threat_models)
    experiment = Experiment(name="t", evaluation=evaluation)
    return {
        (e.model.name, e.source.name if e.source else None, e.threat_model, e.attack.partition(":")[0])
        for e in plan.plan_evaluations(MODELS, experiment)
        if e.attack != "none"
    }


def test_each_attack_belongs_to_its_threat_models() -> None:
    found = planned("white_box", "black_box", "transfer")
    assert {(t, a) for m, _, t, a in found if m == "defend"} == {
        ("random", "noise"),
        *(("white_box", a) for a in ("fgsm", "autoattack", "adaptive", "ddn")),
        ("black_box", "square"),
        *(("transfer", a) for a in ("fgsm", "ddn")),
    }
    assert not any(a == "adaptive" for m, _, _, a in found if m != "defend")


def test_every_model_is_a_source_of_transfer() -> None:
    found = planned("transfer:*")
    pairs = {(source, model) for model, source, threat, _ in found if threat.startswith("transfer:")}
    names = [m.name for m in MODELS]
    assert pairs == {(a, b) for a in names for b in names if a != b}
    assert all(threat == f"transfer:{source}" for _, source, threat, a in found if a != "noise")


def test_what_transfer_has_is_not_told_again_by_every_source_in_turn() -> None:
    found = planned("transfer", "transfer:*")
    assert all(threat == "transfer" for _, source, threat, _ in found if source == "no_defense")
    pairs = {(source, model) for model, source, threat, _ in found if threat != "random"}
    assert pairs == {(source, model) for model, source, threat, _ in planned("transfer:*") if threat != "random"}
    # but whoever names it gets it
    by_name = planned("transfer", "transfer:no_defense", "transfer:*")
    assert {threat for _, source, threat, _ in by_name if source == "no_defense"} == {"transfer", "transfer:no_defense"}


def test_only_examples_for_the_model_itself_leave_early() -> None:
    evaluation = EvaluationConfig(attacks=("pgd:eps=0.2",), threat_models=("white_box", "transfer", "transfer:*"))
    for e in plan.plan_evaluations(MODELS, Experiment(name="t", evaluation=evaluation)):
        assert e.stop_on_success == (e.threat_model == "white_box")


def test_the_adaptive_attack_is_named_by_the_auto_encoder_it_knows() -> None:
    evaluation = EvaluationConfig(attacks=("adaptive:eps=0.2",), threat_models=("white_box",))

    def address(autoencoder: str) -> str:
        models = [*MODELS[:2], replace(MODELS[2], autoencoder=autoencoder)]
        planned = plan.plan_evaluations(models, Experiment(name="t", evaluation=evaluation))
        sets, _ = example_sets(planned, "test", 8, evaluation)
        (one,) = [s for s in sets if s.attack != "none"]
        return one.address

    assert address("ae") == address("ae") != address("another")


def test_precision_names_what_it_changes_and_nothing_else() -> None:
    """Examples and tests of what may search in bfloat16 are others so; all else goes on from what is there."""
    names = (
        "noise:eps=0.2",
        "fgsm:eps=0.2",
        "pgd:eps=0.2",
        "bim:eps=0.2",
        "apgd:eps=0.2",
        "square:eps=0.2",
        "autoattack:eps=0.2",
        "cw",
        "ddn",
        "fab-t",
    )
    attacks = tuple(str(AttackSpec.parse(name)) for name in names)
    evaluation = EvaluationConfig(attacks=attacks, threat_models=("white_box", "black_box"))
    test = shards.ShardSet(Storage("/nowhere"), "test", {"num_rows": 8})

    def made(evaluation: EvaluationConfig) -> dict[str, tuple[str, Any, bool]]:
        experiment = Experiment(name="t", evaluation=evaluation)
        sets, _ = example_sets(plan.plan_evaluations(MODELS[:1], experiment), "test", 8, evaluation)
        entries = [({"attack": a, "threat_model": "white_box"}, {}) for a in attacks]
        jobs = reliability.reliability_jobs(MODELS[0], test, experiment, Storage("/nowhere"), entries, 2)
        files = {job["attack"]: (job["file"], job["bfloat16"]) for job in jobs}
        return {s.attack: (s.address, files.get(s.attack), s.bfloat16) for s in sets}

    exact, bfloat16 = made(evaluation), made(replace(evaluation, search_precision="bfloat16"))
    changed = {a.partition(":")[0] for a in exact if exact[a] != bfloat16[a]}
    assert changed == {"pgd", "bim"}
    for a, (address, file, is_other) in bfloat16.items():
        assert is_other == (a.partition(":")[0] in changed)
        if is_other:
            assert file is not None
            assert file[1]
            assert address != exact[a][0]
            assert file[0] != exact[a][1][0]


ADDRESSES_THAT_STAY = {
    "fgsm:eps=0.2": "examples/e0584ebe53813df6",
    "bim:eps=0.2,steps=100": "examples/f82b196959dcde60",
    "cw:steps=20": "examples/7597444a6ac32a8c",
    "cw:steps=20,target=least_likely": "examples/1b2f900a1a5e7877",
    "fab-t:steps=100": "examples/af396ca050108d07",
    "fab-t:norm=l2,steps=100": "examples/a28fa607f45bfebe",
}


"""Attack -> address of its examples on "defend" at revision 977c22a; nothing that these follow from has changed since."""


TESTS_THAT_STAY = {
    "bim:eps=0.2,steps=100": "reliability/5d46bfd25a2942ff.json",
    "pgd:eps=0.2,steps=100": "reliability/eaf7ddba8c004591.json",
    "cw:steps=20": "reliability/02db6f82c5d87f91.json",
    "fab-t:norm=l2,steps=100": "reliability/5dbff7b1a6a80d76.json",
    "square:eps=1.0,norm=l2": "reliability/805c0f78159ace4b.json",
}


"""The same for active tests on "no_defense"."""


def test_what_has_not_changed_keeps_its_address() -> None:
    attacks = tuple({**ADDRESSES_THAT_STAY, **TESTS_THAT_STAY})
    evaluation = EvaluationConfig(attacks=attacks, threat_models=("white_box", "black_box"))
    experiment = Experiment(name="t", evaluation=evaluation)
    sets, _ = example_sets(plan.plan_evaluations(MODELS[2:], experiment), "test", 8, evaluation)
    addresses = {s.attack: s.address for s in sets}
    assert {name: addresses[name] for name in ADDRESSES_THAT_STAY} == ADDRESSES_THAT_STAY
    test = shards.ShardSet(Storage("/nowhere"), "test", {"num_rows": 8})
    entries = [({"attack": a, "threat_model": "white_box"}, {}) for a in attacks]
    jobs = reliability.reliability_jobs(MODELS[0], test, experiment, Storage("/nowhere"), entries, 2)
    files = {job["attack"]: job["file"] for job in jobs}
    assert {name: files[name] for name in TESTS_THAT_STAY} == TESTS_THAT_STAY


def test_an_unknown_threat_model_or_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transfer:\*"):
        EvaluationConfig(threat_models=("grey_box",))
    with pytest.raises(ConfigError, match="threat_models"):
        Experiment(name="t", evaluation=EvaluationConfig(threat_models=("transfer:nobody",)))
