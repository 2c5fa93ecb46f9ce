"""Networks of libraries, built as their own builders build them for pretrained weights.

Beside the architecture, torchvision's builders do the following when they load weights (read in its
0.29 source):

- googlenet and inception_v3 take ``transform_input=True``, which renormalises the images inside the
  network, and drop the auxiliary heads, which an evaluation never runs.
- densenet renames the keys of older files.
- vit and maxvit are built for the image size of the weights.

All others, and timm's, are the same network with and without weights; timm's inception_v3 also
ignores the auxiliary heads of a file. RobustBench's networks are in ``components/models/zoo.py``.
torch is not imported here: trials of a sweep, which read
``explicit``, must not pay for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

LIBRARIES = ("torchvision", "timm", "robustbench")
"""Libraries whose networks are named LIBRARY:NAME."""
_TRANSFORMING = ("googlenet", "inception_v3")
_AUXILIARY = re.compile(r"^(aux1|aux2|AuxLogits)\.")
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def is_library(arch: str) -> bool:
    """Tell whether ``train.arch`` names a network of a library."""
    library, _, name = arch.partition(":")
    return library in LIBRARIES and bool(name)


def normalizes(arch: str) -> bool:
    """Tell whether a library's network normalises its images itself, always."""
    return arch.startswith("robustbench:")


def parse(arch: str) -> tuple[str, str, bool | None]:
    """Split LIBRARY:NAME or LIBRARY:NAME,transform_input=true|false.

    The last part of the result is None if the option is not given.

    Raises:
        ConfigError: the option is unknown, or the network does not have it.
    """
    library, _, rest = arch.partition(":")
    name, comma, option = rest.partition(",")
    if not comma:
        return library, name, None
    key, _, value = option.partition("=")
    if library != "torchvision" or name.lower() not in _TRANSFORMING or key != "transform_input":
        allowed = " and ".join(f"torchvision:{n}" for n in _TRANSFORMING)
        raise ConfigError(
            f"train.arch is {arch!r}; only {allowed} have an option, which is transform_input=true or false"
        )
    if value not in ("true", "false"):
        raise ConfigError.of("train.arch", arch, f"{library}:{name},transform_input=true or the same with false")
    return library, name, value == "true"


def explicit(arch: str, pretrained: bool) -> str:
    """Write out ``transform_input`` where it depends on whether weights are loaded.

    Args:
        arch: ``train.arch``, of any kind.
        pretrained: whether the network starts from weights, so that torchvision's builder would
            transform its images.
    """
    if not is_library(arch):
        return arch
    library, name, transforms = parse(arch)
    if library != "torchvision" or name.lower() not in _TRANSFORMING:
        return arch
    transforms = pretrained if transforms is None else transforms
    return f"{library}:{name},transform_input={str(transforms).lower()}"


def build(arch: str, num_classes: int, channels: int, image_size: int, *, pretrained: bool) -> nn.Module:
    """Build an untrained network of a library, as the library does where weights will be loaded.

    Raises:
        ConfigError: the network does not take an option or the number of channels.
        Exception: whatever the library raises.
    """
    library, name, transforms = parse(explicit(arch, pretrained))
    if library == "timm":
        timm = importlib.import_module("timm")
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
        return net
    if library == "robustbench":
        from components.models import zoo  # It imports torch.

        return zoo.build(arch)
    if channels != 3:
        raise ConfigError(
            f"data.channels is {channels}, but torchvision's networks take 3: --data.channels 3 "
            "repeats the grey channel"
        )
    options: dict[str, Any] = {}
    if transforms is not None:
        # Weights are loaded over the initial ones, which take a minute to draw.
        options = {"transform_input": transforms, "aux_logits": False, "init_weights": not pretrained}
    elif name.lower().startswith("vit_"):
        options = {"image_size": image_size}
    elif name.lower().startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    models = importlib.import_module("torchvision.models")
    net = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return net


def names(library: str) -> list[str]:
    """Return the names of a library's networks for the classification of images."""
    if library == "timm":
        return list(importlib.import_module("timm").list_models())
    models = importlib.import_module("torchvision.models")
    return list(models.list_models(module=models))


def tensors_for(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's weights to the keys of the network of :func:`build`.

    Weights of auxiliary heads are left out.
    """
    if not is_library(arch):
        return dict(tensors)
    name = parse(arch)[1].lower()
    if name.startswith(_TRANSFORMING):
        return {key: tensor for key, tensor in tensors.items() if not _AUXILIARY.match(key)}
    if name.startswith("densenet"):
        return {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def notes(arch: str, pretrained: str, normalize_mean: tuple[float, ...]) -> list[str]:
    """List what a network of a library does with its images, where a user could expect otherwise.

    There are no notes unless weights are loaded into the network.
    """
    if not is_library(arch) or not pretrained:
        return []
    lines = []
    explicit_arch = explicit(arch, True)
    if explicit_arch != arch:
        lines.append(
            f"built as {explicit_arch}, as torchvision builds it for weights; for weights that were trained without "
            f"it, set the network to {explicit_arch.replace('true', 'false')}"
        )
    if not normalize_mean and not normalizes(arch):
        lines.append(
            f"the weights of {arch.partition(':')[0]} are made for normalised images, and no normalisation is set: "
            "see --train.normalize-mean and --train.normalize-std (ImageNet's usual ones: 0.485 0.456 0.406 and "
            "0.229 0.224 0.225)"
        )
    return lines
