"""Attacks that search on a fast copy of the network and lose no example to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx.experimental.optimization
from torch import Tensor, nn

from components.attacks import fast_copy
from components.attacks.fast_copy import computes_in_bfloat16, make_fast_copy, run_attack_on_copy
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.models.adapter import attach
from components.models.comdefend import ComDefend, Reformed
from components.models.resnet import ResNet18, ResNet50
from components.models.vgg import VGG16


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def same_weights() -> Iterator[None]:
    """Fix the random weights: for some of them, rounding exceeds every tolerance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lived_in(net: nn.Module) -> nn.Module:
    """Give batch norms trained statistics. Fresh ones are the identity, and folding them proves nothing."""
    generator = seeded(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(n, generator=generator))
            module.bias.data.copy_(0.1 * torch.randn(n, generator=generator))
    return net.eval()


def batch_norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


NETWORKS: dict[str, Any] = {
    "resnet18, 28": lambda: (ResNet18(10, channels=1, width=4, small=True), (1, 28)),
    "resnet18 that normalises, 32": lambda: (ResNet18(10, width=4, small=True, mean=[0.5] * 3, std=[0.2] * 3), (3, 32)),
    "resnet50, 64": lambda: (ResNet50(10, width=4), (3, 64)),
    "vgg16 with batch norm, 32": lambda: (VGG16(10, width=4, small=True, batch_norm=True), (3, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stand_in_has_the_same_logits_and_gradients_without_batch_norm(name: str) -> None:
    net, (channels, size) = NETWORKS[name]()
    net = lived_in(net)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.rand(6, channels, size, size, generator=seeded())
    fast = make_fast_copy(net, images)
    assert fast is not None
    assert batch_norms(net)
    assert not batch_norms(fast)
    assert not any(p.requires_grad for p in fast.parameters())

    def passes(model: nn.Module) -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(6)), x)
        return logits.detach(), gradient

    (expected, slope), (copy_logits, copy_slope) = passes(net), passes(fast)
    torch.testing.assert_close(copy_logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # A ReLU within rounding of 0 may open in only one of the two, so not every pixel agrees.
    off = (slope - copy_slope).abs() > 1e-3 * slope.abs().max()
    assert off.float().mean() < 0.02
    # The network itself is unchanged.
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_a_hook_that_normalises_is_part_of_the_stand_in() -> None:
    net = lived_in(ResNet18(10, width=4, small=True))
    bare = net(torch.full((1, 3, 32, 32), 0.9))
    attach(net, None, mean=[0.4] * 3, std=[0.2] * 3)
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    fast = make_fast_copy(net, images)
    assert fast is not None
    assert not batch_norms(fast)
    assert not torch.allclose(net(torch.full((1, 3, 32, 32), 0.9)), bare, rtol=1e-2)
    torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-4)


# Fifty layers of random weights, unlike trained ones, amplify rounding until the gradients differ too much.
@pytest.mark.parametrize("name", [name for name in NETWORKS if "50" not in name])
def test_a_bfloat16_stand_in_is_near_and_its_logits_are_not_rounded(name: str) -> None:
    net, (channels, size) = NETWORKS[name]()
    net = lived_in(net)
    images = torch.rand(8, channels, size, size, generator=seeded())
    exact, bfloat16 = make_fast_copy(net, images), make_fast_copy(net, images, bfloat16=True)
    assert exact is not None
    assert computes_in_bfloat16(bfloat16)
    assert not computes_in_bfloat16(exact)
    for module in bfloat16.modules():
        for p in module.parameters(recurse=False):
            assert p.dtype == (torch.float32 if isinstance(module, nn.Linear) else torch.bfloat16)
            assert not p.requires_grad
    assert all(p.dtype == torch.float32 for n in (net, exact) for p in n.parameters())
    logits, expected = bfloat16(images).detach(), net(images).detach()
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert 1e-4 < float((logits - expected).abs().max() / expected.abs().max()) < 0.05

    def slope(model: nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
        return gradient.flatten(1)

    gradient = slope(bfloat16)
    assert gradient.dtype == torch.float32
    assert (nn.functional.cosine_similarity(gradient, slope(net)) > 0.7).all()


class Branching(nn.Module):
    """A network whose control flow depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = lived_in(ResNet18(10, channels=1, width=4, small=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.mean() > 0.3 else self.net(1 - x)


def test_where_rounding_changes_too_much_the_stand_in_is_exact() -> None:
    """In eight bits, the small differences of this network are lost."""

    class Small(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.net((100 + x) - 100)

    net, images = Small().eval(), torch.rand(8, 1, 28, 28, generator=seeded())
    copied = make_fast_copy(net, images, bfloat16=True)
    assert copied is not None
    assert all(p.dtype == torch.float32 for p in copied.parameters())
    assert not computes_in_bfloat16(copied)
    torch.testing.assert_close(copied(images), net(images), rtol=1e-4, atol=1e-4)


class Noisy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn(1))


class Either(Branching):
    """A network that is one of two at random. Tracing would fix the choice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if torch.rand(()) < 0.5 else self.net(1 - x)


def test_what_cannot_be_folded_has_no_stand_in() -> None:
    images = torch.rand(4, 1, 28, 28, generator=seeded())
    for net in (Branching().eval(), Noisy().eval()):
        assert make_fast_copy(net, images) is None, type(net)
    either = Either().eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert [make_fast_copy(either, images) for _ in range(10)] == [None] * 10


@pytest.mark.parametrize("bias", [0.0, 200.0])
def test_a_backward_pass_that_tracing_loses_is_noticed_however_confident_the_network(bias: float) -> None:
    net = lived_in(ResNet18(10, channels=1, width=4, small=True))
    net.fc.bias.data[0] += bias
    images = torch.rand(4, 1, 28, 28, generator=seeded())
    assert make_fast_copy(Reformed(ComDefend(channels=1), net).eval(), images) is None
    assert make_fast_copy(net, images) is not None


def test_without_room_for_the_copy_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline then takes smaller batches. Searching on the network itself would change the result."""
    net = lived_in(ResNet18(10, channels=1, width=4, small=True))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.fx.experimental.optimization, "fuse", full)
    with pytest.raises(torch.OutOfMemoryError):
        make_fast_copy(net, torch.rand(4, 1, 28, 28, generator=seeded()))


class Shifted(nn.Module):
    """A network whose boundary is shifted by more than rounding, so that its examples may fail."""

    def __init__(self, net: nn.Module, by: float) -> None:
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits - self.by * nn.functional.one_hot(logits.argmax(1), logits.shape[1])


@pytest.fixture(scope="module")
def judged() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 5))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for p in net.parameters():
            nn.init.normal_(p, std=0.6)
    net.eval().requires_grad_(False)
    images = torch.rand(40, 1, 6, 6, generator=seeded(5))
    return net, images, net(images).argmax(1)


@pytest.mark.parametrize("attack", ["ddn:steps=30", "fab-t:steps=20", "cw:steps=20", "pgd:eps=0.3,steps=10"])
def test_nothing_is_lost_where_the_stand_in_sees_another_boundary(
    judged: tuple[nn.Module, Tensor, Tensor], attack: str
) -> None:
    net, images, labels = judged
    spec = AttackSpec.parse(attack)
    alone = run_attack(spec, net, images, labels, generator=seeded(7))
    broken_alone = net(alone).argmax(1) != labels
    fast = Shifted(net, 0.5)
    naive = run_attack(spec, fast, images, labels, generator=seeded(7))
    examples = run_attack_on_copy(spec, net, fast, images, labels, generator=seeded(7))
    broken = net(examples).argmax(1) != labels
    assert broken_alone.sum() >= 30
    assert (broken >= (net(naive).argmax(1) != labels)).all()
    assert broken.sum() >= broken_alone.sum()
    if spec.kind != "budget":
        assert (net(naive).argmax(1) != labels).sum() < broken.sum(), "the stand-in's own examples fall short"


def test_only_what_slipped_is_searched_again_and_its_knowledge_follows_its_rows(
    judged: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images, labels = judged
    slips = torch.zeros(40, dtype=torch.bool)
    slips[[3, 17, 30]] = True
    calls: list[tuple[nn.Module, Tensor, Any]] = []
    wrong = images.clone()

    def fake(spec: AttackSpec, model: nn.Module, inputs: Tensor, labels: Tensor, **options: Any) -> Tensor:
        calls.append((model, inputs, options["auxiliary"]))
        return wrong.clone() if model is not net else inputs + 1

    class Fooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = net(x)
            return logits - 1e6 * (slips[:, None] & nn.functional.one_hot(labels, 5).bool())

    monkeypatch.setattr(fast_copy, "run_attack", fake)
    requested_rows: list[Tensor] = []

    def knows(x: Tensor, rows: Tensor) -> Tensor:
        requested_rows.append(rows)
        return torch.zeros(len(x))

    fast = Fooled()
    examples = run_attack_on_copy(AttackSpec.parse("pgd:eps=0.1"), net, fast, images, labels, auxiliary=knows)
    (first, _, passed), (second, again, remapped) = calls
    assert first is fast
    assert passed is knows
    assert second is net
    assert torch.equal(again, images[slips])
    assert torch.equal(examples[slips], images[slips] + 1)
    assert torch.equal(examples[~slips], wrong[~slips])
    remapped(again[1:], torch.tensor([1, 2]))
    assert requested_rows[0].tolist() == [17, 30]


class Firm(nn.Module):
    """A network that classifies some rows correctly under every perturbation."""

    def __init__(self, net: nn.Module, rows: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.net, self.rows, self.labels = net, rows, labels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        if len(x) == len(self.rows):
            logits = logits + 1e6 * (self.rows[:, None] & nn.functional.one_hot(self.labels, logits.shape[1]).bool())
        return logits


def test_what_the_network_gets_wrong_without_any_attack_is_not_lost(judged: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = judged
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % 5
    wrong = torch.arange(40) < 3
    spec = AttackSpec.parse("pgd:eps=0.01,steps=3")
    examples = run_attack_on_copy(spec, net, Firm(net, wrong, labels), images, labels, generator=seeded(7))
    assert (net(examples).argmax(1) != labels)[wrong].all()
