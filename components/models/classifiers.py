"""The classifiers of the paper (sec. 4.1, 4.5) and a user's own: images in [0,1] to logits.

ResNet-18, ResNet-50 and VGG16 have torchvision's parameter names, initialisation and arithmetic, so that a ``state_dict``
goes both ways (tests/components/models/test_models.py). They are written out here because importing torchvision takes each Ray worker six
seconds of CPU, and its networks have neither another stem nor another width.

The defense never changes a classifier (sec. 1, 3.1). It sees it through the adapter that every one of them carries
(``components/models/adapter.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models import libraries, own
from components.models.adapter import Adapter, Normalize, adapter_of, apply_head, attach, encoder_blocks, encoder_units
from components.models.adapter_check import check_adapter, check_output
from components.models.resnet import BasicBlock, Bottleneck, ResNet, ResNet18, ResNet50
from components.models.vgg import VGG16, vgg16_bn
from components.models.weights import load_strictly

# Models registered in MLflow are pickles, and earlier ones name these classes by this module.
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


_BUILDERS: Mapping[str, Callable[[int, int, int, bool, Sequence[float], Sequence[float]], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "vgg16_bn": vgg16_bn,
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
