"""Adaptive attacks, which know the defense."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from attacked_models import convnet, linear, near_grey, predict, seeded
from torch import Tensor, nn

from components.attacks.apgd import apgd
from components.attacks.bim import bim
from components.attacks.pgd import pgd
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.config import TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError
from components.evaluation.judge import verify_examples
from components.models.defend import AutoEncoder, DefendNet, adaptive_objective
from components.network import build_net
from pipeline.evaluation.attack_tasks import craft


def test_the_auxiliary_is_given_the_right_rows(mnist: tuple[Tensor, Tensor, nn.Module]) -> None:
    x, y, model = mnist
    x, y = x[:30], y[:30]
    calls: list[int] = []

    def auxiliary(now: Tensor, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.int64
        assert (now - x[rows]).abs().max() <= 0.06 + 1e-6, "each image within eps of the one its row names"
        calls.append(len(rows))
        return 0.01 * now.flatten(1).mean(dim=1)

    # Images differ by more than twice eps, so that their neighbourhoods do not overlap.
    assert (torch.cdist(x.flatten(1), x.flatten(1), p=torch.inf) + torch.eye(30)).min() > 0.12
    for attack, options in ((bim, {}), (pgd, {"restarts": 3}), (apgd, {"restarts": 2}), (apgd, {"norm": "linf"})):
        for early in (False, True):
            calls.clear()
            attack(
                model,
                x,
                y,
                eps=0.06,
                steps=6,
                stop_on_success=early,
                auxiliary=auxiliary,
                generator=seeded(0),
                **options,
            )
            assert calls[0] == 30
            assert (min(calls) < 30) == early
            assert min(calls) > 0


@pytest.mark.parametrize("attack", [bim, pgd, apgd])
def test_the_auxiliary_is_what_is_maximised_where_the_logits_say_nothing(attack: Callable[..., Tensor]) -> None:
    flat = linear(3)
    nn.init.zeros_(flat[1].weight)
    nn.init.zeros_(flat[1].bias)
    x, y = near_grey(5), torch.zeros(5, dtype=torch.int64)
    sign = torch.tensor([1, -1, 1, 1, -1])

    def auxiliary(now: Tensor, rows: Tensor) -> Tensor:
        return sign[rows] * now.flatten(1).sum(dim=1)

    out = attack(flat, x, y, eps=0.1, steps=10, auxiliary=auxiliary, generator=seeded(0))
    torch.testing.assert_close(out, x + 0.1 * sign.view(-1, 1, 1, 1), rtol=0, atol=1e-6)


def test_adaptive_is_pgd_with_an_auxiliary_that_the_caller_weights() -> None:
    model, x = convnet(0), near_grey(8, side=8)
    y = predict(model, x)

    def tripled(now: Tensor, rows: Tensor) -> Tensor:
        return -3 * (now - x[rows]).flatten(1).square().sum(dim=1)

    settings = "eps=0.05,steps=5,restarts=2"
    plain = run_attack(AttackSpec.parse(f"pgd:{settings}"), model, x, y, generator=seeded(0))
    spec = AttackSpec.parse(f"adaptive:{settings},weight=3,objective=reconstruction")
    expected = pgd(model, x, y, eps=0.05, steps=5, restarts=2, auxiliary=tripled, generator=seeded(0))
    out = run_attack(spec, model, x, y, auxiliary=tripled, generator=seeded(0))
    assert torch.equal(out, expected)
    assert not torch.equal(out, plain)
    # An auxiliary term of zero changes no bit.
    out = run_attack(spec, model, x, y, auxiliary=lambda now, rows: 0 * now.flatten(1).sum(1), generator=seeded(0))
    assert torch.equal(out, plain)


@pytest.fixture(scope="module", params=[2, 4])
def known(request: pytest.FixtureRequest) -> tuple[DefendNet, Tensor]:
    """Give an untrained Defend++ network that shares two or four blocks, in eval mode, and six images."""
    sizes = level_sizes(28)
    config = TrainConfig(width=4, shared_blocks=request.param)
    net = build_net(config, Shapes(image_size=28, channels=1, num_classes=10, sizes=sizes))
    assert isinstance(net, DefendNet)
    images = torch.rand(6, 1, 28, 28, generator=seeded(3))
    net.train()
    with torch.no_grad():  # These passes set the batch norm statistics.
        net.joint(images)
        net.classifier(images)
    return net.eval(), images


def relative_distance(net: DefendNet, x: Tensor, clean: Tensor, objective: str) -> Tensor:
    """Compute the term of the adaptive attack by its definition, sample by sample."""

    def features(image: Tensor) -> Tensor:
        if objective == "reconstruction":
            return net.autoencoder(image[None])[0]
        for block in net.autoencoder.encoder:
            image = block(image if image.ndim == 4 else image[None])
        return image

    pairs = [(features(a), features(b)) for a, b in zip(x, clean, strict=True)]
    return torch.stack([((a - b) ** 2).sum() / (b**2).sum() for a, b in pairs])


OBJECTIVES = ("latent", "reconstruction")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_the_adaptive_attacker_adds(objective: str, known: tuple[DefendNet, Tensor]) -> None:
    net, clean = known
    x = (clean + 0.1 * torch.randn(clean.shape, generator=seeded(4))).clamp(0, 1)
    term = adaptive_objective(net.autoencoder, clean, objective, 3.0)
    with torch.no_grad():
        expected = 3 * relative_distance(net, x, clean, objective)
        assert (expected > 1e-4).all()
        torch.testing.assert_close(term(x, torch.arange(6)), expected, rtol=1e-4, atol=1e-7)
        assert (term(clean, torch.arange(6)) < 1e-9).all()
        # Each remaining sample, in any order, is compared with its own clean image.
        remaining = torch.tensor([4, 1, 3])
        torch.testing.assert_close(term(x[remaining], remaining), expected[remaining], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(term(x[remaining], torch.arange(3)), expected[remaining], rtol=0.01)


def test_with_all_blocks_shared_the_latent_is_the_classifiers_last_map(known: tuple[DefendNet, Tensor]) -> None:
    net, clean = known
    maps: list[Tensor] = []
    hook = net.classifier.layer4.register_forward_hook(lambda module, args, output: maps.append(output.detach()))
    x = 1 - clean
    with torch.no_grad():
        net.classifier(clean)
        net.classifier(x)
        hook.remove()
        terms = adaptive_objective(net.autoencoder, clean, "latent", 1.0)(x, torch.arange(6))
    expected = (maps[1] - maps[0]).flatten(1).square().sum(1) / maps[0].flatten(1).square().sum(1)
    assert torch.allclose(terms, expected, rtol=1e-4) == (net.shared_blocks == 4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_what_the_adaptive_attacker_adds(objective: str, known: tuple[DefendNet, Tensor]) -> None:
    net, clean = copy.deepcopy(known[0].autoencoder).double(), known[1].double()
    term, rows = adaptive_objective(net, clean, objective, 1.0), torch.tensor([5, 0])
    x = (clean[rows] + 0.1 * torch.randn(2, 1, 28, 28, generator=seeded(5), dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(term(x, rows).sum(), x)
    for i in range(2):
        way = torch.randn(1, 28, 28, generator=seeded(6 + i), dtype=torch.float64)
        ahead, behind = x.detach().clone(), x.detach().clone()
        ahead[i] += 1e-7 * way
        behind[i] -= 1e-7 * way
        with torch.no_grad():
            risen = (term(ahead, rows) - term(behind, rows)) / 2e-7
        assert risen[i].item() == pytest.approx((slope[i] * way).sum().item(), rel=1e-4)
        assert risen[1 - i] == 0
    assert (slope.flatten(1).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_latent_of_zero_leaves_the_adaptive_attacker_a_direction(objective: str) -> None:
    """Black images have a latent and a reconstruction of exactly zero; brighter images do not."""

    class Tenfold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * x

    class Decoder(nn.Module):
        def forward(self, features: list[Tensor], latent: Tensor) -> list[Tensor]:
            return [latent]

    clean = torch.zeros(2, 1, 4, 4)
    clean[1] = 0.5
    term = adaptive_objective(AutoEncoder([Tenfold()], Decoder()), clean, objective, 1.0)
    x = (clean + torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)).clamp(0, 1).requires_grad_()
    values = term(x, torch.arange(2))
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert values.isfinite().all()
    assert slope.isfinite().all()
    assert (slope > 0).all()
    assert values[1].item() == pytest.approx(0.36)  # 0.3^2 / 0.5^2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_adaptive_attack_moves_what_the_auto_encoder_sees(
    objective: str, known: tuple[DefendNet, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline's attack beats PGD of the same steps, and stopped samples leave the others unaffected."""
    net, clean = known
    labels = predict(net.classifier, clean)
    labels[2] = (labels[2] + 1) % 10  # It is misclassified, so the attack stops at once.
    settings = "eps=0.05,steps=3,restarts=2"

    def crafted(text: str, autoencoder: nn.Module | None, early: bool) -> Tensor:
        spec = AttackSpec.parse(text)
        examples, _ = craft(
            spec, net.classifier, lambda: None, autoencoder, clean, labels, stop_on_success=early, seed=0
        )
        verify_examples(clean, examples, range(6), spec)
        return examples

    adaptive = f"adaptive:{settings},weight=10,objective={objective}"
    plain, knowing = crafted(f"pgd:{settings}", None, False), crafted(adaptive, net.autoencoder, False)
    with torch.no_grad():
        assert (
            relative_distance(net, knowing, clean, objective) > 1.1 * relative_distance(net, plain, clean, objective)
        ).all()
    calls: list[int] = []

    def watched(*arguments: object) -> Callable[[Tensor, Tensor], Tensor]:
        term = adaptive_objective(*arguments)

        def checked(x: Tensor, rows: Tensor) -> Tensor:
            nearest = torch.cdist(x.detach().flatten(1), clean.flatten(1)).argmin(1)
            values = term(x, rows)
            with torch.no_grad():
                torch.testing.assert_close(
                    values, 10 * relative_distance(net, x, clean[nearest], objective), rtol=1e-3, atol=1e-6
                )
            calls.append(len(x))
            return values

        return checked

    monkeypatch.setattr("pipeline.evaluation.attack_tasks.adaptive_objective", watched)
    crafted(adaptive, net.autoencoder, True)
    assert calls[0] == 6
    assert 0 < min(calls) < 6, "of no use unless one leaves"


def test_an_auxiliary_of_the_wrong_shape_is_refused() -> None:
    model, x, y = linear(3), near_grey(4), torch.zeros(4, dtype=torch.int64)
    for attack in (bim, pgd, apgd):
        with pytest.raises(ValueError, match=r"auxiliary must return \[4\].*got \[\]"):
            attack(model, x, y, eps=0.1, steps=2, auxiliary=lambda now, rows: now.sum())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("adaptive:eps=0.1", {}, "auxiliary is None; it must be a function for adaptive"),
        (
            "fgsm:eps=0.1",
            {"auxiliary": lambda x, rows: x.sum()},
            "it must be None for fgsm; bim, pgd, apgd, adaptive take one",
        ),
        ("autoattack:eps=0.1", {"auxiliary": lambda x, rows: x.sum()}, "it must be None for autoattack"),
        ("square:eps=0.1", {"stop_on_success": True}, "stop_on_success"),
        ("autoattack:eps=0.1", {"stop_on_success": True}, "stop_on_success"),
        ("fab-t", {"stop_on_success": True}, "stop_on_success"),
        ("apgd-t:eps=0.1", {"targeted": True}, "it must be False for apgd-t, which cannot be told"),
        ("square:eps=0.1", {"targeted": True}, "it must be False for square, which cannot be told"),
        ("bim:eps=0.1,target=random", {"targeted": True}, "chooses its targets"),
    ],
)
def test_options_that_an_attack_does_not_have_are_refused(text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_attack(AttackSpec.parse(text), linear(3), near_grey(2), torch.zeros(2, dtype=torch.int64), **options)
