"""Weights from torchvision and from elsewhere."""

from __future__ import annotations

import pytest
import torch
import torchvision
from network_cases import ALL, images, small, unsettle
from torch import nn

from components.errors import ConfigError, DataError
from components.models.classifiers import build_classifier, load_weights

SHARED_NAMES = ("resnet50", "vgg16", "vgg16_bn")  # ResNet-18: tests/components/models/test_models.py


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_NAMES)
def test_torchvisions_weights_load_and_back(arch: str) -> None:
    make = getattr(torchvision.models, arch)
    reference = make(**({"init_weights": False} if "vgg" in arch else {})).eval()
    unsettle(reference)
    state = reference.state_dict()
    with torch.device("meta"):  # All weights are replaced, so initial ones would cost time for nothing.
        ours = build_classifier(arch, num_classes=1000, channels=3, image_size=224).eval()
        other = make().eval()
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state, strict=True, assign=True)
    other.load_state_dict(ours.state_dict(), strict=True, assign=True)
    x = images(1, 3, 224)
    with torch.no_grad():
        expected = reference(x)
        assert torch.equal(ours(x), expected)
        assert torch.equal(other(x), expected)


class FewLinear(nn.Linear):
    """A linear layer with few weights: VGG16's 120 million take seconds to draw."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(min(in_features, 64), min(out_features, 64))


@pytest.mark.parametrize("arch", SHARED_NAMES)
def test_initial_weights_are_torchvisions(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "Linear", FewLinear)  # Both libraries use it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        reference = getattr(torchvision.models, arch)(num_classes=10).state_dict()
    ours = build_classifier(arch, num_classes=10, channels=3, image_size=224, seed=6).state_dict()
    assert len(ours) == len(reference)
    for k, v in reference.items():
        assert torch.equal(ours[k], v), k


def test_vgg_heads() -> None:
    """The head is torchvision's from 64 pixels on, and a global average and one linear layer below."""
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
    replaced = []
    for k, v in net.state_dict().items():
        if v.shape != source[k].shape:
            replaced.append(k)
            assert torch.equal(v, fresh[k])
        else:
            assert torch.equal(v, source[k]), k
    assert len(replaced) == 2  # These are weight and bias.
    assert len(source) == len(fresh)  # The caller's tensors are unchanged.


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
