"""Defend++ on adversarial examples, TRADES, N-FGSM, and the moving average of the weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import SHAPES, defended, tiny
from torch import Tensor, nn

from components.config import ENCODER_BLOCKS, Shapes, TrainConfig
from components.errors import ConfigError
from components.models.defend import DefendNet
from components.network import build_net, classifier_of
from components.training import adversarial
from components.training.adversarial import adversarial_examples, adversarial_spec, kl_divergence, training_examples
from components.training.augment import Batch
from components.training.schedule import Phase
from components.training.step import PhaseModule, make_optimizer, train_step

DIGITS = Shapes(image_size=28, channels=1, num_classes=2, sizes=(28, 14, 7))
PGD = {"adversarial_attack": "pgd", "adversarial_steps": 3, "adversarial_eps": 0.1}
N_FGSM = {"adversarial_attack": "n-fgsm", "adversarial_eps": 0.1}


def on_examples(**changes: Any) -> TrainConfig:
    return tiny(adversarial_training=True, **{**PGD, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch() -> Batch:
    images = torch.randint(0, 256, (4, 1, 14, 14), generator=seeded(1), dtype=torch.uint8)
    return Batch(images=images, labels=torch.arange(4), levels=(torch.rand(4, 1, 7, 7, generator=seeded(2)),))


def inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images in [0,1], labels, and targets of both levels."""
    images = batch().images.float() / 255
    return images, batch().labels, [images, *batch().levels]


def trained_a_little(net: nn.Module, steps: int = 5) -> nn.Module:
    """Move batch norm's statistics and the weights away from where they start."""
    config = tiny(defense="none")
    classifier = classifier_of(net).train()
    optimizer = make_optimizer(classifier, config)
    for _ in range(steps):
        train_step(PhaseModule(classifier, "classifier", config), optimizer, batch(), lr=0.05, config=config)
    return net


# --- what the parts see


@pytest.mark.parametrize("shared_blocks", [1, 4])
def test_the_classifier_sees_the_example_and_the_auto_encoder_restores_the_clean_levels(shared_blocks: int) -> None:
    config = on_examples(shared_blocks=shared_blocks, reconstruction_weight=3.0)
    net = defended(config)
    images, labels, targets = inputs()
    examples = training_examples(net.classifier, images, labels, config, seeded())
    assert float((examples - images).abs().max()) == pytest.approx(0.1, abs=1e-6)
    reference = copy.deepcopy(net)
    logits, levels = reference.joint(examples)
    rec = F.mse_loss(levels[0], targets[0]) + config.lam * F.mse_loss(levels[1], targets[1])
    wanted = F.cross_entropy(logits, labels) + 3.0 * rec
    loss, terms = PhaseModule(net, "adversarial_joint", config)(images, labels, targets, None, examples)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert set(terms) == {"loss", "loss_adv", "loss_rec", "rec_0", "rec_1"}


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        ("adversarial", "classifier"),
        ("adversarial_autoencoder", "autoencoder"),
        ("adversarial_joint", "both"),
    ],
)
def test_a_phase_on_examples_trains_the_parts_of_the_phase_on_clean_images(phase: Phase, moved: str) -> None:
    config = on_examples(shared_blocks=1)
    net = defended(config)
    before = {name: value.clone() for name, value in net.named_parameters()}
    module = PhaseModule(net, phase, config)
    train_step(module, make_optimizer(net, config), batch(), lr=0.1, config=config, generator=seeded())
    changed = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    own_classifier = {n for n in before if n.startswith("classifier.layer3")}
    decoder = {n for n in before if n.startswith("autoencoder.decoder") and n.endswith("weight")}
    assert bool(changed & own_classifier) == (moved != "autoencoder")
    assert bool(changed & decoder) == (moved != "classifier")


def test_examples_of_the_auto_encoders_phase_are_made_on_the_classifier() -> None:
    """They follow the classifier's own blocks, which this phase does not train."""
    config = on_examples(shared_blocks=1)
    net = defended(config)
    module = PhaseModule(net, "adversarial_autoencoder", config)
    assert module.attacked is net.classifier
    assert not {id(p) for p in module.parameters()} & {id(p) for p in net.classifier.fc.parameters()}  # type: ignore[union-attr]
    assert PhaseModule(net, "autoencoder", config).attacked is None


# --- TRADES


def test_trades_is_the_formula_of_zhang_et_al() -> None:
    """CE(f(x), y) + beta KL(p(x) || p(x')), written out, with gradients through both predictions."""
    config = tiny(defense="adversarial", adversarial_loss="trades", adversarial_beta=2.5, **PGD)
    net = build_net(config, SHAPES).train()
    reference = copy.deepcopy(net)
    images, labels, _ = inputs()
    examples = (images + 0.05).clamp(0, 1)
    loss, terms = PhaseModule(net, "adversarial", config)(images, labels, [], None, examples)
    loss.backward()
    example_probabilities, probabilities = (reference(x).softmax(1) for x in (examples, images))
    cross_entropy = -probabilities[torch.arange(4), labels].log().mean()
    divergence = (probabilities * (probabilities.log() - example_probabilities.log())).sum(1).mean()
    wanted = cross_entropy + 2.5 * divergence
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(terms["loss_kl"]) == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert float(divergence.detach()) > 1e-4
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_trades_examples_raise_the_divergence_more_than_those_of_the_cross_entropy() -> None:
    net = trained_a_little(build_net(tiny(defense="none"), SHAPES)).eval()
    images, labels, _ = inputs()
    divergence = {}
    for loss in ("ce", "trades"):
        config = tiny(defense="adversarial", adversarial_loss=loss, **{**PGD, "adversarial_steps": 10})
        examples = training_examples(net, images, labels, config, seeded())
        assert float((examples - images).abs().max()) <= 0.1 + 1e-6
        assert float(examples.min()) >= 0
        assert float(examples.max()) <= 1
        with torch.no_grad():
            divergence[loss] = float(kl_divergence(net(examples), net(images)).mean())
    assert divergence["trades"] > divergence["ce"] > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_divergence_is_not_negative_and_zero_for_equal_predictions(seed: int) -> None:
    logits, other = torch.randn(2, 5, 7, generator=seeded(seed)) * 4
    assert float(kl_divergence(logits, other).min()) >= -1e-6
    assert float(kl_divergence(logits + 3, logits).abs().max()) <= 1e-6


# --- N-FGSM


def test_n_fgsm_is_one_step_from_a_noisy_image_and_is_not_projected() -> None:
    """De Jorge et al. 2022, algorithm 1: noise up to 2 eps within the image's range, then a step of eps."""
    config = tiny(defense="adversarial", **N_FGSM)
    net = trained_a_little(build_net(config, SHAPES)).train()
    images, labels, _ = inputs()
    examples = training_examples(net, images, labels, config, seeded(3))
    reference = copy.deepcopy(net).eval()
    start = (images + (torch.rand(images.shape, generator=seeded(3)) * 2 - 1) * 0.2).clamp(0, 1).requires_grad_()
    F.cross_entropy(reference(start), labels).backward()
    assert start.grad is not None
    wanted = (start + 0.1 * start.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(examples, wanted.detach())
    assert 0.2 < float((examples - images).abs().max()) <= 0.3 + 1e-6
    assert net.training


def test_the_other_attacks_are_those_of_the_evaluation() -> None:
    config = tiny(defense="adversarial", **PGD)
    net = trained_a_little(build_net(config, SHAPES))
    images, labels, _ = inputs()
    expected = adversarial_examples(net, images, labels, adversarial_spec(config), generator=seeded(7), fold=True)
    assert torch.equal(training_examples(net, images, labels, config, seeded(7)), expected)


@pytest.mark.parametrize("arch", ENCODER_BLOCKS)
@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_examples_of_a_folded_copy_are_those_of_the_network(
    arch: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for pixels whose slope is within rounding of 0. The network itself stays as it was, in training mode."""
    config = tiny(defense="adversarial", adversarial_loss=loss, arch=arch, **PGD)
    net = trained_a_little(build_net(config, SHAPES)).train()
    before = copy.deepcopy(net.state_dict())
    images, labels, _ = inputs()
    assert config.may_fold_examples
    made = training_examples(net, images, labels, config, seeded(7))
    monkeypatch.setattr(adversarial, "folded", lambda network: None)
    wanted = training_examples(net, images, labels, config, seeded(7))
    assert float(((made - wanted).abs() < 1e-4).float().mean()) > 0.98
    # Where a prediction is certain, the divergence has no slope in float32.
    assert float((made - images).abs().max()) == pytest.approx(0.1, abs=1e-6) or loss == "trades"
    assert float((made - images).abs().max()) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_only_attacks_of_several_steps_on_our_own_networks_are_searched_for_on_a_copy() -> None:
    assert not tiny(defense="adversarial", **N_FGSM).may_fold_examples
    assert not tiny(defense="adversarial", arch="torchvision:resnet18", **PGD).may_fold_examples
    assert not tiny(**PGD).may_fold_examples
    assert on_examples().may_fold_examples


@pytest.mark.parametrize("attack", ["fgsm", "ddn"])
def test_trades_with_an_attack_that_does_not_maximise_its_divergence_is_refused(attack: str) -> None:
    for defense in ({"defense": "adversarial"}, {"adversarial_training": True}):
        with pytest.raises(ConfigError, match=r"train\.adversarial_attack is '.*'; it must be n-fgsm or pgd"):
            TrainConfig(adversarial_loss="trades", adversarial_attack=attack, **defense)  # type: ignore[arg-type]


def test_noise_beside_adversarial_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="it must be none with adversarial_training"):
        TrainConfig(adversarial_training=True, noise_location="latent")


def test_settings_without_influence_do_not_name_a_model() -> None:
    trades = TrainConfig(adversarial_training=True, adversarial_loss="trades", adversarial_attack="n-fgsm")

    def same(**changes: Any) -> bool:
        return dataclasses.replace(trades, **changes).canonical() == trades.canonical()

    assert TrainConfig(adversarial_loss="trades", adversarial_attack="pgd").canonical() == TrainConfig().canonical()
    assert not same(adversarial_training=False)
    assert not any(same(**{field: 0.5}) for field in ("adversarial_beta", "adversarial_eps", "lam", "ema_decay"))
    assert same(adversarial_share=0.5, adversarial_steps=3)
    assert trades.canonical().canonical() == trades.canonical()


# --- it helps


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_a_defended_classifier_resists_what_it_was_trained_on(loss: str) -> None:
    """On a task that both learn, only Defend++ with adversarial training keeps its accuracy under FGSM."""
    labels = torch.arange(32) % 2
    images = torch.rand(32, 1, 28, 28, generator=seeded(1)) * 0.2 + 0.4
    images[labels == 1, :, 7:21, 7:21] += 0.25
    levels = (F.avg_pool2d(images, 2), F.avg_pool2d(images, 4))
    data = Batch(images=(images * 255).to(torch.uint8), labels=labels, levels=levels)
    accuracy = {}
    for on in (False, True):
        config = tiny(
            adversarial_training=on,
            adversarial_loss=loss,
            adversarial_beta=1.0,
            shared_blocks=4,
            **{**PGD, "adversarial_steps": 4},
        )
        net = build_net(config, DIGITS).train()
        assert isinstance(net, DefendNet)
        phase: Phase = "adversarial_joint" if on else "joint"
        module, optimizer = PhaseModule(net, phase, config), make_optimizer(net, config)
        for i in range(60):
            train_step(module, optimizer, data, lr=0.05, config=config, generator=seeded(i))
        net.eval()
        clean = data.images.float() / 255
        spec = adversarial_spec(tiny(defense="adversarial", adversarial_eps=0.1))
        examples = adversarial_examples(net.classifier, clean, labels, spec, generator=None)
        with torch.no_grad():
            accuracy[on] = float((net.classifier(examples).argmax(1) == labels).float().mean())
            assert float((net.classifier(clean).argmax(1) == labels).float().mean()) > 0.9
    assert accuracy[True] > accuracy[False] + 0.3


# --- arithmetic


def test_a_certain_prediction_spoils_no_gradient_of_trades() -> None:
    """Probabilities underflow to 0 at a logit gap of 104; one confident image must not spoil the weights."""
    certain = torch.tensor([[200.0, 0.0, -200.0]])
    for logits, reference in ((certain, certain.flip(1)), (certain, certain), (certain, torch.zeros(1, 3))):
        a, b = logits.clone().requires_grad_(), reference.clone().requires_grad_()
        kl_divergence(a, b).sum().backward()
        for x in (a, b):
            assert x.grad is not None
            assert x.grad.isfinite().all()


def test_a_folded_copy_in_bfloat16_finds_examples_as_harmful() -> None:
    """Rounding of eight bits moves single pixels, but not the loss that the examples reach."""
    config = tiny(defense="adversarial", **{**PGD, "adversarial_steps": 7})
    net = trained_a_little(build_net(config, SHAPES), steps=20).train()
    images, labels, _ = inputs()
    losses = {}
    for fold in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            examples = adversarial_examples(
                net, images, labels, adversarial_spec(config), generator=seeded(7), fold=fold
            )
        with torch.no_grad():
            losses[fold] = float(F.cross_entropy(copy.deepcopy(net).eval()(examples), labels))
    with torch.no_grad():
        clean = float(F.cross_entropy(copy.deepcopy(net).eval()(images), labels))
    assert losses[True] > clean
    assert losses[True] == pytest.approx(losses[False], rel=0.2)
