"""A user's own network."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from documentation import python_of
from mobilenet import MOBILENET, OWN, mobilenet
from network_cases import images, small
from torch import Tensor, nn

from components.errors import ConfigError
from components.models.adapter import Adapter, Normalize, encoder_blocks
from components.models.adapter_check import check_adapter
from components.models.defend import DefendNet


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


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vgg99", r"resnet18, resnet50, vgg16, vgg16_bn, or MODULE:FUNCTION"),
        ("nosuchmodule:f", r"module 'nosuchmodule' cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        (f"{__name__}:nosuch", r"has no function 'nosuch'; it has .*mobilenet"),
        (f"{__name__}:not_callable", r"has no function 'not_callable'"),
        (f"{__name__}:not_a_pair", r"returns \(nn\.Module, Adapter\); it returned Linear"),
        (f"{__name__}:swapped", r"it returned \(Adapter, MobileNetV2\)"),
        (
            f"{__name__}:of_seven_classes",
            r"MobileNetV2 gives 7 logits, but data.num_classes is 10: set --data.num-classes 7, or build",
        ),
        (f"{__name__}:broken", r"RuntimeError: no such weights; .*test_own_networks\.py:\d+"),
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
        (
            with_block(1, ("feature.2", "features.3")),
            r"adapter\.blocks\[1\] is 'feature\.2'; MobileNetV2 has no submodule "
            r"'feature'\. did you mean 'features'\? It has features, classifier",
        ),
        (
            with_block(4, ("features.14", "features.19")),
            r"adapter\.blocks\[4\] is 'features\.19'; 'features' has no submodule "
            r"'19'\. did you mean 'features\..* It has 0, 1, ",
        ),
        (
            replace(MOBILENET, head=("avgpool", "flatten", "classifier")),
            r"adapter\.head is 'avgpool'; .*It has features, class",
        ),
        (
            with_block(2, ("features.4", "features.6")),
            r"is not the whole network.*'features\.5\..* comes where 'features\.6\.",
        ),
        (with_block(2, ("features.4", "features.6", "features.5")), r"is not the whole network"),
        (
            replace(MOBILENET, blocks=MOBILENET.blocks[:3] + MOBILENET.blocks[4:], depths=MOBILENET.depths[:4]),
            r"adapter\.blocks\[3\]: unit 0 of MobileNetV2 does not take what comes before it \(RuntimeError",
        ),
        (replace(MOBILENET, head=("features.18", "flatten", "classifier")), None),
        (
            replace(MOBILENET, head=("features.18", "classifier")),
            r"adapter\.head of MobileNetV2 does not take the latent",
        ),
        # Convolution and batch norm form one unit, the in-place ReLU6 is in the next.
        (
            replace(
                MOBILENET,
                blocks=((("features.0.0", "features.0.1"), ("features.0.2", "features.1")), *MOBILENET.blocks[1:]),
                depths=((1, 1), *MOBILENET.depths[1:]),
            ),
            r"adapter\.blocks\[0\], unit 0: what follows changes this output of MobileNetV2 in place",
        ),
    ],
)
def test_adapters_that_do_not_fit(adapter: Adapter, message: str | None) -> None:
    if message is None:  # At 32 pixels the latent is 1x1, so flattening equals averaging.
        check_adapter(bare_mobilenet(adapter), 3, 32)
        return
    with pytest.raises(ConfigError, match=message):
        check_adapter(bare_mobilenet(adapter), 3, 32)


def test_a_skipped_block_that_does_nothing_yet_is_seen() -> None:
    """A residual branch that starts at zero changes the logits only with other weights."""

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
    """An early ReLU of forward() that is no submodule makes the layers of the adapter differ."""

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
        # A copy normalises with its own constants, also after pickling.
        for copied in (copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
            assert torch.equal(copied(x), inside(x))
            assert isinstance(copied.normalize, Normalize)
            copied.normalize.mean.zero_()
            assert not torch.equal(copied(x), inside(x))
            assert torch.equal(inside(x), plain(by_hand))
    # The constants follow the network to another type.
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
    (block,) = [b for b in python_of("docs/networks.md", "A network of your own") if b.startswith("# own.py")]
    (tmp_path / "own.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own")
    monkeypatch.delitem(sys.modules, "own")
    for channels in (1, 3):
        sizes = {"num_classes": 7, "channels": channels, "image_size": 32, "width": 16}
        (documented, adapter), (tested, same) = own.mobilenet(**sizes), mobilenet(**sizes)
        assert adapter == same
        assert repr(documented) == repr(tested)
