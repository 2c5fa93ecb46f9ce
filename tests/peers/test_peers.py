"""An exported classifier under other attack libraries, and our AutoAttack beside its authors' own.

A test is skipped if its library is not installed. The development extra installs Foolbox;
``pip install adversarial-robustness-toolbox`` and ``pip install --no-deps torchattacks`` (which pins an
old requests) install ART and torchattacks; github.com/fra31/auto-attack has AutoAttack.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repository import ROOT
from small_cnn import digits, trained_cnn
from torch import Tensor, nn

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.config import TrainConfig, level_sizes
from components.config.data import Shapes
from components.models.adapter import encoder_blocks
from components.models.defend import DefendNet
from components.network import build_net
from pipeline.runtime.storage import Storage
from pipeline.training import exports

EPS, STEPS, IMAGES = 0.2, 10, 16


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """Train, export and load a Defend++ classifier of two kinds of images; give it with images and labels."""
    shapes = Shapes(image_size=28, channels=1, num_classes=3, sizes=level_sizes(28))
    config = TrainConfig(width=4)
    net = build_net(config, shapes)
    assert isinstance(net, DefendNet)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % 2
    images = (0.25 + 0.2 * labels.view(-1, 1, 1, 1) + 0.1 * torch.rand(IMAGES, 1, 28, 28, generator=generator)).clamp(
        0, 1
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # With so few steps, the statistics are those of the last one.
    optimizer = torch.optim.Adam(net.classifier.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(net.classifier(images), labels).backward()
        optimizer.step()
    directory = tmp_path_factory.mktemp("exported")
    exports.export(Storage(str(directory)), net, config, shapes)
    model = exports.load_classifier(directory)
    assert len(encoder_blocks(model)) == 4
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
    return model, images, labels


def check(model: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> None:
    """Check that the examples keep within the budget and fool the network."""
    assert float((adversarial - images).abs().max()) <= EPS + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    with torch.no_grad():
        clean, attacked = (
            F.cross_entropy(model(x), labels, reduction="none") for x in (images, adversarial.to(images.dtype))
        )
    assert float((attacked > clean).float().mean()) > 0.9
    assert float((model(adversarial).argmax(1) != labels).float().mean()) > 0.5


def test_foolbox(exported: tuple[nn.Module, Tensor, Tensor]) -> None:
    fb = pytest.importorskip("foolbox")
    model, images, labels = exported
    attack = fb.attacks.LinfPGD(steps=STEPS)
    adversarial = attack.run(fb.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilon=EPS)
    check(model, images, labels, adversarial)


def test_torchattacks(exported: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = exported
    check(model, images, labels, torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS)(images, labels))


def test_art(exported: tuple[nn.Module, Tensor, Tensor]) -> None:
    art = pytest.importorskip("art")
    estimators = pytest.importorskip("art.estimators.classification")
    evasion = pytest.importorskip("art.attacks.evasion")
    assert art
    model, images, labels = exported
    wrapped = estimators.PyTorchClassifier(
        model=model, loss=nn.CrossEntropyLoss(), input_shape=(1, 28, 28), nb_classes=3, clip_values=(0.0, 1.0)
    )
    attack = evasion.ProjectedGradientDescent(wrapped, eps=EPS, eps_step=EPS / 4, max_iter=STEPS, verbose=False)
    adversarial = torch.from_numpy(attack.generate(images.numpy(), np.eye(3)[labels.numpy()]).astype(np.float32))
    check(model, images, labels, adversarial)


# --- our cascade beside the authors'


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    """Train a small CNN on FGSM examples, so that the cascade has to search."""
    fgsm = AttackSpec.parse("fgsm:eps=0.1")
    return trained_cnn(4, lambda model, x, y: run_attack(fgsm, model, x, y)).requires_grad_(False)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 1.5)])
def test_our_autoattack_breaks_what_the_authors_breaks(
    norm: str, eps: float, cnn: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both cascades break the same samples, except at most two: far below the noise level of McNemar's test."""
    apgd = pytest.importorskip("autoattack.autopgd_base").APGDAttack
    pytest.importorskip("foolbox")  # The benchmark imports Foolbox.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_suite import authors_cascade

    schedules, run = set(), apgd.attack_single_run

    def spy(attack: Any, *args: Any) -> Any:
        schedules.add((attack.n_iter, attack.n_iter_2))
        return run(attack, *args)

    monkeypatch.setattr(apgd, "attack_single_run", spy)
    x, y = digits("test", 200)
    spec = AttackSpec.parse(f"autoattack:eps={eps},norm={norm},steps=20,queries=200")
    with torch.random.fork_rng():
        authors = authors_cascade(cnn, x, y, norm=norm.capitalize(), eps=eps, steps=20, queries=200, seed=0)
    ours = run_attack(spec, cnn, x, y, generator=torch.Generator().manual_seed(0))
    withstood = [(cnn(out).argmax(1) == y).numpy() for out in (ours, authors)]
    assert schedules == {(20, 4)}, "the authors' code must have its first checkpoint at 22 % of its own steps"
    assert 0.1 < withstood[1].mean() < 0.9, "of no use unless some fall and some stand"
    assert (withstood[0] != withstood[1]).sum() <= 2
