"""RobustBench's model_info of a run, read by RobustBench itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from components.config import DataConfig, Experiment, TrainConfig
from components.fields import to_dict
from pipeline.interchange.model_info import dataset, model_infos
from pipeline.records import EvaluationEntry, ModelEntry, Reliability, RunRecord

CIFAR = DataConfig(source="torchvision:cifar10", channels=3, image_size=32)
ZOO_NAME = "Carmon2019Unlabeled"


def evaluation(model: str, attack: str, accuracy: float, threat: str = "white_box", n: int = 1000) -> EvaluationEntry:
    metrics = {"accuracy": accuracy, "accuracy_low": accuracy - 0.03, "accuracy_high": accuracy + 0.03}
    return EvaluationEntry(model=model, threat_model=threat, attack=attack, n=n, metrics=metrics)


def record(*evaluations: EvaluationEntry, data: DataConfig = CIFAR, **train: Any) -> RunRecord:
    models = (f"{ZOO_NAME}:defense=none,seed=0", "control:defense=none,seed=1", "defend")
    experiment = Experiment(name="x", data=data, train=TrainConfig(**train), models=models)
    flags = [{"name": "noisy", "fired": True}, {"name": "other", "fired": False}, {"name": "undecided", "fired": None}]
    return RunRecord(
        name="x",
        experiment=experiment,
        git={"revision": "0123abc", "dirty": False},
        evaluations=evaluations,
        reliability={"defend": Reliability(flags=flags)},
        models={name: ModelEntry(path="m", train=to_dict(c)) for name, c in experiment.model_configs().items()},
    )


def test_only_the_standard_autoattack_counts() -> None:
    infos = model_infos(
        record(
            evaluation("defend", "none", 0.8534, "clean"),
            evaluation("defend", "autoattack:eps=8/255,steps=100", 0.5342),
            evaluation("defend", "autoattack:eps=0.5,steps=100,norm=l2", 0.61, n=500),
            evaluation("control", "autoattack:eps=8/255,steps=10", 0.1),
            evaluation("control", "autoattack:eps=8/255,queries=10", 0.1),
            evaluation("control", "autoattack:eps=4/255", 0.1),
            evaluation("control", "pgd:eps=8/255", 0.1),
        )
    )
    assert infos.keys() == {"cifar10/Linf/defend.json", "cifar10/L2/defend.json"}
    linf = infos["cifar10/Linf/defend.json"]
    assert linf == {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": None,
        "architecture": "resnet18",
        "eps": "8/255",
        "clean_acc": "85.34",
        "reported": None,
        "autoattack_acc": "53.42",
        "footnote": "1000 test images; 95 % interval of autoattack_acc: 50.42 to 56.42. AutoAttack of defendpp at revision "
        "0123abc, not run by RobustBench. Reliability flags raised: noisy. null: not known.",
    }
    l2 = infos["cifar10/L2/defend.json"]
    assert (l2["eps"], l2["autoattack_acc"]) == ("0.5", "61.00")
    assert l2["clean_acc"] is None  # It was measured on other images.


def test_what_is_not_known_of_an_external_model_is_null() -> None:
    external = record(evaluation("defend", "autoattack:eps=8/255", 0.5), arch="resnet50", width=8, pretrained="net.pth")
    (info,) = model_infos(external).values()
    assert (info["additional_data"], info["number_forward_passes"]) == (None, 1)
    assert info["architecture"] == "resnet50 (width 8)"


def test_the_budget_of_grey_images_is_that_of_mnist() -> None:
    grey = record(evaluation("defend", "autoattack:eps=0.3", 0.5), data=DataConfig())
    assert {name: info["eps"] for name, info in model_infos(grey).items()} == {"mnist/Linf/defend.json": "0.3"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision:cifar10", "cifar10"),
        ("sample:mnist", "mnist"),
        ("hf:uoft-cs/cifar100@main/fine", "cifar100"),
        ("parquet:/data/CIFAR-10/", "cifar10"),
        ("folder:s3://bucket/imagenet", "imagenet"),
        ("memory:0123456789abcdef", "unknown"),
    ],
)
def test_the_name_of_the_data_set(source: str, name: str) -> None:
    assert dataset(source) == name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("robustbench") is None, reason="the extra `robustbench` is not installed")
def test_robustbench_lists_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from components.models import zoo

    zoo.find(f"robustbench:{ZOO_NAME}", "--model")  # It imports the package.
    utils = sys.modules["robustbench.utils"]
    run = record(evaluation(ZOO_NAME, "none", 0.8969, "clean"), evaluation(ZOO_NAME, "autoattack:eps=8/255", 0.5953))
    ((name, info),) = model_infos(run).items()
    assert set(info) - {"footnote"} <= {field.name for field in dataclasses.fields(utils.ModelInfo)}
    (tmp_path / "model_info" / name).parent.mkdir(parents=True)
    (tmp_path / "model_info" / name).write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    utils.list_available_models("cifar10", "Linf")
    assert f"**{ZOO_NAME}**" in (line := capsys.readouterr().out.splitlines()[-1])
    assert "89.69%" in line
    assert "59.53%" in line
