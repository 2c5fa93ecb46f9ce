"""torchvision's networks equal those that its own builders make for weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from components.config import Shapes, TrainConfig
from components.errors import ConfigError
from components.models import libraries
from components.models.classifiers import build_classifier
from components.network import build_net
from pipeline.cli import external_model
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained
from pipeline.training.jobs import model_address

SHAPES = Shapes(image_size=80, channels=3, num_classes=1000, sizes=(80, 40, 20))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def of(arch: str, path: str) -> TrainConfig:
    return TrainConfig(
        arch=arch, defense="none", pretrained=path, epochs=0, normalize_mean=MEAN, normalize_std=STD
    ).canonical()


def published(name: str) -> dict[str, Tensor]:
    """Return weights as torchvision publishes them: with auxiliary heads and densenet's old names."""
    extra = {"aux_logits": True, "init_weights": False} if name in libraries._TRANSFORMING else {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = torchvision.models.get_model(name, weights=None, **extra)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):  # Initial weights would damp every image to nothing.
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        tensors = net.state_dict()
    if name.startswith("densenet"):  # Old weights have no batch counts of batch norms.
        dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
        return {dotted.sub(r"\1.\2", k): t for k, t in tensors.items() if not k.endswith("num_batches_tracked")}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "mobilenet_v3_small"])
def test_the_network_is_the_one_that_torchvision_builds_for_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = published(name)
    entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: dict(tensors))
    reference = torchvision.models.get_model(name, weights=entry).eval()
    torch.save(tensors, tmp_path / "all.pth")
    torch.save(reference.state_dict(), tmp_path / "loaded.pth")
    x = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        expected = reference((x - mean) / std)
        for where in ("torchvision:IMAGENET1K_V1", str(tmp_path / "all.pth"), str(tmp_path / "loaded.pth")):
            config = of(f"torchvision:{name}", where)
            net = build_net(config, SHAPES, pretrained.read(config)).eval()
            torch.testing.assert_close(net(x), expected)
            assert isinstance(net.train()(x), Tensor)
        net.load_state_dict(build_net(config, SHAPES, pretrained.read(config)).state_dict())
        if name in libraries._TRANSFORMING:
            other = of(f"torchvision:{name},transform_input=false", str(tmp_path / "all.pth"))
            plain = build_net(other, SHAPES, pretrained.read(other)).eval()(x)
            assert float((plain - expected).abs().max()) > 0.1 * float(expected.abs().max()), "else nothing is tested"
        exports.export(Storage(str(tmp_path)), net, config, SHAPES)
        torch.testing.assert_close(exports.load_classifier(tmp_path)(x), expected)


def test_published_weights_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = published("mobilenet_v3_small")
    entry = torchvision.models.get_model_weights("mobilenet_v3_small").IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: dict(tensors))
    config = of("torchvision:mobilenet_v3_small", "torchvision:IMAGENET1K_V1")
    with pytest.raises(ConfigError, match=r"^torchvision:IMAGENET1K_V1 holds a head of 1000 classes"):
        build_net(config, replace(SHAPES, num_classes=10), pretrained.read(config))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_whether_the_network_transforms_its_images_can_be_said(name: str) -> None:
    def transforms_input(arch: str, pretrained: bool) -> object:
        return libraries.build(arch, 10, 3, 80, pretrained=pretrained).transform_input

    assert transforms_input(f"torchvision:{name}", True) is True
    assert transforms_input(f"torchvision:{name},transform_input=false", True) is False
    assert transforms_input(f"torchvision:{name.upper()}", True) is True
    assert libraries.explicit(f"torchvision:{name}", False).endswith("transform_input=false")
    (note,) = libraries.notes(f"torchvision:{name}", "weights.pth", MEAN)
    assert f"torchvision:{name},transform_input=false" in note
    assert libraries.notes(f"torchvision:{name},transform_input=true", "weights.pth", MEAN) == []
    (note,) = libraries.notes(f"torchvision:{name},transform_input=true", "weights.pth", ())
    assert "--train.normalize-mean" in note
    assert libraries.notes(f"torchvision:{name}", "", ()) == []


def test_an_export_says_how_it_was_built(tmp_path: Path) -> None:
    """A network trained from scratch does not transform its input, also when its export is loaded as weights."""
    scratch = replace(TrainConfig(), arch="torchvision:googlenet,transform_input=false", defense="none")
    for config in (scratch, replace(scratch, arch="torchvision:googlenet", pretrained="w.pth")):
        net = build_classifier(
            config.arch, num_classes=10, channels=3, image_size=80, needs_adapter=False, pretrained=True
        )
        exports.export(Storage(str(tmp_path)), net, config, replace(SHAPES, num_classes=10))
        experiment = external_model.parse_external_model(
            ["--model", str(tmp_path / "classifier.safetensors"), "--tracking-uri", "x"]
        )
        spelt = libraries.explicit(config.arch, bool(config.pretrained))
        assert experiment.train.arch == spelt
        assert spelt.endswith("true" if config.pretrained else "false")


@pytest.mark.slow
def test_networks_of_one_image_size_are_built_for_it() -> None:
    net = libraries.build("torchvision:vit_b_32", 10, 3, 64, pretrained=True).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    "arch",
    [
        "torchvision:resnet18,transform_input=true",
        "torchvision:googlenet,transform_input=yes",
        "torchvision:googlenet,aux_logits=true",
        "timm:inception_v3,transform_input=true",
    ],
)
def test_options_that_a_network_does_not_have(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.arch.*transform_input"):
        build_classifier(arch, num_classes=10, channels=3, image_size=80, needs_adapter=False)


def test_only_models_that_were_built_otherwise_before_have_another_address() -> None:
    def address(config: TrainConfig) -> str:
        return model_address(config, SHAPES, {}, 1, "weights/0.safetensors")

    config = of("torchvision:googlenet", "w.pth")
    assert address(config) != address(replace(config, pretrained="", epochs=1))
    spelt = replace(config, arch="torchvision:googlenet,transform_input=false")
    assert len({address(config), address(spelt)}) == 2
    assert libraries.explicit("torchvision:resnet18", True) == "torchvision:resnet18"
    assert libraries.explicit("my:net,work", True) == "my:net,work"


def test_heads_of_other_networks_are_not_taken_for_auxiliary_ones() -> None:
    tensors = {"aux1.fc1.weight": torch.zeros(1), "denselayer1.norm.1.weight": torch.zeros(1)}
    for arch in ("torchvision:resnet18", "my_module:googlenet", "resnet18"):
        assert libraries.tensors_for(arch, tensors) == tensors
