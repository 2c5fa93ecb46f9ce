"""`main.py export`: the file has the logits of the network, or there is none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from components.config import DataConfig, Experiment, Shapes, TrainConfig, level_sizes
from components.network import build_net
from pipeline.main import main
from pipeline.records import ModelEntry, RunRecord
from pipeline.runtime.storage import Storage
from pipeline.training import exports

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
OURS = TrainConfig(width=4, defense="none", normalize_mean=(0.4,), normalize_std=(0.3,))
PLAIN = f"{__name__}:make_plain"


class Drawing(nn.Module):
    """A network that adds a random number to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) + torch.rand(1)


class Branching(Drawing):
    """A network whose operations depend on the values of its images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) * (2 if images.sum() > 1 else 1)


class Undefined(Drawing):
    """A network whose logits are not numbers where images are dark."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) + (images.mean() - 0.9).log()


def make_plain(**sizes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))


def make_drawing(**sizes: int) -> nn.Module:
    return Drawing()


def make_branching(**sizes: int) -> nn.Module:
    return Branching()


def make_undefined(**sizes: int) -> nn.Module:
    return Undefined()


def stored(root: Path, name: str, config: TrainConfig) -> Path:
    """Write a model directory as training does, with random weights and statistics of batch norm."""
    net = build_net(config, SHAPES)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.dtype.is_floating_point:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    directory = Storage(str(root / "models" / name))
    exports.export(directory, net, config, SHAPES)
    part = "reformer" if config.defense == "comdefend" else "classifier"
    file = f"{part}.safetensors"
    digest = hashlib.sha256(directory.read_bytes(file)).hexdigest()
    directory.write_json("model.json", {"files": {file: digest}, "shapes": vars(SHAPES), "pyramids": {}})
    return root / "models" / name


def logits_of(file: Path, images: Tensor) -> Tensor:
    """Load a file as a user of the format does, without this project."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images)
    onnxruntime: Any = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_classifier_has_its_logits_in_other_programs(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = stored(tmp_path, "undefended-0", OURS), tmp_path / f"net{suffix}"
    assert main(["export", str(model), "--out", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "largest difference of logits:" in said
    assert "the storage has no real images of it" in said
    network = exports.load_classifier(model)
    for n in (1, 5):
        images = torch.rand(n, 1, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(file, images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_reformer_is_exported_with_its_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("plain:defense=none,seed=0", "control:defense=none,seed=1", "reformed:defense=comdefend")
    experiment = Experiment(name="x", data=DataConfig(), train=TrainConfig(arch=PLAIN, width=4), models=models)
    configs = experiment.model_configs()
    paths = {name: stored(tmp_path, f"{name}-0", configs[name]) for name in ("plain", "reformed")}
    entries = {name: ModelEntry(path=f"models/{name}-0") for name in paths}
    run = tmp_path / "runs" / "x-0"
    Storage(str(run)).write_json("run.json", RunRecord(name="x", experiment=experiment, models=entries).to_json())
    exporting = ["export", str(run / "reformed"), "--out", str(tmp_path / "net.onnx")]
    assert main(exporting) == 1  # A file does not decide which code is imported.
    assert "if you trust that module" in " ".join(capsys.readouterr().err.split())
    assert main([*exporting, "--arch", PLAIN]) == 0
    network = exports.load_reformed(paths["reformed"], paths["plain"], trusted=PLAIN)
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        expected = network(images)
        assert not torch.allclose(expected, exports.load_classifier(paths["plain"], trusted=PLAIN)(images), atol=1e-3)
    torch.testing.assert_close(logits_of(tmp_path / "net.onnx", images), expected, rtol=1e-4, atol=1e-4)
    weights = tmp_path / "net.safetensors"
    assert main(["export", str(run / "reformed"), "--out", str(weights)]) == 0
    assert load_file(weights).keys() == network.state_dict().keys()
    capsys.readouterr()
    assert main(["export", str(paths["reformed"]), "--out", str(tmp_path / "x.pt2")]) == 1
    assert "is a reformer, whose classifier is another model" in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(run / "nobody"), "--out", str(tmp_path / "x.pt2")]) == 1
    assert "has no model 'nobody'; it has plain, reformed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_drawing", "gives other logits (largest difference"),
        ("make_undefined", "gives other logits (largest difference nan"),
        ("make_branching", "cannot be written as torch-export"),
    ],
)
def test_no_file_is_left_of_a_network_that_a_file_cannot_hold(
    tmp_path: Path, function: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = f"{__name__}:{function}"
    model = stored(tmp_path, "undefended-1", TrainConfig(arch=arch, defense="none"))
    out = tmp_path / "out"
    out.mkdir()
    assert main(["export", str(model), "--out", str(out / "net.pt2"), "--arch", arch]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(out.iterdir()) == []


def test_the_file_of_weights_is_the_models_own(tmp_path: Path) -> None:
    model = stored(tmp_path, "undefended-0", OURS)
    assert main(["export", str(model), "--out", str(tmp_path / "net.safetensors")]) == 0
    assert (tmp_path / "net.safetensors").read_bytes() == (model / "classifier.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{here}"], 2, "--out is missing: name the file to write"),
        (["{here}", "--out", "{here}/net.h5"], 2, "--format is ''; it must be one of onnx, torch-export, safetensors"),
        (["{here}/nothing", "--out", "{here}/net.pt2"], 1, "{here}/nothing is no model: give the directory of one"),
        (
            ["{here}/models/undefended-0", "--out", "{here}/net.pt2"],
            1,
            "does not hold the weights that its records name",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_error(
    tmp_path: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (stored(tmp_path, "undefended-0", OURS) / "classifier.safetensors").write_bytes(b"other")
    assert main(["export", *(a.format(here=tmp_path) for a in arguments)]) == status
    assert message.format(here=tmp_path) in " ".join(capsys.readouterr().err.split())
