"""Worst cases, transfer matrix and flags of the evaluations of a run, in report, terminal and MLflow."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from scipy.stats import binomtest

from components.attacks.spec import AttackSpec
from components.config import Experiment, roles
from components.config.roles import roles_of
from components.evaluation.metrics import worst_case
from components.fields import from_dict, to_dict
from pipeline.evaluation import worst_case as evaluation_worst_case
from pipeline.records import RunRecord
from pipeline.reporting import labels, over_seeds, report, results, sentences, terminal, verdicts
from pipeline.reporting.run_plots import RunPlots
from pipeline.reporting.tracked.metrics import test_metrics as metrics_of
from pipeline.runtime.storage import Storage


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


@pytest.fixture
def run(tmp_path: Path) -> tuple[Storage, Storage, dict[str, Any]]:
    root = Storage(str(tmp_path))
    directory = fake_run.write(root)
    return root, directory, directory.read_json("run.json")


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out of reports whose text is tested: they take seconds."""
    monkeypatch.setattr(RunPlots, "draw", lambda self: {})


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
@pytest.mark.usefixtures("without_plots")
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
@pytest.mark.usefixtures("without_plots")
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
    metrics = metrics_of(RunRecord.from_json(record), "defend")
    assert metrics["reliability/flag/zero_gradients"] == 1
    assert metrics["reliability/active_test/bim"] == 0.15
    assert "reliability/active_test/ddn" not in metrics
    assert (metrics["reliability/flags_raised"], metrics["accuracy/clean"]) == (1, pytest.approx(0.98, abs=0.05))
    assert metrics_of(RunRecord.from_json(record), "control")["reliability/flags_raised"] == 0
    assert metrics["accuracy/linf_0.2_worst_case"] == pytest.approx(
        next(
            w["accuracy"]
            for w in record["worst_case"]
            if (w["model"], w["threat_model"], w["norm"]) == ("defend", "white_box", "linf")
        )
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
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

    metrics = metrics_of(RunRecord.from_json(record), "defend")
    assert {k for k in metrics if k.startswith("reliability/untrusted/")} == {
        "reliability/untrusted/white_box/bim",
        "reliability/untrusted/linf_0.2_worst_case",
        "reliability/untrusted/transfer/linf_0.2_worst_case",
    }
    assert metrics["reliability/untrusted/white_box/bim"] == 1
    assert metrics["accuracy/white_box/bim"] == cell["accuracy"]
    assert not any(k.startswith("reliability/untrusted/") for k in metrics_of(RunRecord.from_json(record), "control"))


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
@pytest.mark.usefixtures("without_plots")
def test_nothing_is_marked_where_every_attack_passed(run: tuple[Storage, Storage, dict[str, Any]]) -> None:
    root, directory, _ = run
    record = with_verdict(*run)
    record["reliability"]["defend"]["active"]["bim:eps=0.2,steps=40"]["passed"] = True
    directory.write_json("run.json", record)
    report.build(directory, root)
    for name in ("report.html", "table.md", "table.json", "table.csv"):
        assert "†" not in directory.read_bytes(f"report/{name}").decode(), name
    assert not any(k.startswith("reliability/untrusted/") for k in metrics_of(RunRecord.from_json(record), "defend"))


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
