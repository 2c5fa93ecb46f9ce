"""ComDefend: the paper's shapes, its loss by hand, its bits, and the gradient of an attack through them."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable

import comdefend_reference as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.pgd import pgd
from components.errors import ConfigError
from components.models.comdefend import ComDefend, Reformed

CODE_CHANNELS = {1: 4, 3: 12}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(sigma: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    generator = seeded(seed)
    return lambda code: code + sigma * torch.randn(code.shape, generator=generator)


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of four classes, each with its own dark and bright pixels, under uniform noise."""
    patterns = torch.rand(4, 1, 8, 8, generator=seeded(99)).round()
    g = seeded(seed)
    labels = torch.randint(4, (n,), generator=g)
    return 0.2 * torch.rand(n, 1, 8, 8, generator=g) + 0.2 + 0.4 * patterns[labels], labels


def channels_of(network: nn.Module) -> list[int]:
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all((c.kernel_size, c.padding, c.stride) == ((3, 3), (1, 1), (1, 1)) for c in convs)
    assert all(a.out_channels == b.in_channels for a, b in itertools.pairwise(convs))
    return [convs[0].in_channels, *(c.out_channels for c in convs)]


# --- the networks


def test_the_papers_shapes() -> None:
    rgb, grey = ComDefend(3), ComDefend(1)
    assert channels_of(rgb.com) == [3, 16, 32, 64, 128, 256, 128, 64, 32, 12]
    assert channels_of(rgb.rec) == [12, 32, 64, 128, 256, 128, 64, 32, 16, 3]
    assert channels_of(grey.com) == [1, 32, 64, 128, 256, 128, 64, 64, 32, 4]
    assert channels_of(grey.rec) == [4, 32, 64, 128, 256, 128, 64, 64, 32, 1]
    for network in (rgb.com, rgb.rec, grey.com, grey.rec):
        assert [type(m) for m in network] == [nn.Conv2d, nn.ELU] * 8 + [nn.Conv2d]


def test_a_smaller_width_scales_hidden_channels_only() -> None:
    assert channels_of(ComDefend(3, width=16).com) == [3, 4, 8, 16, 32, 64, 32, 16, 8, 12]
    assert channels_of(ComDefend(3, width=1).rec) == [12, 4, 4, 4, 4, 4, 4, 4, 4, 3]
    assert channels_of(ComDefend(1, width=24).com) == [1, 12, 24, 48, 96, 48, 24, 24, 12, 4]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_what_goes_in_and_comes_out(channels: int, size: tuple[int, int]) -> None:
    model = ComDefend(channels, width=4)
    images = torch.rand(2, channels, *size, generator=seeded(0))
    out = model(images)
    assert model.encode(images).shape == (2, CODE_CHANNELS[channels], *size)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_the_seed_alone_decides_the_initial_weights() -> None:
    before = torch.get_rng_state()
    a, b, c = (ComDefend(1, width=4, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["com.0.weight"], c["com.0.weight"])


@pytest.mark.parametrize(("channels", "width", "seed"), [(1, 8, 0), (1, 8, 1), (1, 16, 2), (3, 8, 3)])
def test_the_code_begins_on_the_scale_of_the_noise(channels: int, width: int, seed: int) -> None:
    images = torch.rand(8, channels, 8, 8, generator=seeded(0)).round()
    rms = ComDefend(channels, width=width, seed=seed).encode(images).square().mean().sqrt()
    assert 2 < rms < 40


@pytest.mark.parametrize(
    "bad", [{"channels": 2}, {"channels": 0}, {"width": 0}, {"sigma": 0.0}, {"sigma": float("nan")}]
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"comdefend.{next(iter(bad))} is"):
        ComDefend(**{"channels": 1, "width": 4, **bad})  # type: ignore[arg-type]


# --- training


def test_the_loss_by_hand() -> None:
    model = ComDefend(1, width=4)
    images = torch.rand(3, 1, 8, 8, generator=seeded(0))
    loss, terms = model.training_loss(images, gaussian(20.0))
    code = model.com(images - 0.5)
    bits = torch.sigmoid(code + 20.0 * torch.randn(code.shape, generator=seeded(0)))
    mse = (torch.sigmoid(model.rec(bits)) - images).square().mean()
    torch.testing.assert_close(terms["loss_rec"], mse)
    torch.testing.assert_close(terms["bit_power"], bits.square().mean())
    torch.testing.assert_close(loss, mse + 1e-4 * bits.square().mean())
    assert torch.equal(terms["loss"], loss)
    assert not any(term.requires_grad for term in terms.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("case", reference.CASES)
def test_the_loss_is_that_of_the_published_code(case: str) -> None:
    """Compare loss and gradients with what the authors' own ``train`` printed for these weights, images and noise."""
    published = json.loads(reference.FIGURES.read_text())[case]
    model = ComDefend(3, width=64, sigma=reference.SIGMA)
    reference.fill(model.com, model.rec, case)
    images, noise = reference.images_and_noise(case)
    loss, _ = model.training_loss(images, lambda code: code - reference.SIGMA * noise)
    loss.backward()
    assert loss.item() == pytest.approx(published["loss"], rel=1e-5)
    for network in ("com", "rec"):
        ours = reference.gradient_norms(getattr(model, network))
        np.testing.assert_allclose(ours, published[network], rtol=1e-3, atol=1e-10)


def test_without_a_noise_function_the_global_stream_is_used_with_sigma() -> None:
    images = torch.rand(3, 1, 8, 8, generator=seeded(0))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        own, _ = ComDefend(1, width=4, sigma=3.0).training_loss(images)
    given, _ = ComDefend(1, width=4, sigma=3.0).training_loss(images, gaussian(3.0, seed=5))
    other, _ = ComDefend(1, width=4, sigma=3.0).training_loss(images, gaussian(20.0, seed=5))
    assert torch.equal(own, given)
    assert not torch.equal(own, other)


def test_under_bfloat16_autocast_loss_and_images_are_float32() -> None:
    model = ComDefend(1, width=4)
    images = torch.rand(2, 1, 8, 8, generator=seeded(0))
    exact, _ = model.training_loss(images, gaussian(20.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.training_loss(images, gaussian(20.0))
        out = model(images)
    assert loss.dtype == out.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


def trained(module: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], steps: int, lr: float) -> None:
    images, labels = data(256, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    choice = seeded(0)
    for _ in range(steps):
        rows = torch.randint(256, (16,), generator=choice)
        optimizer.zero_grad()
        loss_of(images[rows], labels[rows]).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def defended() -> Reformed:
    """Train both parts in two seconds, each on clean images."""
    reformer = ComDefend(1, width=8)
    noise = gaussian(reformer.sigma)
    trained(reformer, lambda images, _: reformer.training_loss(images, noise)[0], steps=160, lr=2e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    trained(classifier, lambda images, labels: F.cross_entropy(classifier(images), labels), steps=60, lr=0.01)
    return Reformed(reformer, classifier).eval().requires_grad_(False)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_training_reconstructs_through_bits_and_keeps_the_accuracy(defended: Reformed) -> None:
    images, labels = data(48, seed=1)
    assert F.mse_loss(defended.reformer(images), images) < images.var() / 2
    assert accuracy(defended.classifier, images, labels) > 0.95
    assert accuracy(defended, images, labels) > 0.95


def test_the_penalty_leaves_codes_free_to_outgrow_the_noise(defended: Reformed) -> None:
    """A penalty on the linear code holds 96 % of the codes within sigma of 0, where the noise decides the bits."""
    assert isinstance(defended.reformer, ComDefend)
    images, _ = data(48, seed=1)
    code = defended.reformer.encode(images)
    assert (code.abs() < defended.reformer.sigma).float().mean() < 0.5
    assert code.square().mean().sqrt() > 2 * defended.reformer.sigma


# --- bits, and the gradient through them


@pytest.fixture(params=["untrained", "trained"])
def reformer(request: pytest.FixtureRequest, defended: Reformed) -> ComDefend:
    if request.param == "untrained":
        return ComDefend(1, width=8, seed=1).requires_grad_(False)
    assert isinstance(defended.reformer, ComDefend)
    return defended.reformer


def test_forward_is_exactly_the_binarised_reconstruction_in_either_mode(reformer: ComDefend) -> None:
    images, _ = data(8, seed=2)
    with torch.no_grad():
        code = reformer.com(images - 0.5)
        expected = torch.sigmoid(reformer.rec((code > 0).float()))
    seen: list[Tensor] = []
    handle = reformer.rec.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for mode in (True, False):
        copied = images.clone().requires_grad_(mode)
        assert torch.equal(copy.deepcopy(reformer).train(mode)(copied).detach(), expected)
        assert torch.equal(reformer(copied).detach(), expected)
    handle.remove()
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}


def test_the_gradient_reaches_every_image(reformer: ComDefend) -> None:
    images, _ = data(8, seed=2)
    images.requires_grad_()
    target = 1 - images.detach()
    (gradient,) = torch.autograd.grad(F.mse_loss(reformer(images), target, reduction="sum"), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.99
    assert torch.all(gradient.flatten(1).norm(dim=1) > 1e-4)


def test_the_gradient_is_the_surrogates(reformer: ComDefend) -> None:
    images, _ = data(4, seed=2)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reformer(images).sum(), images)
    code = reformer.com(images - 0.5)
    bits = (code > 0).float().requires_grad_()
    (upstream,) = torch.autograd.grad(reformer.decode(bits).sum(), bits)
    slope = (1 + code.detach().abs() / (20 / 3)).pow(-2)  # sigma / 3
    (expected,) = torch.autograd.grad(code, images, upstream * slope)
    torch.testing.assert_close(gradient, expected)


def white_box(model: Reformed, forward: Callable[[Tensor], Tensor] | None = None) -> float:
    """Return the model's accuracy under PGD through ``forward`` in place of the reformer's own."""
    images, labels = data(48, seed=1)
    attacked: nn.Module = model
    if forward is not None:
        attacked = Reformed(nn.Identity(), model.classifier)
        attacked.reformer.forward = forward  # type: ignore[method-assign]
    return accuracy(model, pgd(attacked, images, labels, eps=0.15, steps=10, generator=seeded(0)), labels)


def test_an_attack_through_it_beats_one_made_on_the_classifier(defended: Reformed) -> None:
    images, labels = data(48, seed=1)
    examples = pgd(defended.classifier, images, labels, eps=0.15, steps=10, generator=seeded(0))
    grey_box = accuracy(defended, examples, labels)
    assert (
        accuracy(defended.classifier, examples, labels) < 0.8
    )  # The examples fool the network that they were made on.
    assert white_box(defended) < grey_box - 0.2


def test_the_surrogate_outlives_the_sigmoid_where_codes_are_large(defended: Reformed) -> None:
    """Training moves the code to where the float32 sigmoid is flat. The surrogate still has a slope there."""
    reformer = defended.reformer
    assert isinstance(reformer, ComDefend)
    images, _ = data(48, seed=1)
    code = reformer.encode(images)
    sigmoid = torch.sigmoid(code)
    assert (sigmoid * (1 - sigmoid) == 0).float().mean() > 0.2
    assert torch.all((1 + code.abs() / reformer.surrogate_width).pow(-2) > 1e-5)

    def through_sigmoid(x: Tensor) -> Tensor:
        return reformer.decode(torch.sigmoid(reformer.encode(x)))

    assert white_box(defended) <= white_box(defended, through_sigmoid) - 0.2


def test_reformed_is_one_model() -> None:
    reformer = ComDefend(3, width=4)
    classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5))
    model = Reformed(reformer, classifier).eval()
    assert not any(m.training for m in (reformer, classifier, classifier[1]))
    images = torch.rand(2, 3, 8, 8, generator=seeded(0))
    assert torch.equal(model(images), classifier(reformer(images)))
    assert torch.equal(model(images), model(images))
