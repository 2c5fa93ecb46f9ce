"""Models of the Hugging Face Hub and of RobustBench's model zoo, as `attack --model` takes them.

The Hub's library reads a cache without a connection, RobustBench's own loader a directory of weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from own_network import Net
from repository import ROOT
from safetensors.torch import save_file

from components.config import Shapes, TrainConfig, level_sizes
from components.errors import ConfigError
from components.network import build_net
from pipeline.cli.external_model import default_name
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.run_directory import shapes_of
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained, train

COMMIT = "0123456789abcdef0123456789abcdef01234567"
of_robustbench = pytest.mark.skipif(find_spec("robustbench") is None, reason="the extra `robustbench` is not installed")
ASK = """
import json, sys
from components.errors import UserError
from components.fields import to_dict
from components.network import build_net
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.run_directory import shapes_of
from pipeline.training import external, pretrained
import torch
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        e = parse_experiment("attack", arguments)
        (name, config), = e.model_configs().items()
        weights = pretrained.read(config)
        net = build_net(config, shapes_of(e), weights).eval()
        images = torch.full((2, e.data.channels, e.data.image_size, e.data.image_size), 0.25)
        beside, reason = external.autoencoder_beside(config.pretrained, "")
        answers.append([name, config.arch, weights.where, net(images).tolist(), bool(beside) or reason])
    except UserError as e:
        answers.append(f"{type(e).__name__}: {e}")
print(json.dumps(answers))
"""


def cached(home: Path, repo: str, **files: bytes) -> None:
    """Write files into a cache of the Hub, as the library itself lays it out."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        file = snapshot / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)


def saved(tmp_path: Path, state: dict[str, torch.Tensor]) -> bytes:
    save_file(state, tmp_path / "x.safetensors")
    return (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.slow
def test_weights_of_the_hub_are_those_of_its_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    torch.manual_seed(0)
    stranger = Net(1, 10).eval()
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(width=4, normalize_mean=(0.5,), normalize_std=(0.2,))
    ours = build_net(config, shapes)
    exports.export(Storage(str(tmp_path / "ours")), ours, config, shapes)
    several = tmp_path / "several.pth"
    torch.save({"first": Net(1, 10).state_dict(), "second": stranger.state_dict()}, several)
    home = tmp_path / "home"
    parts = {
        f"{part}_dot_safetensors": (tmp_path / "ours" / f"{part}.safetensors").read_bytes()
        for part in exports.parts_of(ours)
    }
    cached(home, "someone/plain", model_dot_safetensors=saved(tmp_path, stranger.state_dict()))
    cached(home, "someone/ours", **parts)
    cached(home, "someone/several", nets__all_dot_pth=several.read_bytes())
    # A repository of timm names its network and its normalisation.
    timm = pytest.importorskip("timm", reason="timm is not installed")
    librarys = timm.create_model("lcnet_050", num_classes=7).eval()
    values = {"input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "num_classes": 7}
    described = json.dumps({"architecture": "lcnet_050", "num_classes": 7, "pretrained_cfg": values}).encode()
    cached(
        home, "timm/net.in1k", model_dot_safetensors=saved(tmp_path, librarys.state_dict()), config_dot_json=described
    )
    partial = json.dumps({"architecture": "lcnet_050", "pretrained_cfg": {**values, "num_classes": None}}).encode()
    cached(
        home, "someone/partial", model_dot_safetensors=saved(tmp_path, stranger.state_dict()), config_dot_json=partial
    )
    own = ["--arch", "own_network:make"]
    commands = [
        ["--model", "hf:someone/plain", *own],
        ["--model", f"hf:someone/plain@{COMMIT}/model.safetensors", *own],
        ["--model", "hf:someone/several/nets/all.pth#second", *own],
        ["--model", "hf:someone/ours/classifier.safetensors"],
        ["--model", "hf:someone/ours/other.safetensors", *own],
        ["--model", "hf:someone/absent", *own],
        ["--model", "hf:someone", *own],
        ["--model", "hf:timm/net.in1k"],
        ["--model", "hf:someone/partial"],
    ]
    usual = asked(commands, home)
    images = torch.full((2, 1, 28, 28), 0.25)
    whole = f"hf:someone/plain@{COMMIT}/model.safetensors"
    for answer, name in zip(usual[:3], ("plain", "model", "all"), strict=True):
        assert answer[:2] == [name if name != "model" else "plain", "own_network:make"]
        torch.testing.assert_close(torch.tensor(answer[3]), stranger(images))
        assert "is not in the cache" in answer[4]
    assert usual[0][2] == usual[1][2] == whole
    assert usual[2][2].startswith(f"hf:someone/several@{COMMIT}/nets/all.pth (the weights under 'second'")
    assert usual[3][:2] == ["ours", "resnet18"]
    assert usual[3][4] is True  # The auto-encoder beside it, which the adaptive attack needs.
    torch.testing.assert_close(torch.tensor(usual[3][3]), ours.classifier.eval()(images))
    assert f"hf:someone/ours/other.safetensors is not in the cache {home}/hub, and HF_HUB_OFFLINE is set" in usual[4]
    assert usual[5].endswith("hf download someone/absent")
    assert "ConfigError: --model is 'hf:someone'; it must be hf:ORG/NAME" in usual[6]
    assert usual[7][:3] == ["net-in1k", "timm:lcnet_050", f"hf:timm/net.in1k@{COMMIT}/model.safetensors"]
    assert "ConfigError: --arch is missing" in usual[8]
    mean, std = (torch.tensor(values[key]).view(3, 1, 1) for key in ("mean", "std"))
    normalized = (torch.full((2, 3, 64, 64), 0.25) - mean) / std
    torch.testing.assert_close(torch.tensor(usual[7][3]), librarys(normalized), rtol=1e-4, atol=1e-5)


def asked(commands: list[list[str]], home: Path) -> list[Any]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "support")
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(commands)], cwd=ROOT, env=environment, stdout=-1, text=True, check=True
    )
    answers: list[Any] = json.loads(done.stdout)
    return answers


@pytest.mark.slow
@of_robustbench
def test_a_model_of_robustbench_has_the_logits_of_its_own_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write random weights in RobustBench's directory, without the normalisation that its files lack."""
    from components.models import zoo

    name = "cifar10/Linf/Wong2020Fast"
    torch.manual_seed(0)
    state = zoo.build(f"robustbench:{name}").state_dict()
    (tmp_path / "models" / name).parent.mkdir(parents=True)
    torch.save({k: v for k, v in state.items() if k not in ("mu", "sigma")}, tmp_path / "models" / f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    experiment = parse_experiment("attack", ["--model", f"robustbench:{name}"])
    ((model, config),) = experiment.model_configs().items()
    assert (model, config.arch, config.pretrained) == ("Wong2020Fast", f"robustbench:{name}", f"robustbench:{name}")
    data = experiment.data
    assert (data.source, data.image_size, data.channels, data.num_classes) == ("torchvision:cifar10", 32, 3, 10)
    assert any(text.startswith("autoattack:eps=0.0313725") for text in experiment.evaluation.attacks)
    shapes = shapes_of(experiment)
    assert train.check_models(experiment, shapes) == []
    weights = pretrained.read(config)
    exports.export(Storage(str(tmp_path / "out")), build_net(config, shapes, weights), config, shapes)
    ours = exports.load_classifier(tmp_path / "out")
    theirs = sys.modules["robustbench.utils"].load_model("Wong2020Fast", dataset="cifar10", threat_model="Linf")
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        # The normalisation is in the network: without it the logits are others.
        assert not torch.allclose(ours(images), ours(images * theirs.sigma + theirs.mu), atol=1e-3)
    with pytest.raises(ConfigError, match=r"it must be empty with robustbench:.*, which normalises its images itself"):
        build_net(TrainConfig(**{**vars(config), "normalize_mean": (0.5,) * 3, "normalize_std": (0.2,) * 3}), shapes)


@of_robustbench
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("robustbench:Standard", "it must be one of the models of this name: robustbench:cifar10/Linf/Standard, "),
        (
            "robustbench:cifar10/Linf/Wong2020Fats",
            r"unknown --model robustbench: .*did you mean cifar10/Linf/Wong2020Fast",
        ),
        (
            "robustbench:Nope",
            r"^unknown --model robustbench: 'Nope'; https://robustbench.github.io lists what there is$",
        ),
        ("robustbench:Salman2020Do_R18", "--data is missing: name the test images of imagenet"),
    ],
)
def test_a_model_that_robustbench_does_not_have(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_experiment("attack", ["--model", arguments])


@of_robustbench
def test_a_network_that_robustbench_cannot_build_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its builders download weights of ImageNet, which fails without a connection."""
    from components.models import zoo

    def download() -> None:
        raise OSError("no route to host")

    models = zoo._utils().all_models[zoo._key("BenchmarkDataset", "cifar10")][zoo._key("ThreatModel", "Linf")]
    monkeypatch.setitem(models["Wong2020Fast"], "model", download)
    arch = "robustbench:cifar10/Linf/Wong2020Fast"
    with pytest.raises(ConfigError, match=rf"{arch}: RobustBench cannot build it \(OSError: no route to host\)"):
        build_net(
            TrainConfig(arch=arch, defense="none"), Shapes(image_size=32, channels=3, num_classes=10, sizes=(32,))
        )


@of_robustbench
def test_the_threat_model_sets_norm_and_budget() -> None:
    experiment = parse_experiment("attack", ["--model", "robustbench:Rony2019Decoupling"])
    assert any(text.startswith("autoattack:eps=0.5,") and "norm=l2" in text for text in experiment.evaluation.attacks)


def test_names_of_models_on_the_hub() -> None:
    assert default_name("hf:timm/resnet18.a1_in1k") == "resnet18-a1_in1k"
    assert default_name("hf:org/net@v1/nets/second.pth") == "second"
    assert default_name("hf:org/net/classifier.safetensors") == "net"
