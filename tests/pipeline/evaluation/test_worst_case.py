"""What a model's evaluations say together: worst case, threat models, transfer matrix, flags in report and MLflow's numbers."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attacked_models import Small
from scipy.stats import binomtest

from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment, ScalingConfig, TrainConfig, level_sizes, roles
from components.config.data import Shapes
from components.config.roles import roles_of
from components.errors import ConfigError
from components.evaluation import active_test
from components.evaluation import active_test as evaluation_active_test
from components.evaluation.metrics import worst_case
from components.fields import from_dict, to_dict
from components.network import build_net
from pipeline.data import shards
from pipeline.evaluation import attack_tasks, plan, reliability
from pipeline.evaluation import worst_case as evaluation_worst_case
from pipeline.evaluation.addresses import example_sets
from pipeline.evaluation.chunks import read_chunks, read_examples, read_metadata
from pipeline.records import RunRecord
from pipeline.reporting import labels, over_seeds, report, results, sentences, terminal, verdicts
from pipeline.reporting.mlflow_run import table_metrics
from pipeline.runtime.cluster import ResourceError
from pipeline.runtime.storage import Storage
from pipeline.training import exports


def columns(clean: str, adversarial: str, norm: list[float]) -> dict[str, np.ndarray]:
    """Predictions as digits; all labels are 1."""
    n = len(clean)
    return {
        "index": np.arange(n),
        "label": np.ones(n, np.int32),
        "clean_prediction": np.array([int(c) for c in clean]),
        "adversarial_prediction": np.array([int(c) for c in adversarial]),
        "linf": np.array(norm),
        "l2": 10 * np.array(norm),
    }


def test_the_worst_case_takes_each_example_where_it_lies() -> None:
    one = columns("11110", "12211", [0.1, 0.1, 0.3, 0.1, 0.1])
    two = columns("11110", "11121", [0.2, 0.2, 0.2, 0.2, 0.2])
    # sample 1 broken by the first within 0.1, 2 only at 0.3, 3 by the second at 0.2; 4 was wrong before
    assert worst_case([one, two], "linf", 0.2).tolist() == [True, False, True, False, False]
    assert worst_case([one, two], "linf", 0.1).tolist() == [True, False, True, True, False]
    assert worst_case([one, two], "linf", 0.3).tolist() == [True, False, False, False, False]
    assert worst_case([one, two], "l2", 1.0).tolist() == [True, False, True, True, False]
    # the tolerance that attacks have
    assert worst_case([columns("1", "2", [0.2 + 5e-7])], "linf", 0.2).tolist() == [False]
    assert worst_case([columns("1", "2", [0.2 + 5e-6])], "linf", 0.2).tolist() == [True]


def test_a_worst_case_is_of_the_same_samples() -> None:
    one = columns("11", "11", [0.1, 0.1])
    with pytest.raises(ValueError, match="same samples"):
        worst_case([one, {**one, "index": np.array([1, 0])}], "linf", 0.1)
    with pytest.raises(ValueError, match="no evaluations"):
        worst_case([], "linf", 0.1)


# -- threat models ---------------------------------------------------------------------------------------------------------


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


def test_a_task_searches_in_the_precision_that_its_records_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Any] = []

    def spy(spec: Any, model: Any, fast: Any, *arguments: Any, **options: Any) -> Any:
        searched.append({p.dtype for p in fast.parameters()})
        return run_attack_on_copy(spec, model, fast, *arguments, **options)

    monkeypatch.setattr(attack_tasks, "run_attack_on_copy", spy)
    monkeypatch.setattr(evaluation_active_test, "run_attack_on_copy", spy)
    common = with_network(tmp_path, "own_network:make")
    for bfloat16 in (False, True):
        job = {"source": "models/net", "attack": "pgd:eps=0.2,steps=2", "early_leaving": True, "bfloat16": bfloat16}
        where = {"examples": f"examples/{bfloat16}", "judges": {f"judged/{bfloat16}": "models/net"}}
        attack_tasks.attack_chunks({**common, **job, **where, "chunks": CHUNKS[:1]})
        test = {
            "model": "models/net",
            "name": "net",
            "attack": "pgd:eps=0.2,steps=2",
            "norm": "linf",
            "eps": 0.2,
            "images": 2,
        }
        reliability.measure({**common, **test, "bfloat16": bfloat16, "file": f"reliability/{bfloat16}.json"})
        assert read_metadata(Storage(str(tmp_path)) / f"examples/{bfloat16}", 0)["bfloat16"] is bfloat16
    assert all(dtypes == {torch.float32} for dtypes in searched[: len(searched) // 2])
    assert all(torch.bfloat16 in dtypes for dtypes in searched[len(searched) // 2 :])


def test_an_unknown_threat_model_or_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transfer:\*"):
        EvaluationConfig(threat_models=("grey_box",))
    with pytest.raises(ConfigError, match="threat_models"):
        Experiment(name="t", evaluation=EvaluationConfig(threat_models=("transfer:nobody",)))


# -- records to verdict ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Storage, Storage, dict[str, Any]]:
    root = Storage(str(tmp_path))
    directory = fake_run.write(root)
    return root, directory, directory.read_json("run.json")


def experiment_of(record: dict[str, Any]) -> Experiment:
    base = fake_run.experiment()
    return replace(base, evaluation=replace(base.evaluation, attacks=fake_run.ATTACKS, chunk_size=fake_run.CHUNK))


def test_budgets_are_the_attacks_own_and_the_usual_of_minimal_norms(
    run: tuple[Storage, Storage, dict[str, Any]],
) -> None:
    assert evaluation_worst_case.budgets(experiment_of(run[2])) == [("l2", 1.5), ("linf", 0.2)]


def worst_cases(root: Storage, record: dict[str, Any]) -> list[dict[str, Any]]:
    judgements = evaluation_worst_case.EvaluationRecords(root, record["evaluations"], fake_run.CHUNK)
    return evaluation_worst_case.worst_cases(fake_run.MODELS, experiment_of(record), judgements)


def test_worst_cases_come_from_the_records(run: tuple[Storage, Storage, dict[str, Any]]) -> None:
    root, _, record = run
    found = worst_cases(root, record)
    by_key = {(w["model"], w["threat_model"], w["norm"], w["eps"]): w for w in found}
    for e in record["evaluations"]:
        eps = None if e["attack"] == "none" else AttackSpec.parse(e["attack"]).eps
        if eps and e["threat_model"] in ("white_box", "transfer"):
            scope = "white_box" if e["threat_model"] == "white_box" else "any"
            worst = by_key[e["model"], scope, "linf", eps]
            assert worst["accuracy"] <= e["metrics"]["accuracy"]
            assert worst["accuracy_low"] <= worst["accuracy"] <= worst["accuracy_high"]
    # noise counts where it breaks something, but makes no threat model of its own
    assert ("no_defense", "any", "linf", 0.2) in by_key
    fgsm = next(e for e in record["evaluations"] if e["threat_model"] == "white_box" and e["attack"].startswith("fgsm"))
    assert by_key[fgsm["model"], "white_box", "linf", 0.2]["accuracy"] < fgsm["metrics"]["accuracy"]


def test_the_same_examples_under_two_threat_models_are_one_evaluation(
    run: tuple[Storage, Storage, dict[str, Any]],
) -> None:
    root, _, record = run
    again = [
        {**e, "threat_model": "transfer:no_defense"} for e in record["evaluations"] if e["threat_model"] == "transfer"
    ]
    assert again
    both = {**record, "evaluations": [*record["evaluations"], *again]}
    assert worst_cases(root, both) == worst_cases(root, record)


@pytest.mark.slow
def test_worst_cases_are_compared_sample_by_sample(run: tuple[Storage, Storage, dict[str, Any]]) -> None:
    root, directory, record = run
    judgements = evaluation_worst_case.EvaluationRecords(root, record["evaluations"], fake_run.CHUNK)
    pairs = roles.pairs(experiment_of(record))
    assert pairs == [("no_defense", "control"), ("defend", "control"), ("no_defense", "defend")]
    found = evaluation_worst_case.paired_worst_cases(pairs, experiment_of(record), judgements)
    accuracy = {(w["model"], w["threat_model"], w["norm"]): w["accuracy"] for w in worst_cases(root, record)}
    for w in found:
        # what both withstand or neither does cancels: the counts must give the difference of the accuracies
        ours, theirs = (accuracy[w[m], w["threat_model"], w["norm"]] for m in ("model", "against"))
        assert (w["only_model"] - w["only_against"]) / w["n"] == pytest.approx(ours - theirs)
        apart = w["only_model"] + w["only_against"]
        assert w["p"] == pytest.approx(binomtest(w["only_model"], apart).pvalue if apart else 1.0)
    assert any(w["only_model"] != w["only_against"] for w in found)
    record["worst_case"], record["worst_case_pairs"] = worst_cases(root, record), found
    directory.write_json("run.json", record)
    report.build(directory, root)
    one = next(w for w in found if w["only_model"])
    for name, cell in (("report.html", "<td>{}</td><td>{}</td>"), ("table.md", "| {} | {} |")):
        assert cell.format(one["only_model"], one["only_against"]) in directory.read_bytes(f"report/{name}").decode()


def test_the_worst_case_over_the_seeds() -> None:
    experiment = replace(fake_run.experiment(), seeds=3)
    bounds = {"n": 300, "accuracy_low": 0.0, "accuracy_high": 1.0, "attacks": 1}
    rows = [
        {"model": f"defend-s{i}", "threat_model": "white_box", "norm": "linf", "eps": 0.2, "accuracy": a, **bounds}
        for i, a in enumerate((0.1, 0.2, 0.6))
    ]

    def of(experiment: Experiment, worst: list[dict[str, Any]]) -> RunRecord:
        return RunRecord.from_json({"name": "x", "experiment": to_dict(experiment), "worst_case": worst})

    (row,) = over_seeds.worst_over_seeds(of(experiment, rows))
    assert (row["model"], row["seeds"], row["min"], row["max"]) == ("defend", 3, 0.1, 0.6)
    assert row["mean"] == pytest.approx(0.3)
    assert row["sd"] == pytest.approx(statistics.stdev((0.1, 0.2, 0.6)))
    assert over_seeds.worst_over_seeds(of(fake_run.experiment(), rows)) == []
    control = [{**w, "model": w["model"].replace("defend", "control"), "accuracy": w["accuracy"] + 0.1} for w in rows]
    control[0]["accuracy"] += 0.01
    transferred = [{**w, "threat_model": "any"} for w in (*rows, *control)]
    (worse,) = results.across(of(experiment, [*rows, *control, *transferred]))["differences"]
    assert (worse["model"], worse["reference"]) == ("defend", "control")
    assert (worse["threat_title"], worse["attack_title"]) == ("worst case", "Linf ≤ 0.2, made on the model itself")
    sd = statistics.stdev((-0.11, -0.1, -0.1))
    assert worse["difference"] == pytest.approx(-0.31 / 3)
    assert worse["half_width"] == pytest.approx(4.3027 * sd / 3**0.5, rel=1e-3)
    assert worse["resolved"]


FLAG = {
    "name": "zero_gradients",
    "fired": True,
    "measured": "30 of 30 gradients are zero.",
    "remedy": "Attack through them.",
}


def with_verdict(root: Storage, directory: Storage, record: dict[str, Any]) -> dict[str, Any]:
    record["worst_case"] = worst_cases(root, record)
    active = {"n": 20, "found": 3, "share": 0.15, "random_found": 1, "passed": False}
    record["reliability"] = {
        "defend": {
            "probe": {},
            "active": {
                "bim:eps=0.2,steps=40": active,
                "ddn:steps=60": {**active, "n": 2, "share": None, "passed": None},
            },
            "flags": [FLAG],
        },
        "control": {"probe": {}, "active": {}, "flags": [{**FLAG, "fired": False}]},
    }
    directory.write_json("run.json", record)
    return record


@pytest.mark.slow
def test_a_flag_stands_in_report_table_and_metrics_with_its_remedy(
    run: tuple[Storage, Storage, dict[str, Any]],
) -> None:
    root, directory, _ = run
    record = with_verdict(*run)
    report.build(directory, root)
    for name in ("report.html", "table.md"):
        text = directory.read_bytes(f"report/{name}").decode()
        assert text.count("Attack through them.") == 1, name
        assert "30 of 30 gradients are zero." in text
    html = directory.read_bytes("report/report.html").decode()
    assert "3 of 20" in html
    assert "failed: untrusted" in html
    assert "undecided" in html
    data = json.loads(directory.read_bytes("report/table.json"))
    assert [(f["model"], f["name"]) for f in data["flags"]] == [("defend", "zero_gradients")]
    assert len(data["worst_case"]) == len(record["worst_case"]) - 2, "nothing was transferred to no_defense"
    metrics = table_metrics(RunRecord.from_json(record), "defend")
    assert metrics["flag/zero_gradients"] == 1
    assert metrics["active_test/bim"] == 0.15
    assert "active_test/ddn" not in metrics
    assert table_metrics(RunRecord.from_json(record), "control")["flag/zero_gradients"] == 0
    assert metrics["worst_case/white_box/linf_0.2"] == pytest.approx(
        next(
            w["accuracy"]
            for w in record["worst_case"]
            if (w["model"], w["threat_model"], w["norm"]) == ("defend", "white_box", "linf")
        )
    )


@pytest.mark.slow
def test_what_an_untrusted_attack_says_is_marked_wherever_it_stands(
    run: tuple[Storage, Storage, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """BIM failed its active test on the defended model; examples of it for the source, transferred, are not concerned."""
    root, directory, _ = run
    record = with_verdict(*run)
    report.build(directory, root)
    data = json.loads(directory.read_bytes("report/table.json"))
    marked = {(row["model"], key) for row in data["rows"] for key, cell in row["cells"].items() if cell["untrusted"]}
    assert marked == {("defend", "white_box/bim")}
    bim = str(AttackSpec.parse("bim:eps=0.2,steps=40"))
    assert [(w["model"], w["threat_model"], w["norm"]) for w in data["worst_case"] if w["untrusted"] == [bim]] == [
        ("defend", "white_box", "linf"),
        ("defend", "any", "linf"),
    ]
    assert sum(bool(w["untrusted"]) for w in data["worst_case"]) == 2
    lines = directory.read_bytes("report/table.csv").decode().splitlines()
    assert lines[0].endswith(",untrusted")
    assert [",".join(line.split(",")[:3]) for line in lines[1:] if line.endswith(",1")] == ["defend,defended,white_box"]

    (cell,) = [row["cells"]["white_box/bim"] for row in data["rows"] if row["model"] == "defend"]
    value = labels.percent(cell["accuracy"])
    note = "This holds on defend: BIM, eps 0.2, 40 steps."
    html, text = (directory.read_bytes(f"report/{name}").decode() for name in ("report.html", "table.md"))
    assert f"<td>{value}†<small>" in html
    assert note in html
    assert note in text
    (row,) = [line for line in text.splitlines() if line.startswith("| defend (defended)")]
    assert row.count("†") == 1
    assert f" {value}† (" in row
    worst = [line for line in text.splitlines() if line.startswith("| defend | Linf") and "† |" in line]
    assert len(worst) == 2
    (short,) = [s for s in sentences.in_short(RunRecord.from_json(record)) if s.startswith("defend")]
    assert f"{value}† % under the worst white-box attack (BIM" in short
    assert "† % in the worst case per sample at Linf" in short
    assert short.count("†") == 2
    assert "†" not in "".join(s for s in sentences.in_short(RunRecord.from_json(record)) if not s.startswith("defend"))

    terminal.print_table(directory)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{value}†" in printed
    assert note in printed

    metrics = table_metrics(RunRecord.from_json(record), "defend")
    assert {k for k in metrics if k.startswith("untrusted/")} == {
        "untrusted/white_box/bim",
        "untrusted/worst_case/white_box/linf_0.2",
        "untrusted/worst_case/any/linf_0.2",
    }
    assert metrics["untrusted/white_box/bim"] == 1
    assert metrics["white_box/bim"] == cell["accuracy"]
    assert not any(k.startswith("untrusted/") for k in table_metrics(RunRecord.from_json(record), "control"))


def test_examples_of_an_attack_that_failed_on_their_source_are_marked_where_they_are_transferred(
    run: tuple[Storage, Storage, dict[str, Any]],
) -> None:
    root, _, record = run
    with_verdict(*run)
    record["reliability"] = {"no_defense": record["reliability"]["defend"]}
    cells = {row["model"]: row["cells"] for row in results.table(RunRecord.from_json(record))["rows"]}
    assert {(m, k) for m, c in cells.items() for k, v in c.items() if v["untrusted"]} == {
        ("no_defense", "white_box/bim"),
        ("control", "transfer/bim"),
        ("defend", "transfer/bim"),
    }
    assert [
        c["untrusted"] for c in results.comparisons(RunRecord.from_json(record), root) if c["attack"].startswith("bim")
    ] == [True]
    found = [
        (w["model"], w["threat_model"]) for w in verdicts.worst_cases(RunRecord.from_json(record)) if w["untrusted"]
    ]
    assert found == [("no_defense", "white_box"), ("control", "any"), ("defend", "any")]


@pytest.mark.slow
def test_nothing_is_marked_where_every_attack_passed(run: tuple[Storage, Storage, dict[str, Any]]) -> None:
    root, directory, _ = run
    record = with_verdict(*run)
    record["reliability"]["defend"]["active"]["bim:eps=0.2,steps=40"]["passed"] = True
    directory.write_json("run.json", record)
    report.build(directory, root)
    for name in ("report.html", "table.md", "table.json", "table.csv"):
        assert "†" not in directory.read_bytes(f"report/{name}").decode(), name
    assert not any(k.startswith("untrusted/") for k in table_metrics(RunRecord.from_json(record), "defend"))


def test_over_the_seeds_one_untrusted_replicate_marks_the_row(run: tuple[Storage, Storage, dict[str, Any]]) -> None:
    record = with_verdict(*run)
    base = {**record["experiment"], "seeds": 2, "models": ["no_defense:defense=none", "defend"]}
    names = [name for name in roles_of(from_dict(Experiment, base)) if name.startswith("defend")]
    mine = [e for e in record["evaluations"] if (e["model"], e["threat_model"]) == ("defend", "white_box")]
    two = [{**e, "model": name, "source": name} for e in mine for name in names]
    worst = [{**w, "model": name} for w in record["worst_case"] if w["model"] == "defend" for name in names]
    seeds = {**record, "experiment": base, "evaluations": two, "worst_case": worst}
    seeds["reliability"] = {names[1]: record["reliability"]["defend"]}
    rows = results.across(RunRecord.from_json(seeds))["over_seeds"]
    assert [r["attack"].partition(":")[0] for r in rows if r["untrusted"]] == ["bim"]
    assert {w["norm"] for w in verdicts.worst_over_seeds(RunRecord.from_json(seeds)) if w["untrusted"]} == {"linf"}


def test_the_terminal_says_what_was_flagged(
    run: tuple[Storage, Storage, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with_verdict(*run)
    terminal.print_table(run[1])
    text = " ".join(capsys.readouterr().out.split())
    assert "defend: zero gradients. 30 of 30 gradients are zero. Attack through them." in text
    assert "worst case per sample" in text
    assert "0 of 1 attacks found the adversarial examples that were planted" in text


@pytest.mark.slow
def test_the_transfer_matrix_has_every_pair_and_white_box_on_its_diagonal(
    run: tuple[Storage, Storage, dict[str, Any]],
) -> None:
    root, directory, record = run
    assert verdicts.transfer_matrices(RunRecord.from_json(record)) == {}  # one source alone is no matrix
    for e in list(record["evaluations"]):
        if (e["model"], e["threat_model"]) == ("defend", "transfer"):
            record["evaluations"].append({**e, "source": "control", "threat_model": "transfer:control"})
    matrices = verdicts.transfer_matrices(RunRecord.from_json(record))
    sources, models, values = matrices["FGSM, eps 0.2"]
    assert (sources, models) == (["no_defense", "control"], ["no_defense", "control", "defend"])
    accuracy = {
        (e["source"], e["model"]): e["metrics"]["accuracy"]
        for e in record["evaluations"]
        if e["attack"].startswith("fgsm") and e["source"]
    }
    for i, source in enumerate(sources):
        for j, model in enumerate(models):
            wanted = accuracy.get((source, model))
            assert np.isnan(values[i, j]) if wanted is None else values[i, j] == wanted
    assert values[1, 1] == accuracy["control", "control"]
    directory.write_json("run.json", record)
    assert "plot_transfer" in report.build(directory, root)


# -- randomised networks -----------------------------------------------------------------------------------------------------


IMAGES, CHUNKS = 12, [(0, 0, 6), (1, 6, 12)]
COMMON = {"test": "pyramids/test", "seed": 0, "device": "cpu", "threads": 1}


def with_network(directory: Path, arch: str) -> dict[str, Any]:
    """What every task is told, of a storage with one network and the images that it is attacked with."""
    root = Storage(str(directory))
    rng = np.random.default_rng(0)
    columns = {
        "index": pa.array(np.arange(IMAGES)),
        "label": pa.array(rng.integers(0, 10, IMAGES).astype(np.int32)),
        "image": shards.tensor_array(rng.integers(0, 256, (IMAGES, 1, 28, 28), dtype=np.uint8)),
    }
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    data = out.getvalue()
    shard = {"name": "shard-00000.parquet", "rows": IMAGES, "bytes": len(data)}
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    manifest = {"version": shards.FORMAT_VERSION, "num_rows": IMAGES, "rows_per_shard": IMAGES, "shards": [shard]}
    root.write_bytes("pyramids/test/shard-00000.parquet", data)
    root.write_json("pyramids/test/manifest.json", manifest)
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch=arch, defense="none")
    torch.manual_seed(0)
    exports.export(root / "models/net", build_net(config, shapes), config, shapes)
    return {**COMMON, "root": root.uri, "trusted": [arch]}


def attacked(common: dict[str, Any], attack_text: str, *tasks: list[tuple[int, int, int]]) -> list[Any]:
    """Examples and records of both chunks, made by these tasks one after the other."""
    examples, judged = f"examples/{attack_text}", f"judged/{attack_text}"
    for chunks in tasks:
        torch.rand(7)  # whatever else the worker has drawn
        job = {"source": "models/net", "attack": attack_text, "early_leaving": False, "judges": {judged: "models/net"}}
        attack_tasks.attack_chunks({**common, **job, "bfloat16": False, "examples": examples, "chunks": chunks})
    root = Storage(common["root"])
    columns = read_chunks(root / judged, 2)
    return [
        *(read_examples(root / examples, i).tolist() for i in range(2)),
        {k: v.tolist() for k, v in columns.items()},
    ]


@pytest.mark.parametrize("text", ["fgsm:eps=0.2", "pgd:eps=0.2,steps=3"])
def test_a_randomised_network_is_judged_the_same_by_any_tasks_in_any_order(text: str, tmp_path: Path) -> None:
    text = str(AttackSpec.parse(text))
    orders = [(CHUNKS,), (CHUNKS[1:], CHUNKS[:1]), (CHUNKS[::-1],)]
    one, *others = (
        attacked(with_network(tmp_path / str(i), "own_network:make_drawing"), text, *order)
        for i, order in enumerate(orders)
    )
    # what is judged again finds its examples made, and nothing drawn for them
    shutil.rmtree(tmp_path / "0" / "judged")
    others.append(attacked({**COMMON, "root": str(tmp_path / "0")}, text, CHUNKS))
    for other in others:
        assert other == one


def test_the_attacks_of_a_chunk_draw_apart_whoever_is_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(*arguments: Any, generator: torch.Generator, **options: Any) -> Any:
        seeds.append(generator.initial_seed())
        return run_attack_on_copy(*arguments, generator=generator, **options)

    monkeypatch.setattr(attack_tasks, "run_attack_on_copy", spy)
    common = with_network(tmp_path, "own_network:make")
    job = {"bfloat16": False, "judges": {}, "chunks": CHUNKS}
    texts = [
        "noise:eps=0.2",
        "noise:eps=0.1",
        "pgd:eps=0.2,steps=1",
        "apgd:eps=0.2,steps=1",
        "square:eps=0.2,queries=1",
    ]
    for text in texts:
        source = None if text.startswith("noise") else "models/net"
        early = text.startswith("pgd")
        where = {"source": source, "early_leaving": early, "examples": f"examples/{text}"}
        attack_tasks.attack_chunks({**common, **job, **where, "attack": text})
    assert len(set(seeds)) == len(seeds) == len(texts) * len(CHUNKS)
    # the examples show it: these two differed in their length alone
    _, clean, _ = attack_tasks.load_images({**common}, 0, 6)
    signs = [
        np.sign(read_examples(Storage(common["root"]) / f"examples/{text}", 0) - clean.numpy()).ravel()
        for text in texts[:2]
    ]
    assert abs(np.corrcoef(*signs)[0, 1]) < 0.2
    # no model and no other setting of the evaluation decides the draws, so that models are compared under the same ones
    before = seeds[4:6]
    seeds.clear()
    where = {"source": "models/net", "early_leaving": False, "examples": "examples/elsewhere"}
    attack_tasks.attack_chunks({**common, **job, **where, "attack": texts[2], "chunks": CHUNKS[::-1]})
    assert seeds == before[::-1]


def test_a_randomised_network_is_tested_the_same_by_any_worker(tmp_path: Path) -> None:
    found = []
    for draws in (0, 5):
        common = with_network(tmp_path / str(draws), "own_network:make_drawing")
        for text in ("", "pgd:eps=0.2,steps=3"):
            torch.rand(draws)
            job = {
                "model": "models/net",
                "attack": text,
                "norm": "linf",
                "eps": 0.2,
                "images": 8,
                "name": "net",
                "bfloat16": False,
            }
            reliability.measure({**common, **job, "file": f"reliability/{text.partition(':')[0]}.json"})
        root = Storage(common["root"])
        found.append([root.read_json(f"reliability/{name}.json") for name in ("", "pgd")])
    assert found[0] == found[1]
    assert found[0][0]["random_output"]["largest_difference"] > 0


def test_the_active_test_is_given_the_network_and_its_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, Any]] = []

    def spy(model: Any, *arguments: Any, fast: Any, **options: Any) -> dict[str, Any]:
        given.append((model, fast))
        return active_test.active_test(model, *arguments, fast=fast, **options)

    monkeypatch.setattr(reliability, "active_test", spy)
    common = with_network(tmp_path, "own_network:make")
    job = {
        "model": "models/net",
        "attack": "fgsm:eps=0.2",
        "norm": "linf",
        "eps": 0.2,
        "images": 2,
        "name": "net",
        "bfloat16": False,
    }
    reliability.measure({**common, **job, "file": "reliability/active.json"})
    ((model, fast),) = given
    assert model is attack_tasks.load_model(common["root"], "models/net", "cpu")
    assert fast is attack_tasks.load_fast_copy(common["root"], "models/net", "cpu", torch.Size((1, 28, 28)), False)
    assert fast is not None


@pytest.mark.parametrize("text", ["", "pgd:eps=0.2,steps=3"])
def test_reliability_is_measured_in_micro_batches_where_memory_is_short(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = with_network(tmp_path, "own_network:make")
    job = {
        "model": "models/net",
        "name": "net",
        "attack": text,
        "norm": "linf",
        "eps": 0.2,
        "images": 8,
        "bfloat16": False,
    }

    def measured(file: str) -> dict[str, Any]:
        reliability.measure({**common, **job, "file": f"reliability/{file}.json"})
        found: dict[str, Any] = Storage(common["root"]).read_json(f"reliability/{file}.json")
        return found

    whole = measured("whole")
    assert "micro_batch" not in whole
    network = attack_tasks.load_model(common["root"], "models/net", "cpu")
    monkeypatch.setattr(attack_tasks, "load_fast_copy", lambda *_: None)
    monkeypatch.setattr(attack_tasks, "load_model", lambda *_: Small(network, 3))
    parts = measured("parts")
    assert parts.pop("micro_batch") == 2
    assert parts.keys() == whole.keys()
    for name in ("n", "clean_correct", "output", "zero_gradients") if not text else ("n", "left_out", "random_found"):
        assert parts[name] == whole[name]
    monkeypatch.setattr(attack_tasks, "load_model", lambda *_: Small(network, 0))
    with pytest.raises(ResourceError, match="the reliability of net on a single image does not fit"):
        measured("none")


def test_chunks_of_a_task_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="chunks_per_attack"):
        ScalingConfig(chunks_per_attack=0)
