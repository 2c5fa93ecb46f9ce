"""Classifier, decoder and the sharing between them: shapes, names, storage and seeds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from convolutions import convolutions
from torch import Tensor, nn

from components.config import level_sizes
from components.errors import ConfigError
from components.models.adapter import apply_head, encoder_blocks
from components.models.classifiers import build_classifier
from components.models.decoders import DecodeBlock, HighFrequency
from components.models.defend import DefendNet, classify_with_noise, run_blocks, unit_shapes


def small(channels: int = 1, size: int = 28, width: int = 4, seed: int = 0, **kwargs: object) -> nn.Module:
    return build_classifier(
        "resnet18", num_classes=10, channels=channels, image_size=size, width=width, seed=seed, **kwargs
    )  # type: ignore[arg-type]


def defended(
    shared: int = 4, channels: int = 1, size: int = 28, width: int = 4, seed: int = 0, **kwargs: object
) -> DefendNet:
    classifier = small(channels, size, width, seed, **kwargs)
    return DefendNet(classifier, shared_blocks=shared, sizes=level_sizes(size), channels=channels, seed=seed)


def images(n: int = 2, channels: int = 1, size: int = 28) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def unsettle(net: nn.Module) -> None:
    """Give each weight and batch norm statistic a different value, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for name, b in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(torch.rand(b.shape, generator=generator))


# --- the decoder


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_reconstruction_shapes(shared: int, size: int, channels: int) -> None:
    net = defended(shared, channels, size)
    x = images(3, channels, size)
    expected = [(3, channels, s, s) for s in level_sizes(size)]
    assert [tuple(y.shape) for y in net.autoencoder(x)] == expected
    logits, levels = net.joint(x)
    assert [tuple(y.shape) for y in levels] == expected
    assert tuple(logits.shape) == (3, 10)


@pytest.mark.parametrize("size", [14, 16, 28, 32, 48, 56])
def test_every_level_comes_out_at_its_size(size: int) -> None:
    net = defended(channels=1, size=size)
    assert [y.shape[-1] for y in net.autoencoder(images(1, 1, size))] == list(level_sizes(size))


@pytest.mark.parametrize("size", [15, 30, 31])
def test_a_size_that_stride_2_does_not_mirror_is_refused(size: int) -> None:
    """Every output has the size of its level."""
    with pytest.raises(ConfigError, match=r"data\.image_size is \d+; it must be a size "):
        defended(channels=1, size=size)


@pytest.mark.parametrize(("size", "levels"), [(28, 2), (32, 2), (56, 2), (56, 3)])
def test_fewer_levels_than_the_rule_allows(size: int, levels: int) -> None:
    net = DefendNet(small(size=size), shared_blocks=4, sizes=level_sizes(size, levels), channels=1)
    assert [y.shape[-1] for y in net.autoencoder(images(1, 1, size))] == [size // 2**m for m in range(levels)]


def test_what_the_encoder_has_no_map_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pyramids\.levels is 5.*at most 4"):
        DefendNet(small(size=32), shared_blocks=4, sizes=(32, 16, 8, 4, 2), channels=1)
    for shared in (0, 5):
        with pytest.raises(ConfigError, match=rf"train\.shared_blocks is {shared};.*1 to 4"):
            defended(shared)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_u_mirrors_its_stage(channels: int, size: int) -> None:
    """U is the stage's convolutions in reverse and a stride-2 transposed convolution, from image to image."""
    w, c = 4, channels
    up = defended(channels=c, size=size, width=w).autoencoder.decoder.up
    # Stage 0 is the stem and layer1 with five convolutions, stage 1 is layer2 with four.
    assert convolutions(up[0]) == [
        ("C", c, w, 3, 1),
        ("C", w, w, 3, 1),
        ("C", w, w, 3, 1),
        ("C", w, w, 3, 1),
        ("T", w, c, 3, 2),
    ]
    assert convolutions(up[1]) == [
        ("C", c, 2 * w, 3, 1),
        ("C", 2 * w, 2 * w, 3, 1),
        ("C", 2 * w, 2 * w, 3, 1),
        ("T", 2 * w, c, 3, 2),
    ]


def test_h_is_a_two_layer_residual_block() -> None:
    w = 4
    high = defended(channels=3, size=32, width=w).autoencoder.decoder.high
    for m, features in enumerate((w, 2 * w)):
        block = high[m]
        assert isinstance(block, HighFrequency)
        assert convolutions(block) == [("C", features, features, 3, 1), ("C", features, 3, 3, 1)]
        assert (block.skip.kernel_size, block.skip.in_channels, block.skip.out_channels) == ((1, 1), features, 3)


@pytest.mark.parametrize(("size", "bottom_sizes"), [(28, [4, 7, 7]), (32, [4, 8, 8])])
def test_bottom_mirrors_layer4_then_layer3(size: int, bottom_sizes: list[int]) -> None:
    w = 4
    net = defended(channels=3, size=size, width=w)
    bottom = net.autoencoder.decoder.bottom
    assert [convolutions(block) for block in bottom] == [
        [("C", 8 * w, 8 * w, 3, 1)] * 3 + [("T", 8 * w, 4 * w, 3, 2)],
        # No doubling follows, so the stride is 1. The last layer reduces the channels to the image's.
        [("C", 4 * w, 4 * w, 3, 1)] * 3 + [("C", 4 * w, 3, 3, 1)],
    ]
    x = run_blocks(net.autoencoder.encoder, images(1, 3, size))[-1]
    sizes = [x.shape[-1]]
    for block in bottom:
        x = block(x)
        sizes.append(x.shape[-1])
    assert sizes == bottom_sizes


def test_equation_2() -> None:
    """image_m = U(image_{m+1}) + H(E_m), and the smallest image is D(latent)."""
    net = defended(channels=3, size=32).eval()
    unsettle(net)
    decoder, x = net.autoencoder.decoder, images(2, 3, 32)
    features = run_blocks(net.autoencoder.encoder, x)
    levels = net.autoencoder(x)
    torch.testing.assert_close(levels[2], decoder.bottom(features[3]), rtol=0, atol=0)
    for m in (0, 1):
        expected = decoder.up[m](levels[m + 1]) + decoder.high[m](features[m])
        torch.testing.assert_close(levels[m], expected, rtol=0, atol=0)


def test_nothing_is_activated_after_the_last_convolutions() -> None:
    """With these weights U, H and D end in a large negative constant, which every level must show."""
    net = defended(channels=3, size=32).eval()
    decoder = net.autoencoder.decoder
    with torch.no_grad():
        for p in decoder.parameters():
            p.zero_()
        for m in (0, 1):
            decoder.high[m].conv2.bias.fill_(-100.0 * (m + 1))
        decoder.up[0][-1].conv.bias.fill_(-7.0)
        decoder.up[1][-1].conv2.bias.fill_(-5.0)
        decoder.bottom[-1][-1].conv2.bias.fill_(-300.0)
    levels = net.autoencoder(images(2, 3, 32))
    for level, value in zip(levels, (-107.0, -205.0, -300.0), strict=True):
        torch.testing.assert_close(level, torch.full_like(level, value))


def test_no_batch_norm_after_the_last_convolutions() -> None:
    decoder = defended(channels=3, size=32).autoencoder.decoder
    for block in (decoder.up[1][-1], decoder.bottom[-1][-1]):
        assert isinstance(block, DecodeBlock)
        assert isinstance(block.bn2, nn.Identity)
    # Inside the decoder, features do pass an activation.
    assert isinstance(decoder.bottom[0][-1].bn2, nn.BatchNorm2d)


def test_each_level_reads_its_own_encoder_map() -> None:
    net = defended(channels=3, size=32).eval()
    unsettle(net)
    features = [f.detach().requires_grad_() for f in run_blocks(net.autoencoder.encoder, images(1, 3, 32))]
    levels = net.autoencoder.decode(features)
    read = [
        [g is not None for g in torch.autograd.grad(level.sum(), features, allow_unused=True, retain_graph=True)]
        for level in levels
    ]
    # The columns are E_0, E_1, E_2 and the latent. No level reads E_2, the stack's inner map (Fig. 4).
    assert read == [[True, True, False, True], [False, True, False, True], [False, False, False, True]]


# --- sharing


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
def test_sharing_is_of_storage_and_the_rest_is_a_copy(shared: int) -> None:
    net = defended(shared, channels=3, size=32)
    for i, (ours, reference) in enumerate(zip(encoder_blocks(net.classifier), net.autoencoder.encoder, strict=True)):
        pairs = list(zip(ours.state_dict().values(), reference.state_dict().values(), strict=True))
        assert len(pairs) > 10
        for a, b in pairs:
            assert (a.data_ptr() == b.data_ptr()) == (i < shared)
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    in_both = {id(p) for p in net.classifier.parameters()} & {id(p) for p in net.autoencoder.parameters()}
    assert in_both == {id(p) for b in encoder_blocks(net.classifier)[:shared] for p in b.parameters()}


def test_a_change_of_a_shared_weight_is_seen_by_both_and_of_an_own_one_by_one() -> None:
    net = defended(2, channels=3, size=32).eval()
    x = images(2, 3, 32)
    before = net.classifier(x), net.autoencoder(x)[0]
    with torch.no_grad():
        net.classifier.layer3[0].conv1.weight.mul_(2)
    assert not torch.equal(net.classifier(x), before[0])
    assert torch.equal(net.autoencoder(x)[0], before[1])
    with torch.no_grad():
        net.classifier.layer2[0].conv1.weight.mul_(2)
    assert not torch.equal(net.autoencoder(x)[0], before[1])


@pytest.mark.parametrize("shared", [1, 2, 3, 4])
@pytest.mark.parametrize("mean", [(), (0.4, 0.5, 0.6)])
def test_joint_is_the_classifier_and_the_autoencoder(shared: int, mean: tuple[float, ...]) -> None:
    net = defended(shared, channels=3, size=32, mean=mean, std=mean).eval()
    unsettle(net)
    x = images(3, 3, 32)
    logits, levels = net.joint(x)
    assert torch.equal(logits, net.classifier(x))
    for a, b in zip(levels, net.autoencoder(x), strict=True):
        assert torch.equal(a, b)


def test_joint_runs_the_shared_blocks_once() -> None:
    """In training mode a second run would update the batch norm statistics twice."""
    for shared in (1, 4):
        net = defended(shared, channels=3, size=32).train()
        net.joint(images(4, 3, 32))
        counts = {n: int(b) for n, b in net.state_dict().items() if n.endswith("num_batches_tracked")}
        assert set(counts.values()) == {1}


def test_building_the_defense_changes_nothing_in_the_classifier() -> None:
    """Measuring the maps runs a blank image, which may change neither statistics nor mode."""
    for training in (True, False):
        classifier = small().train(training)
        before = {k: v.clone() for k, v in classifier.state_dict().items()}
        DefendNet(classifier, shared_blocks=4, sizes=level_sizes(28), channels=1)
        assert classifier.training is training
        for k, v in classifier.state_dict().items():
            assert torch.equal(v, before[k]), k


def test_unit_shapes() -> None:
    shapes = unit_shapes(small(3, 32), 3, 32)
    assert [(s.depth, s.in_channels, s.out_channels, s.size) for s in shapes] == [
        (2, 4, 4, 32),
        (2, 4, 8, 16),
        (2, 8, 16, 8),
        (2, 16, 32, 4),
    ]


def test_blocks_and_head_are_the_classifier() -> None:
    classifier = small(3, 32, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).eval()
    unsettle(classifier)
    x = images(2, 3, 32)
    latent = run_blocks(encoder_blocks(classifier), x)[-1]
    assert torch.equal(apply_head(classifier, latent), classifier(x))
    assert torch.equal(classify_with_noise(classifier, x, None), classifier(x))
    assert torch.equal(classify_with_noise(classifier, x, lambda z: z + 1), apply_head(classifier, latent + 1))


# --- torchvision's names


def torchvision_small(channels: int, width: int) -> nn.Module:
    """Build ResNet-18 with a 3x3 stem and without max-pool from torchvision alone."""
    net = torchvision.models.resnet18(num_classes=10)
    assert width == 64
    net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Linear(512, 10)
    return net


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_a_small_network_loads_into_torchvisions(channels: int, size: int) -> None:
    ours = small(channels, size, width=64).eval()
    unsettle(ours)
    reference = torchvision_small(channels, 64).eval()
    assert list(ours.state_dict()) == list(torchvision.models.resnet18().state_dict())
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = images(2, channels, size)
    with torch.no_grad():
        assert torch.equal(ours(x), reference(x))


def test_the_standard_network_is_torchvisions() -> None:
    reference = torchvision.models.resnet18().eval()
    unsettle(reference)
    ours = build_classifier("resnet18", num_classes=1000, channels=3, image_size=224, seed=3).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = images(1, 3, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), reference(x))
    other = torchvision.models.resnet18()
    other.load_state_dict(ours.state_dict(), strict=True)
    for k, v in reference.state_dict().items():
        assert torch.equal(other.state_dict()[k], v), k


def test_the_standard_networks_initial_weights_are_torchvisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        reference = torchvision.models.resnet18()
    ours = build_classifier("resnet18", num_classes=1000, channels=3, image_size=224, seed=6)
    for k, v in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[k], v), k


def test_width_and_depth_of_a_narrow_network() -> None:
    """A narrow network differs from torchvision's only in its channels."""
    ours, reference = small(3, 32, width=8), torchvision_small(3, 64)
    for (name, a), (other, b) in zip(ours.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other
        shape = [n // 8 if n in (64, 128, 256, 512) else n for n in b.shape]
        assert list(a.shape) == shape, name
    strides = [[m.stride for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, reference)]
    assert strides[0] == strides[1]


def test_stem_changes_at_64_pixels() -> None:
    for size, kernel in ((63, 3), (64, 7)):
        net = small(1, size)
        assert net.conv1.kernel_size == (kernel, kernel)
        assert isinstance(net.maxpool, nn.Identity) == (kernel == 3)


def test_normalisation_is_inside_and_has_no_key() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    plain, inside = small(3, 32).eval(), small(3, 32, mean=mean, std=std).eval()
    assert list(plain.state_dict()) == list(inside.state_dict())
    inside.load_state_dict(plain.state_dict(), strict=True)
    x = images(2, 3, 32)
    by_hand = torchvision.transforms.functional.normalize(x, list(mean), list(std))
    assert torch.equal(inside(x), plain(by_hand))
    assert not torch.equal(inside(x), plain(x))
    # The auto-encoder's first block normalises as well.
    net = defended(1, channels=3, size=32, mean=mean, std=std).eval()
    first = encoder_blocks(plain)[0]
    assert torch.equal(net.autoencoder.encoder[0](x), first(by_hand))


def test_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match=r"train\.arch is 'vgg99'.*resnet18"):
        build_classifier("vgg99", num_classes=10, channels=1, image_size=28)


# --- the seed


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = defended(2, seed=3)
    torch.manual_seed(2)
    torch.rand(7)
    before = torch.get_rng_state()
    second = defended(2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)
    third = defended(2, seed=4)
    for part in ("classifier", "autoencoder"):
        assert not same(getattr(first, part), getattr(third, part))
    # Every drawn weight differs, not only some.
    for (name, a), b in zip(first.named_parameters(), third.parameters(), strict=True):
        if name.endswith("weight") and a.ndim > 1:
            assert not torch.equal(a, b), name


def test_the_defense_does_not_change_the_classifiers_weights() -> None:
    for shared in (1, 4):
        assert same(small(seed=11), defended(shared, seed=11).classifier)


def test_the_decoder_does_not_depend_on_what_is_shared() -> None:
    for a, b in itertools.pairwise(defended(s, seed=2).autoencoder.decoder for s in (1, 2, 3, 4)):
        assert same(a, b)
