"""Classifiers of the paper (sec. 4.1, 4.5) and of the user: images in [0,1] to logits.

ResNet-18, ResNet-50 and VGG16 have torchvision's parameter names, initialisation and arithmetic, so
a ``state_dict`` goes both ways (tests/components/models/test_models.py). They are written out here
because importing torchvision costs each Ray worker six seconds of CPU, and because torchvision's
networks have neither another stem nor another width.

The defense never changes a classifier (sec. 1, 3.1). It reads its blocks through the classifier's
adapter (``components/models/adapter.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from components.errors import ConfigError, did_you_mean, first_line
from components.models import libraries, own
from components.models.adapter import Adapter, Normalize, adapter_of, apply_head, attach, encoder_blocks, encoder_units
from components.models.adapter_check import check_adapter, check_output
from components.models.resnet import BasicBlock, Bottleneck, ResNet, ResNet18, ResNet50
from components.models.vgg import VGG16, vgg16_bn
from components.models.weights import load_strictly

# Models registered in MLflow are pickles. Those of earlier versions name these classes by this
# module.
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
"""Size in pixels from which on networks are torchvision's own.

Below, ResNets have a 3x3, stride 1 stem without max-pool, and VGG16 has one linear layer as
head."""

_BUILDERS: Mapping[str, Callable[[int, int, int, bool, Sequence[float], Sequence[float]], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "vgg16_bn": vgg16_bn,
}
ARCHITECTURES: tuple[str, ...] = tuple(_BUILDERS)
"""Names of ``train.arch`` for networks of this project."""


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
    """Build an untrained classifier: images [N, C, W, W] in [0,1] to logits.

    Its initial weights follow from ``seed`` alone.

    Args:
        arch: one of ARCHITECTURES; or ``MODULE:FUNCTION``, the user's own function, called as
            ``FUNCTION(num_classes=..., channels=..., image_size=..., width=...)``, which returns
            the network and its Adapter (docs/networks.md); or ``torchvision:NAME``,
            ``timm:NAME`` or ``robustbench:DATASET/THREAT_MODEL/ID``, which have no adapter.
        width: channels of the first stage; 64 is the standard network.
        mean, std: per-channel normalisation inside the network; empty: none.
        needs_adapter: False if the network's blocks are not used. A function may then return a
            network alone.
        pretrained: whether weights will be loaded. A library may build its network otherwise then.

    Raises:
        ConfigError: the architecture is unknown, a function cannot be imported or returns something
            else, or an adapter does not fit its network.
    """
    if mean and libraries.normalizes(arch):
        raise ConfigError.of(
            "train.normalize_mean", tuple(mean), f"empty with {arch}, which normalises its images itself"
        )
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
        raise ConfigError(f"train.arch is {arch!r}; {e}") from e
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
    except Exception as e:  # Each library has errors of its own for an unknown name.
        name = libraries.parse(arch)[1]
        if name.lower() in (known := libraries.names(library)):
            reason = f"{name} cannot be built with the sizes of these images ({type(e).__name__}: {first_line(e)})"
            raise ConfigError(f"train.arch is {arch!r}; {reason}") from e
        raise ConfigError.of("train.arch", arch, f"a network of {library}{did_you_mean(name, known)}") from e


def _made_elsewhere(
    arch: str, num_classes: int, channels: int, image_size: int, width: int, needs_adapter: bool
) -> tuple[nn.Module, Adapter | None]:
    """Return the network of MODULE:FUNCTION, and its adapter if it has one."""
    if not own.is_own(arch) or not all(arch.split(":", 1)):
        raise ConfigError.of(
            "train.arch",
            arch,
            f"{', '.join(ARCHITECTURES)}, or MODULE:FUNCTION for a network of your own (docs/networks.md)",
        )
    sizes = {"num_classes": num_classes, "channels": channels, "image_size": image_size, "width": width}
    result = own.calling(arch, own.import_function(arch), sizes)
    if isinstance(result, nn.Module) and not needs_adapter:
        return result, None
    if isinstance(result, tuple) and len(result) == 2:
        classifier, adapter = result
        if isinstance(classifier, nn.Module) and isinstance(adapter, Adapter):
            return classifier, adapter
    types = f"({', '.join(type(x).__name__ for x in result)})" if isinstance(result, tuple) else type(result).__name__
    raise ConfigError.of("train.arch", arch, f"a function that returns (nn.Module, Adapter); it returned {types}")


def load_weights(
    classifier: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    replace_head: bool = False,
    trains: bool = True,
) -> None:
    """Load weights into a classifier strictly: every key with its shape, and no other.

    Args:
        tensors: a ``state_dict``, such as torchvision's of the same architecture.
        where: the file, for messages.
        replace_head: keep the network's own last linear layer instead of the file's.
        trains: whether training follows. Without training a new head would stay random.

    Raises:
        ConfigError: the file's head has another number of classes, or there is no head to replace.
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
        in_file, in_network = tensors[head[0]].shape, state[head[0]].shape
        if len(in_file) == 2 and in_file[1] == in_network[1] and in_file[0] != in_network[0]:
            raise ConfigError(
                f"{where} holds a head of {in_file[0]} classes, but data.num_classes is {in_network[0]}: "
                + ("--train.replace-head trains a new head; " if trains else "")
                + f"for images of the file's own classes, --data.num-classes {in_file[0]}"
            )
    load_strictly(classifier, tensors, where)


def _last_linear(classifier: nn.Module) -> str | None:
    """Return the name of the last linear layer in the head, or in a network without adapter."""
    last = None
    if not isinstance(getattr(classifier, "adapter", None), Adapter):
        return next((n for n, m in reversed(list(classifier.named_modules())) if isinstance(m, nn.Linear)), None)
    children = dict(classifier.named_children())
    for name in adapter_of(classifier).head:
        # Operations of the head, such as flatten, have no module.
        if name.split(".")[0] in children:
            for inner, module in classifier.get_submodule(name).named_modules(prefix=name):
                if isinstance(module, nn.Linear):
                    last = inner
    return last
