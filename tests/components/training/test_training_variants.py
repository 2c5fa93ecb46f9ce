"""Augmentation, adversarial training, ComDefend and pretrained weights: what each step sees and changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from components.config import TrainConfig
from components.config.data import Shapes
from components.config.train import stored_levels
from components.dct import linear_pyramid, lowpass_pyramid
from components.errors import ConfigError, DataError
from components.models.defend import DefendNet
from components.network import build_net, classifier_of
from components.training.adversarial import adversarial_examples, adversarial_spec
from components.training.augment import Batch, augmented, gaussian_noise, targets_of
from components.training.step import PhaseModule, make_optimizer, train_step
from pipeline.runtime.storage import Storage, StorageError
from pipeline.training import pretrained

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=(28, 14, 7))


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"width": 4, "batch_size": 8, "lr": 0.05, "epochs": 4, **changes})


def batch(n: int = 8, targets: Any = "lowpass") -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    pyramid = linear_pyramid if targets == "linear" else lowpass_pyramid
    levels = pyramid(images.float() / 255, SHAPES.sizes)[1:]
    return Batch(images=images, labels=torch.arange(n) % 10, levels=tuple(levels))


# --- augmentation


@pytest.mark.parametrize("targets", ["lowpass", "linear"])
def test_stored_levels_are_flipped_with_their_image(targets: Any) -> None:
    """As good as computing them anew: the operator commutes with flips."""
    config = tiny(augment="flip", targets=targets)
    given = batch(32, targets)
    out = augmented(given, config, step=3, rank=0)
    flipped = [not torch.equal(a, b) for a, b in zip(out.images, given.images, strict=True)]
    assert 5 < sum(flipped) < 27
    for was, image, before in zip(flipped, out.images, given.images, strict=True):
        assert torch.equal(image, before.flip(-1) if was else before)
    pyramid = linear_pyramid if targets == "linear" else lowpass_pyramid
    for level, anew in zip(out.levels, pyramid(out.images.float() / 255, SHAPES.sizes)[1:], strict=True):
        torch.testing.assert_close(level, anew, rtol=0, atol=1e-5)


def test_crops_are_windows_of_the_padded_image_and_take_new_levels() -> None:
    config = tiny(augment="crop_flip", crop_padding=3)
    assert not stored_levels(config)
    given = batch(32)
    out = augmented(given, config, step=0, rank=0)
    assert out.levels == ()
    windows = set()
    for image, before in zip(out.images, given.images, strict=True):
        padded = [F.pad(x, (3, 3, 3, 3)) for x in (before, before.flip(-1))]
        found = [
            (flip, i, j)
            for flip, whole in enumerate(padded)
            for i in range(7)
            for j in range(7)
            if torch.equal(image, whole[:, i : i + 28, j : j + 28])
        ]
        assert len(found) == 1
        windows.add(found[0])
    assert len(windows) > 20
    images = out.images.float() / 255
    for level, anew in zip(
        targets_of(images, out, config, SHAPES.sizes), lowpass_pyramid(images, SHAPES.sizes), strict=True
    ):
        assert torch.equal(level, anew)


def test_augmentation_follows_from_seed_step_and_rank() -> None:
    config = tiny(augment="crop_flip")
    one = augmented(batch(), config, 3, 0).images
    assert torch.equal(one, augmented(batch(), config, 3, 0).images)
    others = [
        augmented(batch(), config, 4, 0),
        augmented(batch(), config, 3, 1),
        augmented(batch(), dataclasses.replace(config, seed=1), 3, 0),
    ]
    assert not any(torch.equal(one, other.images) for other in others)


def test_without_low_pass_only_level_0_has_a_target() -> None:
    images = batch().images.float() / 255
    (target,) = targets_of(images, batch(), tiny(targets="none"), SHAPES.sizes)
    assert target is images
    net = build_net(tiny(targets="none"), SHAPES)
    _, terms = PhaseModule(net, "joint", tiny(targets="none"))(images, batch().labels, [target], None)
    assert {t for t in terms if t.startswith("rec_")} == {"rec_0"}


# --- adversarial training


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_the_loss_is_that_of_the_examples_and_their_share_of_the_clean(share: float) -> None:
    config = tiny(defense="adversarial", adversarial_attack="fgsm", adversarial_share=share, adversarial_eps=0.1)
    net = build_net(config, SHAPES)
    given = batch()
    images = given.images.float() / 255
    examples = adversarial_examples(net, images, given.labels, adversarial_spec(config), generator=None)
    assert float((examples - images).abs().max()) == pytest.approx(0.1, abs=1e-6)
    reference = build_net(config, SHAPES).train()  # batch norm moves: a network of its own
    adversarial = F.cross_entropy(reference(examples), given.labels)
    clean = F.cross_entropy(reference(images), given.labels)
    wanted = float((share * adversarial + (1 - share) * clean).detach())
    net.train()
    terms = train_step(
        PhaseModule(net, "adversarial", config),
        make_optimizer(net, config),
        given,
        lr=0.0,
        config=config,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(terms["loss"]) == pytest.approx(wanted, rel=1e-5)
    assert ("loss_cls" in terms) == (share < 1)
    assert net.training


@pytest.mark.slow
def test_adversarial_training_resists_what_it_was_trained_on() -> None:
    """On a task that both learn, only the adversarially trained classifier keeps its accuracy under FGSM."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(32) % 2
    images = torch.rand(32, 1, 28, 28, generator=generator) * 0.2 + 0.4
    images[labels == 1, :, 7:21, 7:21] += 0.25
    given = Batch(images=(images * 255).to(torch.uint8), labels=labels)
    accuracy = {}
    for defense in ("none", "adversarial"):
        config = tiny(defense=defense, adversarial_eps=0.1, epochs=1)
        net = build_net(config, SHAPES)
        module = PhaseModule(net, "classifier" if defense == "none" else "adversarial", config)
        optimizer = make_optimizer(net, config)
        net.train()
        for _ in range(60):  # 30 are not enough on every processor
            train_step(module, optimizer, given, lr=0.05, config=config, generator=generator)
        net.eval()
        clean = given.images.float() / 255
        examples = adversarial_examples(net, clean, labels, adversarial_spec(config), generator=generator)
        accuracy[defense] = float((net(examples).argmax(1) == labels).float().mean())
        assert float((net(clean).argmax(1) == labels).float().mean()) > 0.9
    assert accuracy["adversarial"] > accuracy["none"] + 0.3


def test_ddn_examples_are_shortened_to_the_norm_asked_for() -> None:
    config = tiny(defense="adversarial", adversarial_attack="ddn", adversarial_steps=5, adversarial_max_norm=0.3)
    net = build_net(config, SHAPES).eval()
    images = batch().images.float() / 255
    examples = adversarial_examples(
        net, images, net(images).argmax(1), adversarial_spec(config), generator=None, max_norm=0.3
    )
    norms = (examples - images).flatten(1).norm(dim=1)
    assert float(norms.max()) <= 0.3 * (1 + 1e-5)
    assert float(norms.max()) > 0.1


# --- ComDefend


def test_the_reformers_noise_follows_from_seed_and_step_with_its_own_sigma() -> None:
    config = tiny(defense="comdefend", reformer_sigma=5.0)
    zeros = torch.zeros(4, 4, 28, 28)
    noise = gaussian_noise(config, 7, 0, torch.device("cpu"))
    assert noise is not None
    drawn = noise(zeros)
    assert float(drawn.std()) == pytest.approx(5.0, rel=0.05)
    again = gaussian_noise(config, 7, 0, torch.device("cpu"))
    assert again is not None
    assert torch.equal(drawn, again(zeros))
    assert gaussian_noise(tiny(), 7, 0, torch.device("cpu")) is None


@pytest.mark.slow
def test_a_reformer_learns_to_reconstruct() -> None:
    config = tiny(defense="comdefend", width=8, optimizer="adam", lr=3e-3, weight_decay=0.0)
    net = build_net(config, SHAPES)
    module, optimizer = PhaseModule(net, "reformer", config), make_optimizer(net, config)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(28) < 14
    images = torch.where(rows[None, None, :, None], 30, 220).expand(8, 1, 28, 28)
    images = images + torch.randint(0, 20, images.shape, generator=generator)
    given = Batch(images=images.to(torch.uint8), labels=torch.zeros(8, dtype=torch.int64))
    losses = []
    for step in range(60):
        noise = gaussian_noise(config, step, 0, torch.device("cpu"))
        losses.append(float(train_step(module, optimizer, given, lr=3e-3, config=config, noise=noise)["loss_rec"]))
    clean = given.images.float() / 255
    error = float(F.mse_loss(net.eval()(clean), clean))
    assert error < 0.25 * float(clean.var()), "no better than a constant image"
    assert losses[-1] < losses[0]


# --- pretrained weights


def saved(tmp_path: Path, name: str, **changes: Any) -> Path:
    """The weights of a classifier with another head, or of another seed, in either format."""
    shapes = dataclasses.replace(SHAPES, **{k: v for k, v in changes.items() if k == "num_classes"})
    state = build_net(tiny(defense="none", seed=9), shapes).state_dict()
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    elif name.endswith(".ckpt.pth"):
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt.pth"])
def test_training_starts_from_the_weights_and_the_auto_encoders_copies_too(tmp_path: Path, name: str) -> None:
    config = tiny(pretrained=str(saved(tmp_path, name)), shared_blocks=2)
    root = Storage(tmp_path / "root")
    address = pretrained.fetch(config, root)
    assert pretrained.fetch(config, root) == address
    net = build_net(config, SHAPES, pretrained.load(root, address))
    assert isinstance(net, DefendNet)
    wanted = build_net(tiny(defense="none", seed=9), SHAPES).state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in classifier_of(net).state_dict().items())
    own = net.autoencoder.encoder[3]
    assert torch.equal(own[0].conv1.weight, wanted["layer4.0.conv1.weight"])  # type: ignore[index, union-attr]
    assert own[0].conv1.weight is not net.classifier.layer4[0].conv1.weight  # type: ignore[index, union-attr]


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, "five.pth", num_classes=5)
    config = tiny(pretrained=str(path))
    with pytest.raises(
        ConfigError, match=rf"{path} holds a head of 5 classes, but data.num_classes is 10: --train.replace-head"
    ):
        build_net(config, SHAPES, pretrained.read(config))
    kept = dataclasses.replace(config, replace_head=True)
    net = build_net(kept, SHAPES, pretrained.read(kept))
    assert torch.equal(classifier_of(net).fc.weight, build_net(tiny(defense="none"), SHAPES).fc.weight)  # type: ignore[union-attr]
    wide = dataclasses.replace(config, width=8)
    with pytest.raises(DataError, match=r"five\.pth"):
        build_net(wide, SHAPES, pretrained.read(wide))


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.pth does not exist"):
        pretrained.read(tiny(pretrained=str(tmp_path / "nowhere.pth")))
    for name, content in (("junk.pth", b"junk"), ("junk.safetensors", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            pretrained.read(tiny(pretrained=str(tmp_path / name)))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="holds no dictionary of tensors"):
        pretrained.read(tiny(pretrained=str(tmp_path / "list.pth")))
    with pytest.raises(ConfigError, match="torchvision:IMAGENET1K_V1"):
        pretrained.read(tiny(pretrained="torchvision:BEST"))
