"""What training takes at the least, against counts made by hand, and the refusal of what cannot fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from components.config import DataConfig, Experiment, ScalingConfig, TrainConfig, level_sizes
from components.config.data import Shapes
from components.network import build_net
from pipeline import run_directory
from pipeline.data import pyramids
from pipeline.main import main
from pipeline.recipes.registry import RECIPES
from pipeline.runtime import cluster
from pipeline.runtime.cluster import ResourceError
from pipeline.runtime.storage import Storage
from pipeline.training import gpu_memory, train
from pipeline.training.gpu_memory import refuse_what_does_not_fit, training_bytes
from pipeline.training.jobs import TrainingData

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))


def _parameters(config: TrainConfig) -> int:
    return 4 * sum(p.numel() for p in build_net(config, SHAPES).parameters())


@pytest.mark.parametrize(("changes", "copies"), [({}, 3), ({"momentum": 0.0}, 2), ({"optimizer": "adam"}, 4)])
def test_weights_gradients_and_state_without_images(changes: dict, copies: int) -> None:
    config = TrainConfig(width=4, defense="none", **changes)
    assert training_bytes(config, SHAPES, 0) == copies * _parameters(config)


def test_what_is_kept_grows_with_the_images_alone() -> None:
    config = TrainConfig(width=4, defense="none")
    fixed, ten, hundred = (training_bytes(config, SHAPES, n) for n in (0, 10, 100))
    assert hundred - fixed == pytest.approx(10 * (ten - fixed), rel=0.01)
    # the input of every 3x3 convolution is kept: 1 + 4 blocks at 28x28 of 4 channels are the least there is
    assert ten - fixed > 10 * 4 * 28 * 28 * (1 + 5 * 4)


@pytest.mark.slow
def test_the_auto_encoder_and_precision_count() -> None:
    bare = TrainConfig(width=4, defense="none")
    defended = TrainConfig(width=4)
    assert training_bytes(defended, SHAPES, 64) > 1.3 * training_bytes(bare, SHAPES, 64)
    halved = replace(bare, precision="bfloat16", channels_last=True)
    assert training_bytes(halved, SHAPES, 64) < 0.85 * training_bytes(bare, SHAPES, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "noise"),
    [
        ("adversarial", "none"),
        ("comdefend", "none"),
        *itertools.product(["none", "defend++"], ["none", "latent", "input"]),
    ],
)
def test_every_kind_of_model_can_be_counted(defense: str, noise: str) -> None:
    config = TrainConfig(width=4, defense=defense, noise_location=noise, targets="linear")  # type: ignore[arg-type]
    assert training_bytes(config.canonical(), SHAPES, 8) > training_bytes(config.canonical(), SHAPES, 0) > 0


def test_counting_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(3)
    training_bytes(TrainConfig(width=4, noise_location="latent"), SHAPES, 2)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.slow
def test_what_cannot_fit_is_named_with_what_to_change() -> None:
    experiment = Experiment(
        name="t",
        data=DataConfig(),
        train=TrainConfig(width=4, batch_size=64),
        models=("small:defense=none,seed=0", "big:defense=none,seed=1,width=32"),
        evaluation=replace(Experiment(name="x").evaluation, threat_models=("white_box",)),
        scaling=ScalingConfig(gpu=True),
    )
    big = training_bytes(experiment.model_configs()["big"].canonical(), SHAPES, 64)
    refuse_what_does_not_fit(experiment, SHAPES, big)  # exactly as much is enough
    with pytest.raises(ResourceError, match=r"model big does not fit.*64 images.*--train\.batch-size"):
        refuse_what_does_not_fit(experiment, SHAPES, big - 1)
    # what is trained already, or given, needs no room
    refuse_what_does_not_fit(experiment, SHAPES, big - 1, lambda: {"big"})
    with pytest.raises(ResourceError, match="model big"):
        refuse_what_does_not_fit(experiment, SHAPES, big - 1, lambda: {"small"})
    given = replace(experiment, models=("big:defense=none,width=32,epochs=0,pretrained=x.pth",))
    refuse_what_does_not_fit(given, SHAPES, 1)
    # more workers share the batch
    spread = replace(experiment, scaling=ScalingConfig(gpu=True, workers=4))
    refuse_what_does_not_fit(spread, SHAPES, big - 1)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of GPUs of one kilobyte."""
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_resources", lambda *_: None)
    monkeypatch.setattr(cluster, "check_shared", lambda *_: None)
    monkeypatch.setattr(gpu_memory, "_gpu_bytes", lambda: 1024)


@pytest.mark.slow
def test_a_run_is_refused_before_anything_is_computed(
    gpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--models", "no_defense:defense=none", "--evaluation.threat-models", "white_box"]
    command = ["mnist-smoke", "--scaling.gpu", "--storage", str(tmp_path), *one]
    assert main(["run", *command]) == 1
    assert "model no_defense does not fit the GPU" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pyramids").exists()
    assert not (tmp_path / "runs").exists()
    # these lack what an earlier stage makes
    for stage in ("train", "attack"):
        assert main([stage, *command]) == 1
        assert "has no shards yet" in capsys.readouterr().err


def test_models_that_are_trained_are_not_counted(gpus: None, tmp_path: Path) -> None:
    experiment = replace(RECIPES["mnist-smoke"].make(), scaling=ScalingConfig(gpu=True))
    root = Storage(str(tmp_path))
    trained = partial(run_directory.finished_model_names, experiment, SHAPES, root, "")
    with pytest.raises(ResourceError, match="model no_defense"):
        gpu_memory.check_gpu_memory(experiment, SHAPES, trained)
    address = partial(pyramids.address_of, experiment.data, experiment.pyramids)
    data = TrainingData(
        train={"lowpass": address("train")},
        without_levels=address("train", targets="none"),
        validation=address("validation", targets="none"),
    )
    for job in train.prepare_jobs(experiment, SHAPES, data, root):
        assert job.name not in trained()
        (root / job.address).write_json("model.json", {})
        assert job.name in trained()
    gpu_memory.check_gpu_memory(experiment, SHAPES, trained)
