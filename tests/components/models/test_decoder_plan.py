"""The decoders built from an encoder's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolutions import convolutions
from network_cases import BLOCKS, DECODERS, images, shapes, small
from torch import Tensor, nn

from components.config import level_sizes
from components.errors import ConfigError
from components.models.decoder_plan import plan_decoder, stages_of
from components.models.decoders import DecodeBottleneck, DecodeConv, HourglassDecoder, build_decoder
from components.models.defend import DefendNet


@pytest.mark.parametrize(
    ("arch", "size", "units", "stages", "taps"),
    [
        # The columns are the sizes of the units' maps, those of the stages, and the units that the levels read.
        ("resnet18", 28, [28, 14, 7, 4], [28, 14, 7, 4], (0, 1)),
        ("resnet18", 64, [32, 16, 8, 4, 2], [32, 16, 8, 4, 2], (0, 0, 1)),
        ("resnet50", 224, [112, 56, 28, 14, 7], [112, 56, 28, 14, 7], (0, 0, 1)),
        ("vgg16", 28, [28, 14, 14, 7, 7, 4, 4, 2, 2, 1], [14, 7, 4, 2, 1], (0, 2)),
        ("vgg16_bn", 32, [32, 16, 16, 8, 8, 4, 4, 2, 2, 1], [16, 8, 4, 2, 1], (0, 2)),
        ("vgg16", 224, [224, 112, 112, 56, 56, 28, 28, 14, 14, 7], [112, 56, 28, 14, 7], (0, 2, 4)),
    ],
)
def test_stages_and_taps(arch: str, size: int, units: list[int], stages: list[int], taps: tuple[int, ...]) -> None:
    measured = shapes(arch, size)
    assert [u.size for u in measured] == units
    assert [s.size for s in stages_of(measured, size)] == stages
    assert plan_decoder(measured, level_sizes(size)).taps == taps


def pyramid(arch: str, size: int, width: int = 4, levels: int = 0) -> Any:
    with torch.device("meta"):
        return build_decoder("pyramid", shapes(arch, size, width), level_sizes(size, levels), 3)


def test_vgg_is_mirrored_by_a_chain() -> None:
    decoder = pyramid("vgg16", 32)
    assert convolutions(decoder.up[0]) == [("C", 3, 4, 3, 1), ("T", 4, 3, 3, 2)]
    assert convolutions(decoder.up[1]) == [("C", 3, 8, 3, 1), ("T", 8, 3, 3, 2)]
    # The latent grows 1 -> 2 -> 4 -> 8. The last layer reduces the channels to the image's.
    assert [convolutions(b) for b in decoder.bottom] == [
        [("C", 32, 32, 3, 1)] * 2 + [("T", 32, 32, 3, 2)],
        [("C", 32, 32, 3, 1)] * 2 + [("T", 32, 16, 3, 2)],
        [("C", 16, 16, 3, 1)] * 2 + [("T", 16, 3, 3, 2)],
    ]
    assert isinstance(decoder.bottom[-1][-1].bn, nn.Identity)
    assert isinstance(decoder.bottom[0][-1].bn, nn.BatchNorm2d)


def test_resnet50_is_mirrored_by_bottlenecks() -> None:
    decoder = pyramid("resnet50", 32)
    blocks = [m for m in decoder.up[1] if isinstance(m, DecodeBottleneck)]
    assert len(blocks) == len(decoder.up[1]) == 4
    assert convolutions(decoder.up[1][0]) == [("C", 3, 8, 1, 1), ("C", 8, 8, 3, 1), ("C", 8, 32, 1, 1)]
    assert convolutions(decoder.up[1][-1]) == [("C", 32, 8, 1, 1), ("T", 8, 8, 3, 2), ("C", 8, 3, 1, 1)]
    assert [len(b) for b in decoder.bottom] == [3, 6]


def test_a_stem_of_its_own_at_224() -> None:
    """From 64 pixels on, the stem halves the size before layer1. It is stage 0, from image to image."""
    decoder = pyramid("resnet18", 224)
    assert convolutions(decoder.up[0]) == [("C", 3, 4, 3, 1), ("T", 4, 3, 3, 2)]
    assert isinstance(decoder.up[0][-1], DecodeConv)
    assert convolutions(decoder.up[1]) == [("C", 3, 4, 3, 1), *[("C", 4, 4, 3, 1)] * 2, ("T", 4, 3, 3, 2)]
    # Level 0 has no map, so it reads the next smaller one, doubled. The others read a map of their size.
    assert convolutions(decoder.high[0]) == [("T", 4, 4, 3, 2), ("C", 4, 4, 3, 1), ("C", 4, 3, 3, 1)]
    assert convolutions(decoder.high[1]) == [("C", 4, 4, 3, 1), ("C", 4, 3, 3, 1)]
    assert [len(b) for b in decoder.bottom] == [2, 2]  # layer4, then layer3: 7 -> 14 -> 28


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 28), ("resnet50", 64), ("vgg16", 32)])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("levels", [1, 2])
def test_fewer_levels(arch: str, size: int, decoder: str, levels: int) -> None:
    """With one level, D_0 is the whole decoder and reads only the latent."""
    net = DefendNet(
        small(arch, size), shared_blocks=4, sizes=level_sizes(size, levels), channels=3, decoder=decoder
    ).eval()
    with torch.no_grad():
        assert [y.shape[-1] for y in net.autoencoder(images(1, 3, size))] == [size, size // 2][:levels]


@pytest.mark.parametrize("size", [15, 30, 31, 36, 44, 50, 60, 66, 72, 100, 130, 256])
@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_other_sizes_fit_or_are_refused(arch: str, size: int) -> None:
    """Every reconstruction has the size of its level."""
    with torch.device("meta"):
        classifier = small(arch, size)
        if size % 2 ** (len(level_sizes(size)) - 1):  # A level of an odd size has a level below it.
            with pytest.raises(ConfigError, match=rf"^data\.image_size is {size}; it must be a size "):
                DefendNet(classifier, shared_blocks=1, sizes=level_sizes(size), channels=3)
            return
        net = DefendNet(classifier, shared_blocks=1, sizes=level_sizes(size), channels=3)
        levels = net.autoencoder.eval()(torch.zeros(1, 3, size, size))
    assert [tuple(y.shape[2:]) for y in levels] == [(s, s) for s in level_sizes(size)]


def test_hourglasses_differ_in_the_connection_alone() -> None:
    units, sizes = shapes("resnet18", 32, 4), (32, 16, 8)
    plain, concat, add = (build_decoder(k, units, sizes, 3) for k in DECODERS[1:])
    for d in (plain, concat, add):
        assert isinstance(d, HourglassDecoder)
        # Features between the levels have the channels of the encoder's maps. Each level has a 1x1 image head.
        assert [u[-1].conv.out_channels if m == 0 else u[-1].conv2.out_channels for m, u in enumerate(d.up)] == [4, 8]
        assert all((h.kernel_size, h.out_channels) == ((1, 1), 3) for h in d.heads)
    assert [h.in_channels for h in plain.heads] == [4, 8, 8]
    assert [h.in_channels for h in concat.heads] == [8, 16, 8]
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in add.state_dict().items()}
    assert convolutions(plain.up[0])[0][1] == 8
    assert convolutions(concat.up[0])[0][1] == 16

    features = [torch.rand(2, u.out_channels, u.size, u.size) for u in units]
    add.load_state_dict(plain.state_dict())
    for d in (plain, concat, add):
        d.eval()
    plain_outputs, summed = plain(features, features[-1]), add([torch.zeros_like(f) for f in features], features[-1])
    assert all(torch.equal(a, b) for a, b in zip(plain_outputs, summed, strict=True))
    # Beside the latent, each level reads nothing, or the maps of its level and of those below.
    for d, expected in ((plain, [[], [], []]), (add, [[0, 1], [1], []]), (concat, [[0, 1], [1], []])):
        read = [f.clone().requires_grad_() for f in features]
        for level, indices in zip(d(read, features[-1]), expected, strict=True):
            grads = torch.autograd.grad(level.sum(), read, allow_unused=True, retain_graph=True)
            assert [i for i, g in enumerate(grads) if g is not None] == indices


def test_unknown_decoder() -> None:
    with pytest.raises(ConfigError, match=r"train\.decoder is 'unet'.*pyramid \| hourglass"):
        DefendNet(small("vgg16"), shared_blocks=1, sizes=(32, 16, 8), channels=3, decoder="unet")


@pytest.mark.parametrize(("arch", "blocks"), BLOCKS.items())
def test_shared_blocks_out_of_range(arch: str, blocks: int) -> None:
    for shared in (0, blocks + 1):
        with pytest.raises(ConfigError, match=rf"train\.shared_blocks is {shared};.*1 to {blocks} "):
            DefendNet(small(arch), shared_blocks=shared, sizes=(32, 16, 8), channels=3)


def test_the_decoder_follows_from_the_seed_alone() -> None:
    def decoder(shared: int, seed: int) -> dict[str, Tensor]:
        net = DefendNet(
            small("vgg16"), shared_blocks=shared, sizes=(32, 16, 8), channels=3, decoder="hourglass_concat", seed=seed
        )
        return net.autoencoder.decoder.state_dict()

    first = decoder(1, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), decoder(5, 3).values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.values(), decoder(1, 4).values(), strict=True))
