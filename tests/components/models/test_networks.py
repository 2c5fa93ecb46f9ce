"""Every network with every decoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from network_cases import ALL, BLOCKS, DECODERS, images, small, unsettle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from components.config import level_sizes
from components.models.adapter import apply_head, encoder_blocks, encoder_units
from components.models.adapter_check import check_adapter
from components.models.defend import DefendNet, classify_with_noise, run_blocks, run_units, unit_shapes

SIZES = (28, 32, 64, 224)


# This Latin square pairs every network, decoder and size with each other.
PAIRWISE = [
    (arch, decoder, SIZES[(a + d) % 4], (1, 3)[(a + d // 2) % 2], 1 + (a + 3 * d) % BLOCKS[arch])
    for a, arch in enumerate(ALL)
    for d, decoder in enumerate(DECODERS)
]


def test_the_cases_are_pairwise() -> None:
    for i, j, values in ((0, 1, (ALL, DECODERS)), (0, 2, (ALL, SIZES)), (1, 2, (DECODERS, SIZES))):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(*values))
    assert {(case[1], case[3]) for case in PAIRWISE} == set(itertools.product(DECODERS, (1, 3)))
    for arch in ALL:
        assert {1, BLOCKS[arch]} & {case[4] for case in PAIRWISE if case[0] == arch}


@pytest.mark.parametrize(("arch", "decoder", "size", "channels", "shared"), PAIRWISE)
def test_every_network_with_every_decoder(arch: str, decoder: str, size: int, channels: int, shared: int) -> None:
    classifier = small(arch, size, channels)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    sizes = level_sizes(size)
    net = DefendNet(classifier, shared_blocks=shared, sizes=sizes, channels=channels, decoder=decoder)

    # The classifier is unchanged.
    assert list(classifier.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())

    # Shared blocks share their storage. The others are copies.
    blocks = encoder_blocks(classifier)
    assert len(blocks) == len(net.autoencoder.encoder) == BLOCKS[arch]
    for i, (block, copied) in enumerate(zip(blocks, net.autoencoder.encoder, strict=True)):
        pairs = list(zip(block.state_dict().values(), copied.state_dict().values(), strict=True))
        assert pairs
        for a, b in pairs:
            assert (a.data_ptr() == b.data_ptr()) == (i < shared)
            assert torch.equal(a, b)

    # Every level has its size, and every parameter a gradient.
    x = images(3 if size < 224 else 2, channels, size)
    levels = net.autoencoder(x)
    assert [tuple(y.shape) for y in levels] == [(len(x), channels, s, s) for s in sizes]
    torch.stack([y.square().mean() for y in levels]).sum().backward()
    for name, p in net.autoencoder.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name

    # joint() returns what the classifier and the auto-encoder return.
    net.eval()
    with torch.no_grad():
        logits, levels = net.joint(x)
        assert tuple(logits.shape) == (len(x), 10)
        torch.testing.assert_close(logits, classifier(x), rtol=1e-5, atol=1e-6)
        for a, b in zip(levels, net.autoencoder(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ALL)
def test_taps_are_not_changed_by_what_follows(arch: str) -> None:
    """In-place ReLUs do not change the maps that a decoder reads."""
    net = DefendNet(small(arch), shared_blocks=2, sizes=level_sizes(32), channels=3).eval()
    x = images()
    with torch.no_grad():
        outputs, y = [], x.clone()
        for units in encoder_units(net.classifier):
            for unit in units:
                y = unit(y.clone()).clone()
                outputs.append(y)
        features = run_units(net.autoencoder.encoder, x)
        net.joint(x)
        last_shared = sum(len(units) for units in encoder_units(net.classifier)[:2]) - 1
        run_blocks(encoder_blocks(net.classifier)[2:], features[last_shared])  # joint() does the same.
        for a, b in zip(features, outputs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("mean", [(), (0.4, 0.5, 0.6)])
def test_inference_costs_what_the_bare_network_costs(arch: str, mean: tuple[float, ...]) -> None:
    def flops(net: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(images(1))
        return counter.get_total_flops()

    bare = small(arch).eval()
    net = DefendNet(small(arch, mean=mean, std=mean), shared_blocks=4, sizes=level_sizes(32), channels=3).eval()
    assert flops(net.classifier) == flops(bare) > 0
    assert list(net.classifier.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("size", [28, 64])
def test_blocks_and_head_are_the_network(arch: str, size: int) -> None:
    """Our networks pass check_adapter, also with normalisation."""
    net = small(arch, size, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    unsettle(net)
    next(iter(net.children())).eval()  # A part in eval mode stays in it.
    modes = [m.training for m in net.modules()]
    check_adapter(net, 3, size, 10)
    unit_shapes(net, 3, size)
    assert [m.training for m in net.modules()] == modes
    x = images(2, 3, size)
    net.eval()
    with torch.no_grad():
        latent = run_blocks(encoder_blocks(net), x)[-1]
        torch.testing.assert_close(apply_head(net, latent), net(x), rtol=1e-5, atol=1e-7)
        noisy = classify_with_noise(net, x, lambda z: z + 1)
        torch.testing.assert_close(noisy, apply_head(net, latent + 1), rtol=1e-5, atol=1e-7)
