"""The paper's tables at scale smoke through the real command line: every defense, network, threat model and data size runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import Experiment, from_dict
from pipeline.checkpoints import load_reformed
from pipeline.main import main

pytestmark = pytest.mark.cluster


def run_recipe(name: str, storage: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its record and the data of its report."""
    assert main(["run", name, "--storage", str(storage), *more]) == 0
    (directory,) = storage.glob(f"runs/{name}-*")
    record = json.loads((directory / "run.json").read_text())
    return record, json.loads((directory / "report" / "table.json").read_text())


@pytest.fixture(scope="module")
def table2(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Table 2 with two seeds: every defense on MNIST."""
    storage = tmp_path_factory.mktemp("tables")
    return storage, *run_recipe("table2-smoke", storage, "--seeds", "2")


def test_every_defense_meets_its_threat_models(table2: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, record, _ = table2
    found: dict[str, set[str]] = {}
    for e in record["evaluations"]:
        found.setdefault(e["model"], set()).add(e["threat_model"])
        if e["threat_model"] in ("transfer", "grey_box"):
            assert e["source"] == f"no_defense-{e['model'][-2:]}"
    assert len(found) == 14
    for model, threats in found.items():
        wanted = {"clean", "random", "white_box"}
        if model.startswith("comdefend"):
            wanted |= {"grey_box"}
        elif not model.startswith("no_defense"):
            wanted |= {"transfer"}
        assert threats == wanted, model


def test_the_report_has_the_paper_beside_and_the_spread(table2: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    storage, record, table = table2
    assert len(table["paper"]) == 35
    assert all(row["ours"] for row in table["paper"])
    assert all(o["seeds"] == 2 for row in table["paper"] for o in row["ours"])
    cells = {(r["model"], r["threat_model"], r["attack"]): r for r in table["over_seeds"]}
    for (model, threat, attack), row in cells.items():
        values = [
            e["metrics"]["accuracy"]
            for e in record["evaluations"]
            if e["model"].rpartition("-")[0] == model and (e["threat_model"], e["attack"]) == (threat, attack)
        ]
        assert row["accuracy_mean"] == pytest.approx(sum(values) / 2)
    assert table["differences"]
    (directory,) = storage.glob("runs/table2-smoke-*")
    html = (directory / "report" / "report.html").read_text()
    for part in ("Beside the paper", "Over the seeds", "grey-box", "ComDefend-wb", "99.47", "scale “smoke”"):
        assert part in html


def test_comdefend_stands_in_front_of_the_undefended_classifier(
    table2: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    storage, record, _ = table2
    paths = {name: storage / model["path"] for name, model in record["models"].items()}
    model = load_reformed(paths["comdefend-s0"], paths["no_defense-s0"])
    images = torch.rand(4, 1, 28, 28)
    assert model(images).shape == (4, 10)
    assert record["models"]["comdefend-s0"]["clean_validation"] is None
    assert record["models"]["comdefend-s0"]["reconstruction_validation"] > 0


def test_another_table_trains_only_what_it_has_more(table2: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    storage, record, _ = table2
    before = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/model.json")}
    pgd, table = run_recipe("table2-pgd-smoke", storage, "--seeds", "2")
    after = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/model.json")}
    assert {f: after[f] for f in before} == before
    new = {f.parent.name for f in after.keys() - before.keys()}
    assert new == {Path(pgd["models"][f"adv_pgd-s{r}"]["path"]).name for r in (0, 1)}
    assert pgd["models"]["defend-s0"]["path"] == record["models"]["defend-s0"]["path"]
    printed = {(r["row"], r["column"]): r["ours"] for r in table["paper"]}
    assert {o["threat_model"] for o in printed["adv_pgd", "pgd"]} == {"white_box", "transfer"}


def test_examples_from_one_network_to_another_in_colour(ray_cluster: str, tmp_path: Path) -> None:
    """Table 8: VGG16, ResNet-50 and ResNet-18 at 32x32, crops, the alternating schedule, every source on every network."""
    record, table = run_recipe("table8-smoke", tmp_path)
    experiment = from_dict(Experiment, record["experiment"])
    assert set(record["models"]) == set(experiment.variants())
    assert all(row["ours"] for row in table["paper"])
    for e in record["evaluations"]:
        if e["threat_model"].startswith("transfer:"):
            assert e["source"] == e["threat_model"].partition(":")[2]
            assert e["source"] != e["model"]
    # one set of examples per source, attack and early leaving, however many models judge it
    made = {e["examples"] for e in record["evaluations"] if e["threat_model"] == "transfer:defend-vgg16"}
    assert len(made) == 1
    history = sorted((tmp_path / record["models"]["defend-vgg16"]["path"]).glob("history/*.json"))
    assert [json.loads(f.read_text())["phase"] for f in history] == ["autoencoder", "classifier", "joint"]
    levels = {name for name in record["data"]["splits"] if name.startswith("train/")}
    assert levels == {"train/none"}  # crops take new levels


def test_torchvisions_own_stem_and_four_levels(ray_cluster: str, tmp_path: Path) -> None:
    """Table 4's setting, from pretrained weights of another number of classes."""
    from torchvision.models import resnet18

    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18(num_classes=7).state_dict(), weights)
    pretrained = ("--train.pretrained", str(weights), "--train.replace-head", "--train.width", "64")
    record, _ = run_recipe(
        "table4-smoke", tmp_path, *pretrained, "--models", "no_defense:defense=none", "defend:seed=1"
    )
    assert record["data"]["levels"] == [64, 32, 16, 8]
    assert (tmp_path / "weights").is_dir()
    assert set(record["models"]) == {"no_defense", "defend"}


def test_a_model_that_diverges_is_told_and_the_rest_goes_on(ray_cluster: str, tmp_path: Path) -> None:
    models = ("--models", "no_defense:defense=none", "control:defense=none,seed=1", "wild:seed=1,lr=1e30")
    record, _ = run_recipe("eq3-smoke", tmp_path, *models)
    assert list(record["diverged"]) == ["wild"]
    assert {e["model"] for e in record["evaluations"]} == {"no_defense", "control"}
    (report,) = tmp_path.glob("runs/eq3-smoke-*/report/report.html")
    assert "training diverged" in report.read_text()
