"""Names of runs and metrics in MLflow, which say what differs and begin with what matters most."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_run
import pytest

from components.config import Experiment
from pipeline.recipes.registry import RECIPES
from pipeline.records import Record
from pipeline.reporting import records
from pipeline.reporting.tracked import metrics
from pipeline.reporting.tracked.names import LONGEST_NAME, run_name
from pipeline.reporting.tracked.note import note
from pipeline.runtime.storage import Storage

DEMO = RECIPES["mnist-demo"].make()


def name_of(experiment: Experiment) -> str:
    return run_name(Record(name=experiment.name, experiment=experiment))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "mnist-demo"),
        ({"storage": "/data", "tracking_uri": "http://host:5000", "register": True}, "mnist-demo"),
        ({"train": replace(DEMO.train, lam=0.1)}, "mnist-demo train.lam=0.1"),
        ({"train": replace(DEMO.train, lam=0.1234567), "seeds": 2}, "mnist-demo train.lam=0.1235 seeds=2"),
        ({"data": replace(DEMO.data, subset_seed=12345)}, "mnist-demo data.subset_seed=12345"),
        ({"data": replace(DEMO.data, train_limit=50_000)}, "mnist-demo data.train_limit=50000"),
        ({"scaling": replace(DEMO.scaling, cpus_per_attack=2.0)}, "mnist-demo"),
        ({"scaling": replace(DEMO.scaling, workers=1)}, "mnist-demo scaling.workers=1"),
        (
            {"name": "mnist-demo-best", "models": (*DEMO.models[:2], "best:seed=1,lam=0.0123456,shared_blocks=2")},
            "mnist-demo-best lam=0.01235 shared_blocks=2",
        ),
        ({"name": "attack-net"}, "attack-net"),
    ],
)
def test_a_run_is_named_after_what_differs_from_its_recipe(changes: dict[str, Any], name: str) -> None:
    assert name_of(replace(DEMO, **changes)) == name


def test_a_long_name_is_cut_visibly() -> None:
    train = replace(DEMO.train, lam=0.1, width=8, epochs=7, lr=0.05, batch_size=16, shared_blocks=3, weight_decay=0.1)
    name = name_of(replace(DEMO, train=train, models=tuple(f"model_{i}:defense=none,seed={i}" for i in range(9))))
    assert len(name) <= LONGEST_NAME
    assert name.endswith("…")


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (0.2, "0.2"),
        (4 / 255, "4_255"),
        (0.01569, "4_255"),
        (0.03, "0.03"),
        (1.5, "1.5"),
        (0.0157, "0.0157"),
        (1.275, "1.275"),
    ],
)
def test_a_budget_reads_as_it_was_typed(eps: float, text: str) -> None:
    assert metrics.budget_name(eps) == text


@pytest.mark.slow
def test_the_alphabet_is_the_order_of_importance(tmp_path: Path) -> None:
    record = records.read_run(fake_run.write(Storage(tmp_path)))
    names = [*metrics.test_metrics(record, "defend"), *metrics.training_metrics(record.models["defend"].to_json())]
    groups = list(
        dict.fromkeys(name.partition("/")[0] for name in sorted([*names, "train/loss", "validation/accuracy"]))
    )
    assert groups == ["accuracy", "accuracy_at", "norm", "size", "time", "train", "validation"]
    assert sorted(names)[0] == names[0] == "accuracy/clean"
    assert metrics.headline(record) == {"accuracy/clean": metrics.test_metrics(record, "defend")["accuracy/clean"]}


@pytest.mark.slow
def test_the_description_begins_with_verdict_and_links(tmp_path: Path) -> None:
    run = fake_run.write(Storage(tmp_path))
    record = run.read_json("run.json")
    worst = {"threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": 300, "attacks": 2}
    interval = {"accuracy": 0.01, "accuracy_low": 0.0, "accuracy_high": 0.03}
    run.write_json("run.json", {**record, "worst_case": [{"model": m, **worst, **interval} for m in fake_run.MODELS]})
    verdict, links, table, *_ = note(records.read_run(run)).split("\n\n")
    assert verdict == (
        "**defend (Defend++) is not more robust than its control here.** "
        "defend (defended): 97.7 % clean; worst case 1.0 % at Linf ≤ 0.2. "
        "control: 98.0 % clean; worst case 1.0 % at Linf ≤ 0.2."
    )
    assert links == "[Report](artifact:report/report.html) · [all numbers](artifact:report/table.csv)"
    assert len(table.splitlines()) == 2 + len(fake_run.MODELS)
    assert "| defend (defended) |" in table
