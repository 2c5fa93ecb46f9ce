"""The paper's tables at scale smoke, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.models.classifiers import build_classifier
from pipeline.main import main
from pipeline.recipes.registry import RECIPES
from pipeline.training.exports import load_reformed

pytestmark = pytest.mark.cluster


# One Ray Train run follows the other. Each starts five processes, which costs more than the training.
ONE_RUN = ("--scaling.parallel-models", "1")


def run_recipe(name: str, storage: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a recipe, and return its record and the data of its report."""
    assert main(["run", name, "--storage", str(storage), *more]) == 0
    (directory,) = storage.glob(f"runs/{name}-*")
    record = json.loads((directory / "run.json").read_text())
    return record, json.loads((directory / "report" / "table.json").read_text())


DEFENSES = {"no_defense", "control", "adv_pgd", "comdefend", "defend"}
Result = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def defenses(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Run each kind of defense on MNIST: rows of table 2, with the PGD column alone."""
    storage = tmp_path_factory.mktemp("tables")
    recipe = RECIPES["table2-pgd-smoke"].make()
    models = [m for m in recipe.models if m.partition(":")[0] in DEFENSES]
    attacks = [a for a in recipe.evaluation.attacks if a.startswith(("noise", "pgd"))]
    some = ("--models", *models, "--evaluation.attacks", *attacks)
    return storage, *run_recipe("table2-pgd-smoke", storage, *ONE_RUN, *some)


def test_every_defense_meets_its_threat_models(defenses: Result) -> None:
    _, record, table = defenses
    threat_models: dict[str, set[str]] = {}
    for e in record["evaluations"]:
        threat_models.setdefault(e["model"], set()).add(e["threat_model"])
        if e["threat_model"] in ("transfer", "grey_box"):
            assert e["source"] == "no_defense"
    assert set(threat_models) == DEFENSES
    for model, threats in threat_models.items():
        expected = {"clean", "random", "white_box"}
        expected |= {"grey_box"} if model == "comdefend" else set() if model == "no_defense" else {"transfer"}
        assert threats == expected, model
    printed = {(r["row"], r["column"]): r["ours"] for r in table["paper"]}
    assert {o["threat_model"] for o in printed["adv_pgd", "pgd"]} == {"white_box", "transfer"}


def test_the_report_has_the_paper_beside(defenses: Result) -> None:
    storage, _, _ = defenses
    (directory,) = storage.glob("runs/table2-pgd-smoke-*")
    html = (directory / "report" / "report.html").read_text()
    for part in ("Beside the paper", "grey-box", "ComDefend", "52.3", "scale “smoke”"):
        assert part in html
    assert "| Adv. PGD | resnet18 | pgd | 52.3 |" in (directory / "report" / "table.md").read_text()


def test_comdefend_stands_in_front_of_the_undefended_classifier(defenses: Result) -> None:
    storage, record, _ = defenses
    paths = {name: storage / model["path"] for name, model in record["models"].items()}
    model = load_reformed(paths["comdefend"], paths["no_defense"])
    images = torch.rand(4, 1, 28, 28)
    assert model(images).shape == (4, 10)
    assert record["models"]["comdefend"]["clean_validation"] is None
    assert record["models"]["comdefend"]["reconstruction_validation"] > 0


@pytest.mark.drill
def test_another_recipe_trains_only_what_it_has_more(defenses: Result) -> None:
    """The robustness table reuses the models of another table, and adds every threat model and a verdict."""
    storage, record, _ = defenses
    before = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/model.json")}
    models = [m for m in RECIPES["robustness-smoke"].make().models if not m.startswith("adv_")]
    whole, table = run_recipe("robustness-smoke", storage, "--figures", "fig8", "--models", *models)
    assert {f: f.stat().st_mtime_ns for f in storage.glob("models/*/model.json")} == before
    assert whole["models"]["defend"]["path"] == record["models"]["defend"]["path"]
    (directory,) = storage.glob("runs/robustness-smoke-*")
    for plot in ("fig8", "transfer", "accuracy", "curves", "curves-transfer"):
        assert (directory / "report" / "plots" / f"{plot}.svg").exists(), plot
    with np.load(directory / "figures.npz") as figures:
        assert figures["fig8__r__defend"].shape == (8,)

    transfers = {(e["source"], e["model"]) for e in whole["evaluations"] if e["threat_model"].startswith("transfer")}
    names = list(whole["models"])
    assert transfers == {(a, b) for a in names for b in names if a != b}
    judgements = [(e["model"], e["path"]) for e in whole["evaluations"]]
    assert len(judgements) == len(set(judgements)), "the same examples, judged by the same model, stand there twice"
    by_attack = {(e["model"], e["threat_model"], e["attack"].partition(":")[0]) for e in whole["evaluations"]}
    assert {m for m, _, attack in by_attack if attack == "adaptive"} == {"defend"}
    for name in names:
        assert {(name, "white_box", "autoattack"), (name, "black_box", "square")} <= by_attack
        tested = whole["reliability"][name]
        assert {attack.partition(":")[0] for attack in tested["active"]} == {
            "pgd",
            "autoattack",
            "square",
            "ddn",
            "fab-t",
        }
        assert len(tested["flags"]) == len({f["name"] for f in tested["flags"]}) > 5
    worst = {(w["model"], w["threat_model"]): w["accuracy"] for w in table["worst_case"] if w["norm"] == "linf"}
    for e in whole["evaluations"]:
        if e["threat_model"] in ("white_box", "black_box") and "eps=0.2" in e["attack"]:
            assert worst[e["model"], "white_box"] <= e["metrics"]["accuracy"]
        assert worst[e["model"], "any"] <= worst[e["model"], "white_box"]


@pytest.mark.drill
def test_examples_from_one_network_to_another_in_colour(ray_cluster: str, tmp_path: Path) -> None:
    """Table 8 without ResNet-50 has 32x32 colour images, crops, the alternating schedule and every transfer."""
    models = [m for m in RECIPES["table8-smoke"].make().models if "resnet50" not in m and "control" not in m]
    record, table = run_recipe("table8-smoke", tmp_path, *ONE_RUN, "--models", *models)
    assert set(record["models"]) == {m.partition(":")[0] for m in models}
    assert all(row["ours"] for row in table["paper"] if row["arch"] != "resnet50")
    for e in record["evaluations"]:
        if e["threat_model"].startswith("transfer:"):
            assert e["source"] == e["threat_model"].partition(":")[2]
            assert e["source"] != e["model"]
    # All models judge the same set of examples of a source and an attack.
    example_sets = {e["examples"] for e in record["evaluations"] if e["threat_model"] == "transfer:defend-vgg16"}
    assert len(example_sets) == 1
    history = sorted((tmp_path / record["models"]["defend-vgg16"]["path"]).glob("history/*.json"))
    assert [json.loads(f.read_text())["phase"] for f in history] == ["autoencoder", "classifier", "joint"]
    levels = {name for name in record["data"]["splits"] if name.startswith("train/")}
    assert levels == {"train/none"}  # Crops need new levels, so the shards hold none.


@pytest.mark.drill
def test_torchvisions_own_stem_and_four_levels(ray_cluster: str, tmp_path: Path) -> None:
    """Table 4's setting starts from pretrained weights of another number of classes."""
    weights = tmp_path / "resnet18.pth"
    network = build_classifier("resnet18", num_classes=7, channels=3, image_size=64, width=4)
    torch.save(network.state_dict(), weights)
    pretrained = ("--train.pretrained", str(weights), "--train.replace-head")
    record, _ = run_recipe(
        "table4-smoke", tmp_path, *ONE_RUN, *pretrained, "--models", "no_defense:defense=none", "defend:seed=1"
    )
    assert record["data"]["levels"] == [64, 32, 16, 8]
    assert (tmp_path / "weights").is_dir()
    assert set(record["models"]) == {"no_defense", "defend"}


@pytest.mark.drill
def test_seeds_and_a_model_that_diverges(ray_cluster: str, tmp_path: Path) -> None:
    """Two seeds of each model train side by side. The report names the diverged one, and the others go on."""
    models = ("--models", "no_defense:defense=none", "control:defense=none,seed=1", "wild:seed=1,lr=1e30")
    attacks = ("--evaluation.attacks", "fgsm:eps=0.2")
    record, table = run_recipe("eq3-smoke", tmp_path, *models, *attacks, "--seeds", "2")
    assert set(record["diverged"]) == {"wild-s0", "wild-s1"}
    transferred = {e["model"]: e["source"] for e in record["evaluations"] if e["threat_model"] == "transfer"}
    assert transferred == {"control-s0": "no_defense-s0", "control-s1": "no_defense-s1"}
    (report,) = tmp_path.glob("runs/eq3-smoke-*/report/report.html")
    assert "training diverged" in report.read_text()
    assert "Over the seeds" in report.read_text()
    for row in table["over_seeds"]:
        values = [
            e["metrics"]["accuracy"]
            for e in record["evaluations"]
            if e["model"].rpartition("-")[0] == row["model"]
            and (e["threat_model"], e["attack"]) == (row["threat_model"], row["attack"])
        ]
        assert row["seeds"] == 2
        assert row["accuracy_mean"] == pytest.approx(sum(values) / 2)
