"""The classifiers of the paper (sec. 4.1, 4.5) and a user's own: images in [0,1] to logits.

ResNet-18, ResNet-50 and VGG16 have torchvision's parameter names, initialisation and arithmetic, so that a ``state_dict``
goes both ways (tests/test_models.py). They are written out here because importing torchvision takes each Ray worker six
seconds of CPU, and its networks have neither another stem nor another width.

The defense never changes a classifier (sec. 1, 3.1). It sees it through the adapter that every one of them carries
(``components/models/adapter.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models import libraries, own
from components.models.adapter import (
    Adapter,
    Normalize,
    adapter_of,
    apply_head,
    attach,
    check_adapter,
    check_output,
    encoder_blocks,
    encoder_units,
)
from components.models.weights import load_strictly

__all__ = [
    "ARCHITECTURES",
    "SMALL_IMAGE",
    "VGG16",
    "BasicBlock",
    "Bottleneck",
    "Normalize",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "apply_head",
    "build_classifier",
    "encoder_blocks",
    "encoder_units",
    "load_weights",
]

SMALL_IMAGE = 64
"""Below so many pixels ResNets have a 3x3, stride 1 stem without max-pool and VGG16 one linear layer as its head; from there
on both are torchvision's own."""


# --- ResNet


class BasicBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions beside an identity (or, where the shape changes, a 1x1 convolution)."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """He et al. 2016: 1x1, 3x3 (with the stride, as torchvision has it) and 1x1 convolutions; four times ``channels`` come out."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """A ResNet with a choice of stem, channels and width; ResNet18 and ResNet50 say which.

    Args:
        num_classes: number of logits.
        channels: image channels, 1 or 3.
        width: channels of the first stage (64 is the standard network).
        small: 3x3 stride-1 stem without max-pool, for images under 64x64.
        mean, std: per-channel normalisation inside the network; empty: none.
    """

    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
    depths: ClassVar[tuple[int, int, int, int]]

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        small: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        e = self.block.expansion
        self.layer1 = self._stage(0, width, width, 1)
        self.layer2 = self._stage(1, e * width, 2 * width, 2)
        self.layer3 = self._stage(2, 2 * e * width, 4 * width, 2)
        self.layer4 = self._stage(3, 4 * e * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * e * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.normalize = Normalize(mean, std) if mean else None

        first, *rest = self.depths
        stem = ("conv1", "bn1", "relu")
        self.adapter = Adapter(
            blocks=(
                # the large stem halves the size before the pool does: two maps to tap
                ((*stem, "maxpool", "layer1"),) if small else (stem, ("maxpool", "layer1")),
                *(((f"layer{i}",),) for i in (2, 3, 4)),
            ),
            depths=((first,) if small else (0, first), *((d,) for d in rest)),
            head=("avgpool", "flatten", "fc"),
            mirror="basic" if self.block is BasicBlock else "bottleneck",
            stem=True,
        )

    def _stage(self, index: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        blocks = [self.block(in_channels, channels, stride)]
        for _ in range(self.depths[index] - 1):
            blocks.append(self.block(self.block.expansion * channels, channels, 1))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0,1]."""
        if self.normalize is not None:
            x = self.normalize(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class ResNet18(ResNet):
    """The paper's default network."""

    block = BasicBlock
    depths = (2, 2, 2, 2)


class ResNet50(ResNet):
    """Sec. 4.5."""

    block = Bottleneck
    depths = (3, 4, 6, 3)


# --- VGG


class VGG16(nn.Module):
    """VGG16 (Simonyan, Zisserman 2015): 13 convolutions in five blocks, each before a pool.

    Pools round up (``ceil_mode``), so that 28x28 survives all five (14, 7, 4, 2, 1); where sizes divide, nothing changes.

    Args:
        num_classes, channels, width, mean, std: as for ResNet.
        batch_norm: torchvision's vgg16_bn.
        small: the head is a global average and one linear layer; otherwise torchvision's three linear layers with
            64 * width hidden channels and dropout, over a 7x7 average pool.
    """

    convolutions: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        width: int = 64,
        small: bool = False,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        blocks = []
        size = channels
        for i, convolutions in enumerate(self.convolutions):
            out = width * min(2**i, 8)
            begin = len(layers)
            for _ in range(convolutions):
                norm = [nn.BatchNorm2d(out)] if batch_norm else []
                layers += [nn.Conv2d(size, out, 3, padding=1), *norm, nn.ReLU(inplace=True)]
                size = out
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
            names = tuple(f"features.{n}" for n in range(begin, len(layers)))
            blocks.append((names[:-1], names[-1:]))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1) if small else (7, 7))
        self.classifier: nn.Module
        if small:
            self.classifier = nn.Linear(size, num_classes)
        else:
            hidden = 64 * width
            self.classifier = nn.Sequential(
                nn.Linear(size * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        self.normalize = Normalize(mean, std) if mean else None
        self.adapter = Adapter(
            blocks=tuple(blocks),
            depths=tuple((n, 0) for n in self.convolutions),
            head=("avgpool", "flatten", "classifier"),
            mirror="plain",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0,1]."""
        if self.normalize is not None:
            x = self.normalize(x)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


# --- building


def _vgg16_bn(
    num_classes: int, channels: int, width: int, small: bool, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    return VGG16(num_classes, channels, width, small, mean, std, batch_norm=True)


_BUILDERS: Mapping[str, Callable[[int, int, int, bool, Sequence[float], Sequence[float]], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "vgg16_bn": _vgg16_bn,
}
ARCHITECTURES: tuple[str, ...] = tuple(_BUILDERS)
"""The names that ``train.arch`` knows; anything else is MODULE:FUNCTION."""


def build_classifier(
    arch: str,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    width: int = 64,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
    needs_adapter: bool = True,
    pretrained: bool = False,
) -> nn.Module:
    """An untrained classifier whose initial weights follow from ``seed`` alone: images [N, C, W, W] in [0,1] to logits.

    Args:
        arch: one of ARCHITECTURES, or ``MODULE:FUNCTION``, a function of the user's own, called as
            ``FUNCTION(num_classes=..., channels=..., image_size=..., width=...)``, that returns the network and its
            Adapter (docs/networks.md), or ``torchvision:NAME`` or ``timm:NAME``, which have no adapter.
        needs_adapter: False lets a function return a network alone, which is enough where nobody asks for its blocks.
        pretrained: whether weights will be loaded, for which a library may build its network otherwise.
        width: channels of the first stage; 64 is the standard network.
        mean, std: per-channel normalisation inside the network; empty: none.

    Raises:
        ConfigError: unknown architecture; a function that cannot be imported or returns something else; an adapter that
            does not fit its network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch in _BUILDERS:
            return _BUILDERS[arch](num_classes, channels, width, image_size < SMALL_IMAGE, mean, std)
        if libraries.is_library(arch):
            classifier, adapter = _of_library(arch, num_classes, channels, image_size, needs_adapter, pretrained), None
        else:
            classifier, adapter = _made_elsewhere(arch, num_classes, channels, image_size, width, needs_adapter)
    try:
        attach(classifier, adapter, mean, std)
        if adapter is not None:
            check_adapter(classifier, channels, image_size, num_classes)
        else:
            check_output(classifier, channels, image_size, num_classes)
    except ConfigError as e:
        raise ConfigError.of("train.arch", arch, str(e)) from e
    return classifier


def _of_library(
    arch: str, num_classes: int, channels: int, image_size: int, needs_adapter: bool, pretrained: bool
) -> nn.Module:
    library = arch.partition(":")[0]
    if needs_adapter:
        raise ConfigError.of(
            "train.arch",
            arch,
            "a network with an adapter, where the defense needs its blocks: return it with one from a function of your "
            "own, MODULE:FUNCTION (docs/networks.md)",
        )
    try:
        return libraries.build(arch, num_classes, channels, image_size, pretrained=pretrained)
    except ConfigError:
        raise
    except ImportError as e:
        raise ConfigError.of(
            "train.arch", arch, f"a network of an installed library ({e}): pip install {library}"
        ) from e
    except Exception as e:  # each library has its own way to say that it does not know a name
        raise ConfigError.of("train.arch", arch, f"a name that {library} can build ({type(e).__name__}: {e})") from e


def _made_elsewhere(
    arch: str, num_classes: int, channels: int, image_size: int, width: int, needs_adapter: bool
) -> tuple[nn.Module, Adapter | None]:
    """Return what MODULE:FUNCTION returns, checked."""
    if not own.is_own(arch) or not all(arch.split(":", 1)):
        raise ConfigError.of(
            "train.arch",
            arch,
            f"{', '.join(ARCHITECTURES)}, or MODULE:FUNCTION for a network of your own (docs/networks.md)",
        )
    sizes = {"num_classes": num_classes, "channels": channels, "image_size": image_size, "width": width}
    made = own.calling(arch, own.import_function(arch), sizes)
    if isinstance(made, nn.Module) and not needs_adapter:
        return made, None
    if isinstance(made, tuple) and len(made) == 2:
        classifier, adapter = made
        if isinstance(classifier, nn.Module) and isinstance(adapter, Adapter):
            return classifier, adapter
    got = f"({', '.join(type(x).__name__ for x in made)})" if isinstance(made, tuple) else type(made).__name__
    raise ConfigError.of("train.arch", arch, f"a function that returns (nn.Module, Adapter); it returned {got}")


# --- weights from elsewhere


def load_weights(
    classifier: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    replace_head: bool = False,
    trains: bool = True,
) -> None:
    """Load weights into a classifier, strictly: every key must be there with its shape, and no other.

    Args:
        tensors: a ``state_dict``, such as torchvision's of the same architecture.
        where: the file, for messages.
        replace_head: leave the network's own last linear layer as it is and do not read the file's.
        trains: whether training follows. Without it a new head would stay random.

    Raises:
        ConfigError: the file's head has another number of classes, or there is no head to keep.
        DataError: the file is of another architecture.
    """
    name = _last_linear(classifier)
    state = classifier.state_dict()
    head = [k for k in (f"{name}.weight", f"{name}.bias") if k in state] if name is not None else []
    if replace_head:
        if not head:
            raise ConfigError(
                f"{type(classifier).__name__} has no linear layer as head to replace: leave out --train.replace-head"
            )
        tensors = {**tensors, **{k: state[k] for k in head}}
    elif head and head[0] in tensors:
        theirs, mine = tensors[head[0]], state[head[0]]
        if theirs.ndim == 2 and theirs.shape[1] == mine.shape[1] and theirs.shape[0] != mine.shape[0]:
            raise ConfigError(
                f"{where} holds a head of {theirs.shape[0]} classes, but data.num_classes is {mine.shape[0]}: "
                + ("--train.replace-head trains a new head; " if trains else "")
                + f"for images of the file's own classes, --data.num-classes {theirs.shape[0]}"
            )
    load_strictly(classifier, tensors, where)


def _last_linear(classifier: nn.Module) -> str | None:
    """The dotted name of the last linear layer in the head; without an adapter, of the whole network."""
    last = None
    if not isinstance(getattr(classifier, "adapter", None), Adapter):
        return next((n for n, m in reversed(list(classifier.named_modules())) if isinstance(m, nn.Linear)), None)
    children = dict(classifier.named_children())
    for name in adapter_of(classifier).head:
        if name.split(".")[0] in children:  # not one of the operations that have no module
            for inner, module in classifier.get_submodule(name).named_modules(prefix=name):
                if isinstance(module, nn.Linear):
                    last = inner
    return last
