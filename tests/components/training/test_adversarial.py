"""Online adversarial examples: what they do to the loss, and that they leave no trace in the network."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.errors import ConfigError
from components.training.adversarial import adversarial_examples, mixed_loss

ONE_OF_EACH = (
    "noise:eps=0.1",
    "fgsm:eps=0.1",
    "bim:eps=0.1,steps=3",
    "pgd:eps=0.1,steps=3",
    "pgd:eps=0.5,norm=l2,steps=3",
    "cw:steps=4,binary_search_steps=2",
    "ddn:steps=10",
)
PGD = AttackSpec.parse("pgd:eps=0.1,steps=3")
DDN = AttackSpec.parse("ddn:steps=10")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class k has its own fixed pattern, faint enough that eps 0.1 can hide it."""
    patterns = torch.rand(3, 1, 8, 8, generator=seeded(99))
    g = seeded(seed)
    labels = torch.randint(3, (n,), generator=g)
    return 0.2 * torch.rand(n, 1, 8, 8, generator=g) + 0.3 + 0.3 * patterns[labels], labels


def network(trained: bool = True) -> nn.Sequential:
    """Batch norm and dropout, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(54, 3),
        )
        if trained:
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
            images, labels = data(64, seed=5)
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    return network()


@pytest.fixture
def model(trained: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(trained)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(copy.deepcopy(model).eval()(images), labels).item()


# --- no trace in the network


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_modes_statistics_gradients_and_flags_stay(model: nn.Sequential, text: str) -> None:
    images, labels = data()
    F.cross_entropy(model(images), labels).backward()
    model[3].eval()  # one batch norm in eval mode inside a network in training mode ...
    model[3][2].train()  # ... and the other way round inside that
    model[6].bias.requires_grad_(False)
    model[0].weight.grad = None
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())

    adversarial_examples(model, images, labels, AttackSpec.parse(text), generator=seeded(0), max_norm=0.4)

    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for parameter, before in zip(model.parameters(), grads, strict=True):
        if before is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert id(parameter.grad) == before[0]
            assert torch.equal(parameter.grad, before[1])


def test_the_attack_sees_a_frozen_network_in_eval_mode(model: nn.Sequential) -> None:
    seen: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(
        lambda *_: seen.append(
            (any(m.training for m in model.modules()), any(p.requires_grad for p in model.parameters()))
        )
    )
    adversarial_examples(model, *data(4), PGD, generator=seeded(0))
    assert seen == [(False, False)] * 3


def test_everything_is_restored_after_an_error(model: nn.Sequential) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model[1].eval()
    modes = [m.training for m in model.modules()]
    handle = model[6].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        adversarial_examples(model, *data(4), PGD, generator=seeded(0))
    handle.remove()
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_a_training_step_after_it_is_the_same_as_without_it(model: nn.Sequential) -> None:
    images, labels = data()
    other = copy.deepcopy(model)
    adversarial_examples(other, images, labels, PGD, generator=seeded(0))
    for net in (model, other):
        torch.manual_seed(7)  # dropout
        F.cross_entropy(net(images), labels).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_inside_ddp_the_examples_are_those_of_its_network_and_gradients_are_still_reduced(
    model: nn.Sequential, tmp_path: Path
) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rdv", rank=0, world_size=1, timeout=datetime.timedelta(seconds=30)
    )
    try:
        wrapped = DistributedDataParallel(model)
        reduced: list[int] = []

        def count(_, bucket):  # DDP checks annotations, which are text here
            reduced.append(len(bucket.parameters()))
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        images, labels = data()
        expected = adversarial_examples(model, images, labels, PGD, generator=seeded(0))
        for step in (1, 2):
            wrapped.zero_grad()
            examples = adversarial_examples(wrapped, images, labels, PGD, generator=seeded(0))
            if step == 1:
                assert torch.equal(examples, expected)
            F.cross_entropy(wrapped(examples), labels).backward()
            assert sum(reduced) == step * len(list(model.parameters()))
    finally:
        dist.destroy_process_group()


# --- the examples


@pytest.mark.parametrize("text", [text for text in ONE_OF_EACH if not text.startswith("noise")])
def test_examples_raise_the_loss_and_are_plain_images(model: nn.Sequential, text: str) -> None:
    images, labels = data()
    images.requires_grad_()  # must not leak into the result
    examples = adversarial_examples(model, images, labels, AttackSpec.parse(text), generator=seeded(0))
    assert examples.dtype == torch.float32
    assert examples.shape == images.shape
    assert not examples.requires_grad
    assert examples.grad_fn is None
    assert examples.min() >= 0
    assert examples.max() <= 1
    assert examples.data_ptr() != images.data_ptr()
    assert loss_of(model, examples, labels) > loss_of(model, images.detach(), labels) + 0.1


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_they_are_the_registrys_examples_of_the_network_in_eval_mode(model: nn.Sequential, text: str) -> None:
    images, labels = data()
    spec = AttackSpec.parse(text)
    examples = adversarial_examples(model, images, labels, spec, generator=seeded(3))
    expected = run_attack(spec, copy.deepcopy(model).eval(), images, labels, generator=seeded(3))
    assert torch.equal(examples, expected)


def test_no_sample_leaves_early(model: nn.Sequential) -> None:
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    adversarial_examples(model, *data(), AttackSpec.parse("bim:eps=0.3,steps=4"), generator=None)
    assert rows == [24] * 4


@settings(max_examples=25)
@given(
    eps=st.floats(1e-3, 1),
    norm=st.sampled_from(["linf", "l2"]),
    name=st.sampled_from(["bim", "pgd"]),
    seed=st.integers(0, 9),
)
def test_the_budget_is_kept(eps: float, norm: str, name: str, seed: int) -> None:
    images = torch.rand(3, 1, 8, 8, generator=seeded(seed))
    labels = torch.randint(3, (3,), generator=seeded(seed))
    spec = AttackSpec(name=name, eps=eps, norm=norm, steps=2)
    examples = adversarial_examples(network(trained=False), images, labels, spec, generator=seeded(seed))
    delta = (examples.double() - images.double()).flatten(1)
    if norm == "linf":
        assert delta.abs().max() <= eps + 1e-6
    else:
        assert delta.norm(dim=1).max() <= eps * (1 + 1e-5)
    assert 0 <= examples.min() <= examples.max() <= 1


@pytest.mark.parametrize("max_norm", [0.05, 0.3])
def test_ddns_perturbation_is_clipped_to_the_norm_and_keeps_its_direction(
    model: nn.Sequential, max_norm: float
) -> None:
    images, labels = data()
    free = adversarial_examples(model, images, labels, DDN, generator=seeded(0)) - images
    clipped = adversarial_examples(model, images, labels, DDN, generator=seeded(0), max_norm=max_norm) - images
    lengths, short = free.flatten(1).norm(dim=1), clipped.flatten(1).norm(dim=1)
    assert (lengths > max_norm).any()
    assert torch.all(short.double() <= max_norm * (1 + 1e-5))
    torch.testing.assert_close(short, lengths.clamp_max(max_norm), atol=1e-5, rtol=1e-4)
    cosine = F.cosine_similarity(free.flatten(1), clipped.flatten(1))
    assert torch.all(cosine[lengths > 0] > 0.999)


def test_a_perturbation_within_the_norm_stays_as_it_is(model: nn.Sequential) -> None:
    images, labels = data()
    free = adversarial_examples(model, images, labels, DDN, generator=seeded(0))
    limited = adversarial_examples(model, images, labels, DDN, generator=seeded(0), max_norm=100.0)
    torch.testing.assert_close(limited, free, atol=1e-7, rtol=0)  # the sum is rounded once more


def test_the_generator_decides_and_the_global_stream_is_left_alone(model: nn.Sequential) -> None:
    images, labels = data()
    before = torch.get_rng_state()
    a, b, c = (adversarial_examples(model, images, labels, PGD, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_batch(model: nn.Sequential) -> None:
    images, labels = data(4)
    for spec in (PGD, DDN):
        assert adversarial_examples(model, images[:0], labels[:0], spec, generator=None, max_norm=1.0).shape == (
            0,
            1,
            8,
            8,
        )


# --- the contexts that a training loop may call it in


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_under_no_grad(model: nn.Sequential, text: str) -> None:
    images, labels = data()
    spec = AttackSpec.parse(text)
    expected = adversarial_examples(model, images, labels, spec, generator=seeded(0))
    with torch.no_grad():
        assert torch.equal(adversarial_examples(model, images, labels, spec, generator=seeded(0)), expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_under_bfloat16_autocast(model: nn.Sequential, text: str) -> None:
    images, labels = data()
    dtypes: set[torch.dtype] = set()
    model[6].register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        examples = adversarial_examples(model, images, labels, AttackSpec.parse(text), generator=seeded(0))
    assert examples.dtype == torch.float32
    assert examples.isfinite().all()
    if not text.startswith("noise"):
        assert dtypes == {torch.bfloat16}  # the precision of training
        assert loss_of(model, examples, labels) > loss_of(model, images, labels) + 0.1


def test_the_loss_of_a_confident_prediction_has_a_gradient_under_autocast() -> None:
    """In bfloat16 its softmax is exactly 1."""
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 64, generator=seeded(0)))
        layer.bias.copy_(torch.tensor([9.0, 0.0, 0.0]) - layer.weight.sum(1) / 2)
    images, labels = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        examples = adversarial_examples(
            nn.Sequential(nn.Flatten(), layer), images, labels, AttackSpec.parse("fgsm:eps=0.1"), generator=None
        )
    assert torch.all((examples - images).abs() > 0.09)


def test_autocasts_cache_of_weights_is_not_spoilt_for_the_training_pass(model: nn.Sequential) -> None:
    """A cast cached while nothing was differentiable would leave the weights without a gradient."""
    images, labels = data()
    for before in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            clean = F.cross_entropy(model(images).float(), labels) if before else 0.0
            with torch.no_grad():
                examples = adversarial_examples(model, images, labels, DDN, generator=seeded(0))
            loss = clean + F.cross_entropy(model(examples).float(), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model[6].parameters())
        assert model[0].weight.grad is not None


def test_images_of_another_type_or_range_are_refused(model: nn.Sequential) -> None:
    images, labels = data(4)
    for bad in (images.bfloat16(), images + 1, (images * 255).byte()):
        with pytest.raises(ValueError, match="inputs must be"):
            adversarial_examples(model, bad, labels, PGD, generator=None)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), float("inf")])
def test_an_impossible_norm(model: nn.Sequential, max_norm: float) -> None:
    with pytest.raises(ConfigError, match="max_norm is"):
        adversarial_examples(model, *data(4), DDN, generator=None, max_norm=max_norm)


# --- training on them


def test_training_on_them_makes_the_network_withstand_them(model: nn.Sequential) -> None:
    images, labels = data(64, seed=5)
    test, test_labels = data(64, seed=6)
    spec = AttackSpec.parse("fgsm:eps=0.06")

    def accuracy() -> float:
        examples = adversarial_examples(model, test, test_labels, spec, generator=None)
        predicted = copy.deepcopy(model).eval()(examples).argmax(1)
        return (predicted == test_labels).float().mean().item()

    before = accuracy()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        examples = adversarial_examples(model, images, labels, spec, generator=None)
        clean_loss = F.cross_entropy(model(images), labels)
        loss = mixed_loss(clean_loss, F.cross_entropy(model(examples), labels), 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy() > before + 0.1, before


@pytest.mark.parametrize(("share", "expected"), [(0.0, 2.0), (0.25, 3.0), (1.0, 6.0)])
def test_mixed_loss(share: float, expected: float) -> None:
    clean, adversarial = (torch.tensor(v, requires_grad=True) for v in (2.0, 6.0))
    loss = mixed_loss(clean, adversarial, share)
    assert loss.item() == expected
    loss.backward()
    assert clean.grad == 1 - share
    assert adversarial.grad == share


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_mixed_loss_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(ConfigError, match="share is"):
        mixed_loss(torch.tensor(1.0), torch.tensor(1.0), share)
