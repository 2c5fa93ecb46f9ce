"""Continuing bit for bit, refusing what does not fit by name, and exported networks that load alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from made_up_shards import SHAPES, Shards
from safetensors.torch import load_file, save_file

from components.config import TrainConfig
from components.config.data import Shapes
from components.errors import DataError
from components.models.defend import DefendNet
from components.models.resnet import ResNet18
from components.network import build_net
from components.training.step import make_optimizer
from pipeline.evaluation import attack_tasks
from pipeline.runtime.storage import Storage, StorageError
from pipeline.training.checkpoints import StoredCheckpoint, load_checkpoint, newest_whole, save_checkpoint
from pipeline.training.exports import export, load_autoencoder, load_classifier
from pipeline.training.loop import RankData, TrainingLoop

CHECKPOINT = "epoch-00003.pt"


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"width": 4, "batch_size": 8, "lr": 0.05, "epochs": 3, "shared_blocks": 2, **changes})


def make_loop(config: TrainConfig) -> TrainingLoop:
    cpu = torch.device("cpu")
    data, validation = (RankData(Shards(n), 0, 1, cpu, levels=True) for n in (20, 6))
    return TrainingLoop(config, SHAPES, data, validation)


# --- continuing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"defense": "none"},
        {"schedule": "alternating", "cycles": 1, "autoencoder_epochs": 1, "classifier_epochs": 1},
        {"noise_location": "latent", "clip_norm": 1.0},
        {"noise_location": "input", "shared_blocks": 4, "precision": "bfloat16"},
        {"adversarial_training": True, "adversarial_attack": "n-fgsm", "adversarial_loss": "trades", "ema_decay": 0.9},
    ],
    ids=["joint", "undefended", "alternating", "latent noise", "input noise, bfloat16", "on examples, averaged"],
)
def test_a_continued_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    straight = make_loop(config)
    records = [straight.run_epoch() for _ in range(3)]

    first = make_loop(config)
    first.run_epoch()
    first.save(Storage(tmp_path))
    torch.manual_seed(77)  # another process has another global stream
    second = make_loop(config)
    second.resume(Storage(tmp_path))
    assert second.epoch == 1
    continued = [second.run_epoch() for _ in range(2)]

    for a, b in ((straight.net, second.net), (straight.trained_net, second.trained_net)):
        wanted, got = a.state_dict(), b.state_dict()
        assert list(wanted) == list(got)
        for name, value in wanted.items():
            assert torch.equal(got[name], value), name
    moved = 0
    for (name, x), y in zip(straight.net.named_parameters(), second.net.parameters(), strict=True):
        assert torch.equal(straight.optimizer.state[x]["momentum_buffer"], second.optimizer.state[y]["momentum_buffer"])
        moved += int(not torch.equal(x, first.net.get_parameter(name)))
    assert moved == len(list(straight.net.parameters()))  # there was something to continue
    for old, new in zip(records[1:], continued, strict=True):
        assert (old["epoch"], old["phase"], old["validation"]) == (new["epoch"], new["phase"], new["validation"])
        assert [(s["step"], s["lr"], s["loss"]) for s in old["steps"]] == [
            (s["step"], s["lr"], s["loss"]) for s in new["steps"]
        ]


def test_noise_and_seed_count() -> None:
    """The comparison above could not tell anything if runs were equal whatever their config."""
    weights = []
    for config in (tiny(), tiny(noise_location="latent"), tiny(seed=1)):
        loop = make_loop(config)
        loop.run_epoch()
        weights.append(loop.net.get_parameter("classifier.fc.weight"))
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shared_weights_are_still_shared_after_loading(tmp_path: Path) -> None:
    loop = make_loop(tiny())
    loop.save(Storage(tmp_path))
    loop.resume(Storage(tmp_path))
    net = loop.net
    assert isinstance(net, DefendNet)
    assert net.autoencoder.encoder[1][0].conv1.weight is net.classifier.layer2[0].conv1.weight


def test_the_newest_two_checkpoints_are_kept_and_no_other_file(tmp_path: Path) -> None:
    loop = make_loop(tiny())
    for loop.epoch in (3, 9, 10, 11):
        loop.save(Storage(tmp_path))
        loop.save(Storage(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["epoch-00010.pt", "epoch-00011.pt"]


# --- refusing


def saved(directory: Path, config: TrainConfig | None = None, shapes: Shapes = SHAPES) -> Path:
    config = config or tiny()
    net = build_net(config, shapes)
    optimizer = make_optimizer(net, config)
    return directory / save_checkpoint(
        Storage(directory), net=net, optimizer=optimizer, epoch=3, config=config, shapes=shapes
    )


def load(directory: Path, config: TrainConfig | None = None, shapes: Shapes = SHAPES) -> int:
    config = config or tiny()
    net = build_net(config, shapes)
    optimizer = make_optimizer(net, config)
    found = newest_whole(Storage(directory))
    assert found.path == f"{directory}/{CHECKPOINT}"
    return load_checkpoint(found, net=net, optimizer=optimizer, config=config, shapes=shapes)


def test_epochs_done(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load(tmp_path) == 3


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole(Storage(tmp_path)) == StoredCheckpoint("", b"", ())


def spoil(path: Path, part: float) -> None:
    """Cut a file off behind a part of it; or, where all of it stays, turn one bit in its middle."""
    data = bytearray(path.read_bytes())
    if part == 1.0:
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: int(part * len(data))])


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99, 1.0])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, part: float) -> None:
    config = tiny(epochs=3)
    straight = make_loop(config)
    for _ in range(2):
        straight.run_epoch()
        straight.save(Storage(tmp_path))
    straight.run_epoch()
    newest = tmp_path / "epoch-00002.pt"
    spoil(newest, part)
    again = make_loop(config)
    again.resume(Storage(tmp_path))
    assert again.epoch == 1
    record = again.run_epoch()
    assert record["resumed"] == {"from": f"{tmp_path}/epoch-00001.pt", "damaged": [str(newest)]}
    assert "resumed" not in again.run_epoch()
    for a, b in zip(straight.net.state_dict().values(), again.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_any_wrong_bit_of_the_archives_directory_is_damage(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = path.read_bytes()
    directory = data.rindex(b"PK\x01\x02") - 200
    damaged = 0
    for i in range(directory, len(data), 3):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        damaged += bool(newest_whole(Storage(tmp_path)).damaged)  # it raises nothing
    assert damaged > 10


def test_a_checkpoint_outlives_the_damaged_ones_that_were_newer(tmp_path: Path) -> None:
    loop = make_loop(tiny(epochs=9))
    for loop.epoch in (6, 7):
        loop.save(Storage(tmp_path))
        spoil(tmp_path / f"epoch-0000{loop.epoch}.pt", 0.5)
    again = make_loop(tiny(epochs=9))
    again.resume(Storage(tmp_path))
    for _ in range(3):
        again.run_epoch()
        again.save(Storage(tmp_path))
        assert newest_whole(Storage(tmp_path)).path == f"{tmp_path}/epoch-0000{again.epoch}.pt"
    assert sorted(os.listdir(tmp_path)) == ["epoch-00002.pt", "epoch-00003.pt"]


def test_training_starts_anew_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    spoil(saved(tmp_path), 0.5)
    loop = make_loop(tiny())
    loop.resume(Storage(tmp_path))
    assert (loop.epoch, loop.resumed["from"]) == (0, "")


@pytest.mark.parametrize(
    ("state", "said"),
    [({"schema": 999}, "schema 999, this version reads 1"), ({}, "schema None"), ([1, 2], "schema None")],
)
def test_another_schema(tmp_path: Path, state: Any, said: str) -> None:
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(DataError, match=rf"{tmp_path}/{CHECKPOINT} has {said}"):
        load(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(DataError, match=rf"{path} is of another model: width is 4 there, 8 here$"):
        load(tmp_path, tiny(width=8))
    with pytest.raises(DataError, match=r"shared_blocks is 2 there, 3 here; seed is 0 there, 1 here"):
        load(tmp_path, tiny(shared_blocks=3, seed=1))
    with pytest.raises(DataError, match=r"num_classes is 10 there, 5 here"):
        load(tmp_path, shapes=dataclasses.replace(SHAPES, num_classes=5))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"schema": 1, "net": Harmful()}, tmp_path / CHECKPOINT)
    with pytest.raises(DataError, match="is corrupt"):
        load(tmp_path)
    assert not (tmp_path / "harm").exists()


# --- exported networks


def unsettled(config: TrainConfig, shapes: Shapes = SHAPES) -> ResNet18 | DefendNet:
    """A network none of whose values is an initial one."""
    net = build_net(config, shapes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for name, b in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(torch.rand(b.shape, generator=generator))
    return net


IMAGES = torch.rand(3, 1, 14, 14, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("uri", [False, True])
@pytest.mark.parametrize("defense", ["none", "defend++"])
def test_classifier_round_trip(tmp_path: Path, uri: bool, defense: str) -> None:
    config = tiny(defense=defense, normalize_mean=(0.3,), normalize_std=(0.5,), channels_last=True)
    net = unsettled(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    where = f"{tmp_path.as_uri() if uri else tmp_path}/model"
    export(Storage(where), net, config, SHAPES)
    names = ["classifier.safetensors"] if defense == "none" else ["autoencoder.safetensors", "classifier.safetensors"]
    assert sorted(os.listdir(tmp_path / "model")) == names
    classifier = net.classifier if isinstance(net, DefendNet) else net
    wanted = classifier.eval()(IMAGES)
    for path in (where, f"{where}/", f"{where}/classifier.safetensors"):
        loaded = load_classifier(path)
        assert type(loaded) is ResNet18
        assert not any(m.training for m in loaded.modules())
        torch.testing.assert_close(loaded(IMAGES), wanted, rtol=1e-5, atol=1e-5)  # another memory format
        for name, value in classifier.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_the_file_is_torchvisions_and_holds_nothing_of_the_decoder(tmp_path: Path) -> None:
    config = tiny()
    export(Storage(tmp_path), unsettled(config), config, SHAPES)
    tensors = load_file(tmp_path / "classifier.safetensors")
    assert sorted(tensors) == sorted(torchvision.models.resnet18().state_dict())
    assert not any("decoder" in name or "encoder" in name for name in tensors)


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
def test_autoencoder_round_trip(tmp_path: Path, shared: int) -> None:
    config = tiny(shared_blocks=shared)
    net = unsettled(config)
    assert isinstance(net, DefendNet)
    export(Storage(tmp_path), net, config, SHAPES)
    loaded = load_autoencoder(tmp_path)
    assert not any(m.training for m in loaded.modules())
    for a, b in zip(loaded(IMAGES), net.eval().autoencoder(IMAGES), strict=True):
        assert torch.equal(a, b)


def exported(directory: Path) -> Path:
    config = tiny()
    export(Storage(directory), build_net(config, SHAPES), config, SHAPES)
    return directory / "classifier.safetensors"


def rewritten(path: Path, **changes: Any) -> None:
    """The same tensors with other metadata."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = json.loads(header["__metadata__"]["defendpp"])
    for key, value in changes.items():
        said[key] = {**said[key], **value} if isinstance(value, dict) else value
    save_file(load_file(path), path, {"defendpp": json.dumps(said)})


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = exported(tmp_path)
    rewritten(path, config={"width": 8})
    with pytest.raises(DataError, match=rf"{path} holds the weights of another architecture: [\s\S]*conv1\.weight"):
        load_classifier(path)


def test_another_schema_of_an_export(tmp_path: Path) -> None:
    path = exported(tmp_path)
    rewritten(path, schema=999)
    with pytest.raises(DataError, match=rf"{path} has schema 999, this version reads 1"):
        load_classifier(path)


def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=rf"{path} was not exported by this project"):
        load_classifier(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_export(tmp_path: Path, part: float) -> None:
    path = exported(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(DataError, match=rf"{path} is not a whole safetensors file"):
        load_classifier(path)


def test_a_model_without_an_autoencoder_says_so(tmp_path: Path) -> None:
    config = tiny(defense="none")
    export(Storage(tmp_path), build_net(config, SHAPES), config, SHAPES)
    with pytest.raises(StorageError, match=rf"{tmp_path}/autoencoder\.safetensors does not exist"):
        load_autoencoder(tmp_path)
    with pytest.raises(StorageError, match=r"nowhere/classifier\.safetensors does not exist"):
        load_classifier(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no auto-encoder"):
        load_autoencoder(tmp_path / "classifier.safetensors")


@pytest.mark.slow
def test_an_export_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Its checksum names what is computed from it. (A hash map's order in the file once made it change.)"""
    code = (
        "import sys; from components.config import TrainConfig; from pipeline.training.exports import export;"
        "from pipeline.runtime.storage import Storage; from components.config import Shapes; from components.network import build_net;"
        "config, shapes = TrainConfig(width=2), Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7));"
        "export(Storage(sys.argv[1]), build_net(config, shapes), config, shapes)"
    )
    for i in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(i))], check=True)
    assert len({(tmp_path / str(i) / "classifier.safetensors").read_bytes() for i in range(2)}) == 1


def test_weights_that_were_replaced_are_refused_where_they_are_used(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    digests = []
    for seed in range(2):
        export(root / "models/m", unsettled(tiny(defense="none", seed=seed)), tiny(defense="none"), SHAPES)
        digests.append(hashlib.sha256(root.read_bytes("models/m/classifier.safetensors")).hexdigest())
    first, second = (f"models/m#{digest}" for digest in digests)
    assert attack_tasks.load_model(str(tmp_path), second, "cpu")(IMAGES).shape == (3, 10)
    with pytest.raises(
        DataError, match=r"models/m/classifier.safetensors does not hold the weights that its records name"
    ):
        attack_tasks.load_model(str(tmp_path), first, "cpu")


def test_a_checkpoint_of_before_a_setting_existed_is_continued(tmp_path: Path) -> None:
    """Continue where the setting is at its default; a changed setting is another model."""
    storage = Storage(tmp_path)
    first = make_loop(tiny())
    first.run_epoch()
    first.save(storage)
    [name] = storage.list()
    state = torch.load(tmp_path / name, weights_only=True)
    for setting in ("adversarial_training", "adversarial_loss", "adversarial_beta", "ema_decay"):
        del state["config"][setting]
    torch.save(state, tmp_path / name)
    second = make_loop(tiny())
    second.resume(storage)
    assert second.epoch == 1
    with pytest.raises(DataError, match=r"is of another model: ema_decay is 0\.0 there, 0\.9 here"):
        make_loop(tiny(ema_decay=0.9)).resume(storage)
