"""A report's sentences and columns are about what was run, and about nothing else."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import fake_run
import pytest
from rich.console import Console

from components.config import EvaluationConfig, Experiment, TrainConfig
from components.fields import to_dict
from pipeline.evaluation import addresses, attack_progress, plan
from pipeline.records import RunRecord
from pipeline.reporting import markdown, records, report, results, sentences, terminal, verdicts
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import summary

NET = Experiment(
    name="attack-net",
    models=("net",),
    train=TrainConfig(defense="none", epochs=0, shared_blocks=1, pretrained="/x/net.pth"),
    evaluation=EvaluationConfig(threat_models=("white_box",)),
)


def evaluation(model: str, threat: str, name: str, source: str | None = None) -> dict[str, Any]:
    accuracy = {"accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "clean_accuracy": 1.0, "success_rate": 0.5}
    made_on = source or (model if threat.endswith("_box") else None)
    return {"model": model, "source": made_on, "threat_model": threat, "attack": name, "n": 4, "metrics": accuracy}


def external(*more: dict[str, Any]) -> dict[str, Any]:
    """run.json of a classifier that was not trained here, attacked white-box only."""
    model = {"path": "models/net", "train": to_dict(NET.model_configs()["net"]), "parameters": {"classifier": 7}}
    times = {"clean_validation": None, "reconstruction_validation": None, "seconds": 0.0, "images_per_second": 0.0}
    return {
        "schema": 1,
        "name": NET.name,
        "experiment": to_dict(NET),
        "created": "2026-05-28T20:26:40+00:00",
        "finished": "2026-05-28T20:41:02+00:00",
        "command": "python pipeline/main.py attack --model /x/net.pth",
        "models": {"net": {**model, **times, "autoencoder": False}},
        "evaluations": [evaluation("net", "clean", "none"), evaluation("net", "white_box", "pgd:eps=0.3"), *more],
        "stages": {"pyramids": 1.0, "train": 2.0, "attack": 3.0},
    }


def explanation(*evaluations: dict[str, Any]) -> list[str]:
    """Return the sentences about a run of the fake experiment with these evaluations."""
    experiment = to_dict(fake_run.experiment())
    return sentences.explanation(
        RunRecord.from_json({"name": "x", "experiment": experiment, "evaluations": list(evaluations)})
    )


def whole(record: dict[str, Any], root: Storage) -> dict[str, str]:
    """All that people read of a record: the page without its plots, Markdown, and the terminal."""
    at = root / "runs/x"
    at.write_json("run.json", record)
    read = records.read_run(at)
    out = io.StringIO()
    terminal.print_table(at, console=Console(file=out, width=140))
    html = report.page(read, report.table_data(read, root), {}, sentences.missing(read, {"clean": 0}, {}, []), at)
    return {
        "html": " ".join(re.sub(r"<[^>]+>", " ", html.partition("<main>")[2].partition("<pre>")[0]).split()),
        "markdown": markdown.markdown(read),
        "terminal": " ".join(out.getvalue().split()),
    }


def test_of_an_external_model_nothing_is_said_of_what_was_not_run(tmp_path: Path) -> None:
    texts = whole(external(), Storage(tmp_path))
    for place, text in texts.items():
        assert "White-box: the attacker knows everything about the model under test" in text, place
        for absent in ("Transfer", "transfer", "Control", "control", "Black-box", "undefended", "defense", "seed"):
            found = re.findall(rf"[^.|]*\b{absent}\b[^.|]*", text.replace("Defend++", ""))
            assert not found, (place, absent, found)


def test_each_threat_model_of_the_run_is_explained_and_no_other() -> None:
    heads = {
        "white_box": "White-box:",
        "black_box": "Black-box:",
        "grey_box": "Grey-box:",
        "transfer": "Transfer:",
        "transfer:vgg": "Transfer from vgg:",
    }
    for threat, head in heads.items():
        said = explanation(evaluation("defend", threat, "pgd:eps=0.3", "no_defense"))
        assert [h for h in heads.values() if any(s.startswith(h) for s in said)] == [head]
        assert not any("the same, from its scores" in s for s in said)


def test_the_controls_that_are_named_were_run() -> None:
    noise, control = (
        evaluation("defend", "random", "noise:eps=0.2"),
        evaluation("control", "transfer", "fgsm:eps=0.2", "x"),
    )
    defended = evaluation("defend", "white_box", "fgsm:eps=0.2")

    def said(*evaluations: dict[str, Any]) -> str:
        found = [s for s in explanation(*evaluations) if "ontrol" in s]
        assert len(found) < 2
        return "".join(found)

    assert said(defended) == ""
    assert "undefended model of another seed" not in said(defended, noise)
    assert "random noise of the same size" in said(defended, noise)
    assert "random noise" not in said(defended, control)
    assert said(defended, control).startswith("Control: an undefended model of another seed on the same examples. ")
    both = said(defended, control, noise)
    assert "another seed on the same examples, and random noise of the same size without any attacker. Only" in both
    assert "a defended model" not in said(control, {**noise, "model": "control"}), "there is none"


def test_an_undefended_model_is_the_source_of_transfer_only_where_there_is_transfer(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    record = fake_run.write(root, gallery=False).read_json("run.json")
    assert "undefended, source of transfer" in whole(record, root)["html"]
    record["evaluations"] = [e for e in record["evaluations"] if e["threat_model"] != "transfer"]
    text = whole(record, root)["html"]
    assert "source of transfer" not in text
    assert "no_defense undefended" in text


PASSED = {"n": 8, "found": 8, "share": 1.0, "random_found": 0, "passed": True}
UNDECIDED = {**PASSED, "n": 4, "share": None, "passed": None}


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": {"x": UNDECIDED}}, "no flag raised on 1 model; the active test of 1 attack is undecided"),
        ({"a": {}}, "no flag raised on 1 model; none of its attacks has an active test"),
        ({"a": {}, "b": {}}, "no flag raised on 2 models; none of their attacks has an active test"),
        (
            {"a": {"x": PASSED, "y": UNDECIDED}},
            "1 of 1 attacks found the adversarial examples that were planted for them, 1 is undecided",
        ),
        (
            {"a": {"x": PASSED, "y": {**PASSED, "passed": False}}, "b": {"x": PASSED}},
            "2 of 3 attacks found the adversarial examples that were planted for them (",
        ),
    ],
)
def test_reliability_in_short_counts_what_was_decided(models: dict[str, Any], said: str) -> None:
    record = external()
    record["reliability"] = {m: {"probe": {}, "active": active, "flags": []} for m, active in models.items()}
    short = sentences.reliability_in_short(RunRecord.from_json(record))
    assert said in short
    assert "0 of 0" not in short
    assert not re.search(r"\b1 (models|flags)\b|\b0 flags", short)
    flag = {"name": "zero_gradients", "fired": True, "measured": "", "remedy": ""}
    record["reliability"]["a"]["flags"] = [flag]
    assert "1 flag raised (a) on" in sentences.reliability_in_short(RunRecord.from_json(record))


def test_a_table_of_active_tests_stands_only_where_there_were_some(tmp_path: Path) -> None:
    record = external()
    record["reliability"] = {"net": {"probe": {}, "active": {}, "flags": []}}
    text = whole(record, Storage(tmp_path))["html"]
    assert "planted examples found" not in text
    assert "plants an adversarial example" not in text
    record["reliability"]["net"]["active"] = {"pgd:eps=0.3": PASSED}
    assert "planted examples found" in whole(record, Storage(tmp_path))["html"]


def test_progress_names_what_is_attacked() -> None:
    model = plan.Model(name="net", path="models/net", sha256="")
    chunk = {"address": "", "stop_on_success": False, "bfloat16": False}
    names = [
        attack_progress.task_name(addresses.ExampleSet(source=source, attack=spec, **chunk))  # type: ignore[arg-type]
        for source, spec in ((None, "none"), (None, "noise:eps=0.3"), (model, "pgd:eps=0.3"))
    ]
    assert names == ["clean images", "noise:eps=0.3", "pgd:eps=0.3 on net"]


def test_a_stage_that_trains_nothing_is_not_called_train(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    for place, text in whole(external(), root).items():
        if place != "terminal":
            assert "train 2" not in text, place
            assert re.search(r"models:? 2", text), place
    assert results.model_stage(NET) == "models"
    assert results.model_stage(fake_run.experiment()) == "train"
    trained = fake_run.write(root, gallery=False).read_json("run.json")
    assert "train 6 min" in whole(trained, root)["html"]


def test_a_model_that_was_not_trained_has_no_training_time(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    texts = whole(external(), root)
    assert "| net | – | – | – | – |" in texts["markdown"]
    assert "net external, not trained here classifier 7 – – – –" in texts["html"]
    assert "econstruction error: mean" not in texts["markdown"], "no model reconstructs"
    record = external()
    record["models"], record["evaluations"], record["finished"] = {}, [], None
    text = whole(record, root)["html"]
    assert "not trained yet" not in text
    assert "not read yet: net" in text


def test_bfloat16_is_said_of_the_attacks_of_the_run() -> None:
    record = external()
    record["experiment"]["evaluation"]["search_precision"] = "bfloat16"
    (said,) = [s for s in sentences.explanation(RunRecord.from_json(record)) if "bfloat16" in s]
    assert said.startswith("PGD searched in bfloat16")
    record["evaluations"] = [evaluation("net", "white_box", "fgsm:eps=0.3")]
    assert not [s for s in sentences.explanation(RunRecord.from_json(record)) if "bfloat16" in s]


def test_controls_that_are_listed_were_evaluated(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    record = fake_run.write(root, gallery=False).read_json("run.json")
    assert "Controls here: control." in whole(record, root)["terminal"]
    record["evaluations"] = [e for e in record["evaluations"] if e["model"] != "control"]  # it diverged
    assert "Controls here" not in whole(record, root)["terminal"]


def test_one_seed_of_several_has_no_range(tmp_path: Path) -> None:
    """The others diverged: least and greatest of one would look like an interval without width."""
    record = {**external(), "experiment": to_dict(dataclasses.replace(fake_run.experiment(), seeds=2)), "models": {}}
    worst = {"threat_model": "white_box", "norm": "linf", "eps": 0.3, "n": 4, "attacks": 1}
    low_high = {"accuracy": 0.25, "accuracy_low": 0.1, "accuracy_high": 0.9}
    record["worst_case"] = [{"model": "defend-s0", **worst, **low_high}]
    record["evaluations"] = [{**e, "model": "defend-s0"} for e in record["evaluations"]]
    for place, text in whole(record, Storage(tmp_path)).items():
        for pretended in ("25.0–25.0", "25.0 25.0 25.0", "50.0 to 50.0", "50.0 50.0 50.0"):
            assert pretended not in text, (place, pretended)


def test_nothing_stands_beside_the_paper_where_the_run_has_none_of_its_cells(tmp_path: Path) -> None:
    record = external()
    record["experiment"]["paper"] = "table1"
    for place, text in whole(record, Storage(tmp_path)).items():
        assert "eside the paper" not in text, place


def test_a_sweep_counts_the_images_that_were_attacked() -> None:
    trial = {
        "number": 1,
        "parameters": {"lam": 0.1},
        "state": "finished",
        "reason": "",
        "epochs": [{"epoch": 1, "clean": 0.9, "robust": 0.5, "each": [[0.9, 0.5]], "n": 83}],
        "models": [],
    }
    space = {"search": "grid", "attack": "pgd:eps=0.3", "images": 200, "parameters": {"lam": {}}}
    record = {
        "trials": [trial],
        "space": space,
        "seed": 0,
        "model": "defend",
        "name": "x",
        "front": [1],
        "references": {},
    }
    record |= {"choice": {"trial": 1, "parameters": {"lam": 0.1}, "clean": 0.9, "robust": 0.5, "rule": "the best"}}
    record |= {"evaluation": None, "experiment": {"seeds": 1}}
    said = summary.overview(record)
    assert "robust on 83 under white-box PGD, eps 0.3." in said
    assert "200" not in said
    record["data"] = {"rows": {"train": 900, "validation": 83}}
    assert "robust on 83 of 83 under white-box PGD, eps 0.3." in summary.overview(record)


def test_a_given_models_description_names_no_suite_that_may_not_have_run(tmp_path: Path) -> None:
    from pipeline.cli import external_model

    file = tmp_path / "net.pth"
    file.write_bytes(b"weights")
    parsed = external_model.parse_external_model(
        ["--model", str(file), "--arch", "own_network:make", "--evaluation.attacks", "pgd:eps=0.3"]
    )
    assert "full suite" not in parsed.description


def test_a_worst_case_over_transferred_examples_is_of_models_that_were_shown_some(tmp_path: Path) -> None:
    """Noise belongs to no model: it alone makes no worst case "also transferred to it"."""
    root = Storage(tmp_path)
    record = external(evaluation("net", "random", "noise:eps=0.3"))
    bounds = {
        "norm": "linf",
        "eps": 0.3,
        "n": 4,
        "accuracy": 0.25,
        "accuracy_low": 0.1,
        "accuracy_high": 0.9,
        "attacks": 1,
    }
    record["worst_case"] = [{"model": "net", "threat_model": threat, **bounds} for threat in ("white_box", "any")]
    for place, text in whole(record, root).items():
        assert "made on the model itself" in text, place
        assert "also transferred" not in text, place
    fake = fake_run.write(root, gallery=False).read_json("run.json")
    fake["worst_case"] = [{"model": m, "threat_model": "any", **bounds} for m in fake_run.MODELS]
    assert [w["model"] for w in verdicts.worst_cases(RunRecord.from_json(fake))] == ["control", "defend"]
    pair = {"threat_model": "any", "norm": "linf", "eps": 0.3, "n": 4, "only_model": 1, "only_against": 0, "p": 1.0}
    fake["worst_case_pairs"] = [{"model": a, "against": "control", **pair} for a in ("no_defense", "defend")]
    assert [w["model"] for w in verdicts.worst_case_pairs(RunRecord.from_json(fake))] == ["defend"]
