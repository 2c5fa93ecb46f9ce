"""Addresses of trained networks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from components.config import Shapes, TrainConfig, level_sizes
from components.errors import ConfigError
from pipeline.runtime.storage import Storage
from pipeline.training import exports
from pipeline.training.jobs import model_address

DATA = {"train": "pyramids/0123"}


def address(arch: str, **settings: Any) -> str:
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(**{"arch": arch, "width": 4, "epochs": 2, **settings}).canonical()
    return model_address(config, shapes, DATA, 1, "")


def test_addresses_of_our_networks_stay_as_they_are() -> None:
    """Storage finds earlier models again."""
    assert address("resnet18") == "models/defended-58f8f309fa956334"
    assert address("resnet18", defense="adversarial") == "models/adversarial-b1e0308f783d9bbb"
    # PGD's examples are searched for on a folded copy now, whose rounding differs.
    assert address("resnet18", defense="adversarial", adversarial_attack="pgd") == "models/adversarial-f2ec5385d507d22e"
    # DDN's examples against a confident network have changed since.
    assert address("resnet18", defense="adversarial", adversarial_attack="ddn") != "models/adversarial-0e0721afd20a6f3a"
    settings = {"defense": "none", "epochs": 0, "pretrained": "x.pth"}
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch="torchvision:resnet18", **settings).canonical()
    assert model_address(config, shapes, {}, 1, "weights/0.safetensors") == "models/undefended-d572f4398ccde87f"


def test_an_edited_network_of_ones_own_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited.py"
    file.write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = address("edited:make", defense="none")
    assert address("edited:make", defense="none") == first
    assert "edited" not in sys.modules, "not imported for that"
    file.write_text("ONE = 2\n")
    assert address("edited:make", defense="none") != first
    # A reformer can precede any network.
    assert address("edited:make", defense="comdefend") == address("resnet18", defense="comdefend")
    for arch in ("nosuchmodule:make", "nosuchpackage.module:make", "sys:make"):
        with pytest.raises(ConfigError, match=r"train\.arch is .*a function of a module that is a file"):
            address(arch)


def test_an_edited_network_with_the_same_weights_is_attacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses of examples and verdicts contain the checksum of the exported file."""
    file = tmp_path / "forward_edited.py"
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch="forward_edited:make", defense="none")
    monkeypatch.syspath_prepend(tmp_path)
    exported = []
    for text in ("a = 1\n", "a = 2\n", "a = 2\n"):
        file.write_text(text)
        exports.export(Storage(str(tmp_path / "model")), nn.Flatten(), config, shapes)
        exported.append((tmp_path / "model" / "classifier.safetensors").read_bytes())
    assert exported[0] != exported[1] == exported[2]
    assert exports.described(exported[0]) == (config, shapes)
