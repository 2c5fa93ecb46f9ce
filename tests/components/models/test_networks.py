"""Every network with every decoder at every size, a user's own network, and the adapters between them."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from convolutions import convolutions
from mobilenet import MOBILENET, OWN, mobilenet
from repository import ROOT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components.config import Shapes, TrainConfig, level_sizes
from components.errors import ConfigError, DataError
from components.models.adapter import Adapter, Normalize, apply_head, check_adapter, encoder_blocks, encoder_units
from components.models.classifiers import ARCHITECTURES, build_classifier, load_weights
from components.models.decoder_plan import UnitShape, plan_decoder, stages_of
from components.models.decoders import DecodeBottleneck, DecodeConv, HourglassDecoder, build_decoder
from components.models.defend import DefendNet, classify_with_noise, run_blocks, run_units, unit_shapes
from pipeline.runtime.storage import Storage
from pipeline.training import exports
from pipeline.training.jobs import model_address

pytestmark = pytest.mark.usefixtures("one_thread")


def not_a_pair(**kwargs: int) -> nn.Module:
    return nn.Linear(1, 1)


def swapped(**kwargs: Any) -> tuple[Adapter, nn.Module]:
    net, adapter = mobilenet(**kwargs)
    return adapter, net


def of_seven_classes(*, num_classes: int, **kwargs: Any) -> tuple[nn.Module, Adapter]:
    return mobilenet(num_classes=7, **kwargs)


def broken(**kwargs: int) -> None:
    raise RuntimeError("no such weights")


not_callable = 3
ALL = (*ARCHITECTURES, OWN)
DECODERS = ("pyramid", "hourglass", "hourglass_concat", "hourglass_add")
SIZES = (28, 32, 64, 224)
BLOCKS = {"resnet18": 4, "resnet50": 4, "vgg16": 5, "vgg16_bn": 5, OWN: 5}


def small(arch: str, size: int = 32, channels: int = 3, width: int = 4, seed: int = 0, **kwargs: Any) -> nn.Module:
    return build_classifier(arch, num_classes=10, channels=channels, image_size=size, width=width, seed=seed, **kwargs)


def images(n: int = 3, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(5))


def unsettle(net: nn.Module) -> None:
    """Give batch norm statistics values of their own, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, b in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.add_(torch.rand(b.shape, generator=generator))


# --- every network with every decoder

# a Latin square: every network with every decoder, every network at every size, every decoder at every size
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

    # the classifier is untouched
    assert list(classifier.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())

    # sharing is of storage, block by block; the rest is a copy
    blocks = encoder_blocks(classifier)
    assert len(blocks) == len(net.autoencoder.encoder) == BLOCKS[arch]
    for i, (mine, theirs) in enumerate(zip(blocks, net.autoencoder.encoder, strict=True)):
        pairs = list(zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
        assert pairs
        for a, b in pairs:
            assert (a.data_ptr() == b.data_ptr()) == (i < shared)
            assert torch.equal(a, b)

    # every level at its size, every parameter with a gradient
    x = images(3 if size < 224 else 2, channels, size)
    levels = net.autoencoder(x)
    assert [tuple(y.shape) for y in levels] == [(len(x), channels, s, s) for s in sizes]
    torch.stack([y.square().mean() for y in levels]).sum().backward()
    for name, p in net.autoencoder.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name

    # joint is the classifier and the auto-encoder
    net.eval()
    with torch.no_grad():
        logits, levels = net.joint(x)
        assert tuple(logits.shape) == (len(x), 10)
        torch.testing.assert_close(logits, classifier(x), rtol=1e-5, atol=1e-6)
        for a, b in zip(levels, net.autoencoder(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("arch", ALL)
def test_taps_are_not_changed_by_what_follows(arch: str) -> None:
    """In-place ReLUs: the maps that a decoder reads are those that the units gave."""
    net = DefendNet(small(arch), shared_blocks=2, sizes=level_sizes(32), channels=3).eval()
    x = images()
    with torch.no_grad():
        kept, y = [], x.clone()
        for units in encoder_units(net.classifier):
            for unit in units:
                y = unit(y.clone()).clone()
                kept.append(y)
        features = run_units(net.autoencoder.encoder, x)
        net.joint(x)
        last_shared = sum(len(units) for units in encoder_units(net.classifier)[:2]) - 1
        run_blocks(encoder_blocks(net.classifier)[2:], features[last_shared])  # as joint does
        for a, b in zip(features, kept, strict=True):
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
    """What check_adapter asserts of a user's network holds for ours, with normalisation too."""
    net = small(arch, size, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    unsettle(net)
    next(iter(net.children())).eval()  # a part that is frozen stays frozen
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


# --- what is built from an encoder's shapes


def shapes(arch: str, size: int, width: int = 64, channels: int = 3) -> list[UnitShape]:
    with torch.device("meta"):
        return unit_shapes(small(arch, size, channels, width), channels, size)


@pytest.mark.parametrize(
    ("arch", "size", "units", "stages", "taps"),
    [
        # sizes of the units' maps; of the stages'; the units that levels 0.. read
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
    # latent 1 -> 2 -> 4 -> 8, the channels reduced to the image's at the very end
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
    """From 64 pixels on the stem halves the size before layer1: it is stage 0, mirrored from an image to an image."""
    decoder = pyramid("resnet18", 224)
    assert convolutions(decoder.up[0]) == [("C", 3, 4, 3, 1), ("T", 4, 3, 3, 2)]
    assert isinstance(decoder.up[0][-1], DecodeConv)
    assert convolutions(decoder.up[1]) == [("C", 3, 4, 3, 1), *[("C", 4, 4, 3, 1)] * 2, ("T", 4, 3, 3, 2)]
    # level 0 has no map: it reads the next smaller one, doubled; the others read a map of their size
    assert convolutions(decoder.high[0]) == [("T", 4, 4, 3, 2), ("C", 4, 4, 3, 1), ("C", 4, 3, 3, 1)]
    assert convolutions(decoder.high[1]) == [("C", 4, 4, 3, 1), ("C", 4, 3, 3, 1)]
    assert [len(b) for b in decoder.bottom] == [2, 2]  # layer4 then layer3: 7 -> 14 -> 28


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 28), ("resnet50", 64), ("vgg16", 32)])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("levels", [1, 2])
def test_fewer_levels(arch: str, size: int, decoder: str, levels: int) -> None:
    """One level: D_0 is the whole decoder, and nothing is read but the latent."""
    net = DefendNet(
        small(arch, size), shared_blocks=4, sizes=level_sizes(size, levels), channels=3, decoder=decoder
    ).eval()
    with torch.no_grad():
        assert [y.shape[-1] for y in net.autoencoder(images(1, 3, size))] == [size, size // 2][:levels]


@pytest.mark.parametrize("size", [15, 30, 31, 36, 44, 50, 60, 66, 72, 100, 130, 256])
@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_other_sizes_fit_or_are_refused(arch: str, size: int) -> None:
    """Never a reconstruction of another size than its level's."""
    with torch.device("meta"):
        classifier = small(arch, size)
        if size % 2 ** (len(level_sizes(size)) - 1):  # a level of an odd size with one below it
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
        # features between the levels, with the channels of the encoder's maps; a 1x1 image head per level
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
    without, summed = plain(features, features[-1]), add([torch.zeros_like(f) for f in features], features[-1])
    assert all(torch.equal(a, b) for a, b in zip(without, summed, strict=True))
    # what each level reads beside the latent: nothing, or the maps of its level and of those below
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


# --- torchvision's weights

SHARED_NAMES = ("resnet50", "vgg16", "vgg16_bn")  # ResNet-18: tests/components/models/test_models.py


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_NAMES)
def test_torchvisions_weights_load_and_back(arch: str) -> None:
    make = getattr(torchvision.models, arch)
    theirs = make(**({"init_weights": False} if "vgg" in arch else {})).eval()
    unsettle(theirs)
    state = theirs.state_dict()
    with torch.device("meta"):  # no time on initial weights: every one of them is replaced
        mine = build_classifier(arch, num_classes=1000, channels=3, image_size=224).eval()
        other = make().eval()
    assert list(mine.state_dict()) == list(state)
    mine.load_state_dict(state, strict=True, assign=True)
    other.load_state_dict(mine.state_dict(), strict=True, assign=True)
    x = images(1, 3, 224)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(mine(x), expected)
        assert torch.equal(other(x), expected)


class FewLinear(nn.Linear):
    """VGG16 without its 120 million linear weights, which take seconds to draw."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(min(in_features, 64), min(out_features, 64))


@pytest.mark.parametrize("arch", SHARED_NAMES)
def test_initial_weights_are_torchvisions(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Linear", FewLinear)  # in both
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = getattr(torchvision.models, arch)(num_classes=10).state_dict()
    mine = build_classifier(arch, num_classes=10, channels=3, image_size=224, seed=6).state_dict()
    assert len(mine) == len(theirs)
    for k, v in theirs.items():
        assert torch.equal(mine[k], v), k


def test_vgg_heads() -> None:
    """torchvision's own from 64 pixels on; a global average and one linear layer below."""
    large, tiny = small("vgg16", 64, width=8), small("vgg16", 63, width=8)
    heads = [[(m.in_features, m.out_features) for m in n.modules() if isinstance(m, nn.Linear)] for n in (large, tiny)]
    assert heads == [[(64 * 49, 512), (512, 512), (512, 10)], [(64, 10)]]
    assert sum(isinstance(m, nn.Conv2d) for m in tiny.modules()) == 13


@pytest.mark.parametrize("arch", ALL)
def test_initial_weights_follow_from_the_seed(arch: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, third = (small(arch, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not any(torch.equal(v, third[k]) for k, v in first.items() if v.ndim > 1)


# --- weights from elsewhere


@pytest.mark.parametrize("arch", ALL)
def test_load_weights(arch: str) -> None:
    source = small(arch, seed=1).state_dict()
    net = small(arch, seed=2)
    load_weights(net, source, "file.safetensors")
    assert all(torch.equal(v, source[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("arch", ALL)
def test_a_head_of_other_classes(arch: str) -> None:
    source = build_classifier(arch, num_classes=17, channels=3, image_size=32, width=4, seed=1).state_dict()
    net = small(arch, seed=2)
    fresh = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"file\.pt .*17 classes.* is 10: --train\.replace-head .*--data\.num-classes 17"
    ):
        load_weights(net, source, "file.pt")
    load_weights(net, source, "file.pt", replace_head=True)
    kept = []
    for k, v in net.state_dict().items():
        if v.shape != source[k].shape:
            kept.append(k)
            assert torch.equal(v, fresh[k])
        else:
            assert torch.equal(v, source[k]), k
    assert len(kept) == 2  # weight and bias
    assert len(source) == len(fresh)  # the caller's tensors are not changed


def test_replace_head_keeps_a_head_of_the_same_size_too() -> None:
    source, net = small("resnet18", seed=1).state_dict(), small("resnet18", seed=2)
    fresh = net.fc.weight.clone()
    load_weights(net, source, "file.pt", replace_head=True)
    assert torch.equal(net.fc.weight, fresh)
    assert torch.equal(net.conv1.weight, source["conv1.weight"])


def test_weights_of_another_network() -> None:
    source = small("resnet18").state_dict()
    for wrong in ({k: v for k, v in source.items() if k != "layer1.0.bn1.bias"}, {**source, "extra": torch.zeros(1)}):
        for replace_head in (False, True):
            with pytest.raises(DataError, match=r"file\.pt holds the weights of another architecture"):
                load_weights(small("resnet18"), wrong, "file.pt", replace_head=replace_head)
    with pytest.raises(DataError, match=r"another architecture"):
        load_weights(small("vgg16"), source, "file.pt")
    with pytest.raises(DataError, match=r"another architecture"):
        load_weights(small("resnet18", width=8), source, "file.pt")


# --- a user's own network


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vgg99", r"resnet18, resnet50, vgg16, vgg16_bn, or MODULE:FUNCTION"),
        ("nosuchmodule:f", r"module 'nosuchmodule' cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        (f"{__name__}:nosuch", r"has no function 'nosuch'; it has .*mobilenet"),
        (f"{__name__}:not_callable", r"has no function 'not_callable'"),
        (f"{__name__}:not_a_pair", r"returns \(nn\.Module, Adapter\); it returned Linear"),
        (f"{__name__}:swapped", r"it returned \(Adapter, MobileNetV2\)"),
        (f"{__name__}:of_seven_classes", r"MobileNetV2 gives 7 logits, but there are 10 classes"),
        (f"{__name__}:broken", r"RuntimeError: no such weights; .*test_networks\.py:\d+"),
        (f"{__name__}:", r"or MODULE:FUNCTION"),
        (":mobilenet", r"or MODULE:FUNCTION"),
    ],
)
def test_what_is_not_a_network(arch: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.arch is '{arch}'; .*{message}"):
        small(arch)


def test_a_module_that_breaks_on_import(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_import.py").write_text("raise OSError('disk on fire')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported \(OSError: disk on fire\)"):
        small("breaks_on_import:f")
    assert "breaks_on_import" not in sys.modules


def bare_mobilenet(adapter: Adapter | None = MOBILENET) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, _ = mobilenet(num_classes=10, channels=3, image_size=32, width=16)
    if adapter is not None:
        net.adapter = adapter  # type: ignore[assignment]
    return net


def with_block(index: int, names: tuple[str, ...], **changes: Any) -> Adapter:
    blocks = list(MOBILENET.blocks)
    blocks[index] = (names,)
    return replace(MOBILENET, blocks=tuple(blocks), **changes)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (with_block(1, ("feature.2", "features.3")), r"adapter\.blocks\[1\] is 'feature\.2'; MobileNetV2 has no submodule "
         r"'feature'\. did you mean 'features'\? It has features, classifier"),
        (with_block(4, ("features.14", "features.19")), r"adapter\.blocks\[4\] is 'features\.19'; 'features' has no submodule "
         r"'19'\. did you mean 'features\..* It has 0, 1, "),
        (replace(MOBILENET, head=("avgpool", "flatten", "classifier")), r"adapter\.head is 'avgpool'; .*It has features, class"),
        (with_block(2, ("features.4", "features.6")), r"is not the whole network.*'features\.5\..* comes where 'features\.6\."),
        (with_block(2, ("features.4", "features.6", "features.5")), r"is not the whole network"),
        (replace(MOBILENET, blocks=MOBILENET.blocks[:3] + MOBILENET.blocks[4:], depths=MOBILENET.depths[:4]),
         r"adapter\.blocks\[3\]: unit 0 of MobileNetV2 does not take what comes before it \(RuntimeError"),
        (replace(MOBILENET, head=("features.18", "flatten", "classifier")), None),
        (replace(MOBILENET, head=("features.18", "classifier")), r"adapter\.head of MobileNetV2 does not take the latent"),
        # conv and batch norm in one unit, the in-place ReLU6 in the next
        (replace(
            MOBILENET,
            blocks=((("features.0.0", "features.0.1"), ("features.0.2", "features.1")), *MOBILENET.blocks[1:]),
            depths=((1, 1), *MOBILENET.depths[1:]),
        ), r"adapter\.blocks\[0\], unit 0: what follows changes this output of MobileNetV2 in place"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(adapter: Adapter, message: str | None) -> None:
    if message is None:  # at 32 pixels the latent is 1x1: flattening it is the same as averaging it
        check_adapter(bare_mobilenet(adapter), 3, 32)
        return
    with pytest.raises(ConfigError, match=message):
        check_adapter(bare_mobilenet(adapter), 3, 32)


def test_a_skipped_block_that_does_nothing_yet_is_seen() -> None:
    """A residual branch that starts at zero: only with other weights do the logits differ."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.head = nn.Conv2d(3, 4, 3), Branch(), nn.Linear(4, 2)
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.branch(self.first(x)).mean((2, 3)))

    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    whole = Adapter(
        blocks=((("first",),), (("branch",),)), depths=((1,), (1,)), head=("global_average", "flatten", "head")
    )
    net.adapter = whole  # type: ignore[assignment]
    check_adapter(net, 3, 16)
    net.adapter = replace(whole, blocks=whole.blocks[:1], depths=whole.depths[:1])  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="is not the whole network"):
        check_adapter(net, 3, 16)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_operation_without_a_weight_counts() -> None:
    """The same layers in the same order, but forward() has a ReLU that no submodule stands for, early in a deep network."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(12)]
            self.first, self.rest, self.head = nn.Conv2d(3, 4, 3), nn.Sequential(*make), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rest(torch.relu(self.first(x))).mean((2, 3)))

    net = Net()
    net.adapter = Adapter(  # type: ignore[assignment]
        blocks=((("first",), ("rest",)),), depths=((1, 12),), head=("global_average", "flatten", "head")
    )
    with pytest.raises(ConfigError, match=r"is not the whole network.*such as a ReLU or a pool"):
        check_adapter(net, 3, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "classifier"}, r"adapter\.head is 'classifier'"),
        ({"blocks": ()}, r"adapter\.blocks is \(\); .*at least one block"),
        ({"blocks": (("layer1",),), "depths": ((1,),)}, r"adapter\.blocks\[0\] is \('layer1',\); .*a tuple of units"),
        ({"depths": ((2,), (2,))}, r"adapter\.depths is .*one number per unit"),
        ({"depths": ((2,), (2,), (3,), (7,), (-1,))}, r"adapter\.depths is .*0 or more"),
        ({"depths": ((0,), (2,), (3,), (7,), (4,))}, r"adapter\.depths is .*more than 0 for the first unit"),
        ({"mirror": "unet"}, r"adapter\.mirror is 'unet'; .*basic \| bottleneck \| plain"),
    ],
)
def test_adapters_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(MOBILENET, **changes)


def test_a_network_without_an_adapter() -> None:
    with pytest.raises(ConfigError, match=r"MobileNetV2 has no adapter .*docs/networks\.md"):
        DefendNet(bare_mobilenet(None), shared_blocks=1, sizes=(32, 16, 8), channels=3)


def test_own_networks_normalise_inside() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    plain, inside = small(OWN).eval(), small(OWN, mean=mean, std=std).eval()
    assert list(plain.state_dict()) == list(inside.state_dict())
    inside.load_state_dict(plain.state_dict(), strict=True)
    x = images()
    by_hand = torchvision.transforms.functional.normalize(x, list(mean), list(std))
    with torch.no_grad():
        assert torch.equal(inside(x), plain(by_hand))
        assert torch.equal(encoder_blocks(inside)[0](x), encoder_blocks(plain)[0](by_hand))
        # a copy normalises with its own constants, also where it has been written to disk and back
        for copied in (copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
            assert torch.equal(copied(x), inside(x))
            assert isinstance(copied.normalize, Normalize)
            copied.normalize.mean.zero_()
            assert not torch.equal(copied(x), inside(x))
            assert torch.equal(inside(x), plain(by_hand))
    # and it follows the network to another type
    assert inside.double()(x.double()).dtype == torch.float64


def test_a_sequential_cannot_be_normalised() -> None:
    from components.models.adapter import attach

    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    adapter = Adapter(blocks=((("0", "1"),),), depths=((1,),), head=("2", "3"))
    with pytest.raises(ConfigError, match=r"Sequential: wrap it"):
        attach(net, adapter, (0.5,) * 3, (0.5,) * 3)
    attach(net, adapter)
    check_adapter(net, 3, 16, 10)


def test_names_that_are_taken() -> None:
    from components.models.adapter import attach

    net = bare_mobilenet(None)
    net.normalize = nn.Identity()
    attach(net, MOBILENET, (0.5,) * 3, (0.5,) * 3)
    assert isinstance(net.normalize, nn.Identity)
    assert isinstance(encoder_blocks(net)[0][0], Normalize)
    with pytest.raises(ConfigError, match="attributes named input_normalization and normalize"):
        attach(net, MOBILENET, (0.5,) * 3, (0.5,) * 3)
    net = bare_mobilenet(None)
    net.adapter = nn.Identity()
    attach(net, None)
    with pytest.raises(ConfigError, match="an attribute named 'adapter'"):
        attach(net, MOBILENET)


def test_maps_that_are_not_square_maps() -> None:
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.Flatten(), nn.Linear(12, 10))
    net.adapter = Adapter(blocks=((("0", "1"),),), depths=((1,),), head=("2", "3"))  # type: ignore[assignment]
    check_adapter(net, 3, 8, 10)
    with pytest.raises(ConfigError, match=r"adapter\.blocks\[0\], unit 0 of Sequential gives \[1, 3, 4\]"):
        DefendNet(net, shared_blocks=1, sizes=(8,), channels=3)


def test_the_documented_network_is_the_tested_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "networks.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if b.startswith("# own.py"))
    (tmp_path / "own.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own")
    monkeypatch.delitem(sys.modules, "own")
    for channels in (1, 3):
        sizes = {"num_classes": 7, "channels": channels, "image_size": 32, "width": 16}
        (theirs, adapter), (tested, same) = own.mobilenet(**sizes), mobilenet(**sizes)
        assert adapter == same
        assert repr(theirs) == repr(tested)


# --- what names a trained network

DATA = {"train": "pyramids/0123"}


def address(arch: str, **settings: Any) -> str:
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(**{"arch": arch, "width": 4, "epochs": 2, **settings}).canonical()
    return model_address(config, shapes, DATA, 1, "")


def test_addresses_of_our_networks_stay_as_they_are() -> None:
    """Models that were trained before are found again."""
    assert address("resnet18") == "models/defended-58f8f309fa956334"
    assert address("resnet18", defense="adversarial", adversarial_attack="pgd") == "models/adversarial-e64ed538fc6ca85b"
    # DDN's examples against a confident network were others then
    assert address("resnet18", defense="adversarial", adversarial_attack="ddn") != "models/adversarial-0e0721afd20a6f3a"
    given = {"defense": "none", "epochs": 0, "pretrained": "x.pth"}
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch="torchvision:resnet18", **given).canonical()
    assert model_address(config, shapes, {}, 1, "weights/0.safetensors") == "models/undefended-d572f4398ccde87f"


def test_an_edited_network_of_ones_own_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited.py"
    file.write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = address("edited:make", defense="none")
    assert address("edited:make", defense="none") == first
    assert "edited" not in sys.modules, "not imported for that"
    file.write_text("ONE = 2\n")
    assert address("edited:make", defense="none") != first
    # a reformer stands in front of any network
    assert address("edited:make", defense="comdefend") == address("resnet18", defense="comdefend")
    for arch in ("nosuchmodule:make", "nosuchpackage.module:make", "sys:make"):
        with pytest.raises(ConfigError, match=r"train\.arch is .*a function of a module that is a file"):
            address(arch)


def test_an_edited_network_with_the_same_weights_is_attacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples and verdicts are named by the checksum of the exported file."""
    file = tmp_path / "forward_edited.py"
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch="forward_edited:make", defense="none")
    monkeypatch.syspath_prepend(tmp_path)
    exported = []
    for text in ("a = 1\n", "a = 2\n", "a = 2\n"):
        file.write_text(text)
        exports.export(Storage(str(tmp_path / "model")), nn.Flatten(), config, shapes)
        exported.append((tmp_path / "model" / "classifier.safetensors").read_bytes())
    assert exported[0] != exported[1] == exported[2]
    assert exports.described(exported[0]) == (config, shapes)
