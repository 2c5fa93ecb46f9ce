"""Networks and weights of RobustBench's model zoo: ``robustbench:DATASET/THREAT_MODEL/ID``.

A network of the zoo takes images in [0,1] and normalises them itself. The package builds it and
loads its weights; this module only finds it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from components.errors import ConfigError, DataError, first_line

PREFIX = "robustbench:"
DIRECTORY = Path("models")
"""RobustBench's own directory of weights, below which they are DATASET/THREAT_MODEL/ID.pt."""
CACHE = Path("~/.cache/defendpp/robustbench")
"""Directory that weights are downloaded to if ``DIRECTORY`` has none of the threat model."""
_IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "imagenet": 224}


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo."""

    dataset: str
    """cifar10, cifar100 or imagenet."""
    threat_model: str
    """Linf, L2 or corruptions."""
    name: str
    """ID of the model, which is unique within data set and threat model."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.dataset}/{self.threat_model}/{self.name}"

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return _IMAGE_SIZES[self.dataset]

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set."""
        return int(_utils().DATASET_CLASSES[_key("BenchmarkDataset", self.dataset)])

    @property
    def norm(self) -> str:
        """Norm of the threat model, as attacks name it."""
        return "l2" if self.threat_model == "L2" else "linf"

    @property
    def directory(self) -> Path:
        """Directory that RobustBench reads the weights from, or downloads them to."""
        here = DIRECTORY / self.dataset / self.threat_model
        return (DIRECTORY if here.is_dir() else CACHE.expanduser()).absolute()


def _utils() -> Any:
    """Return the module robustbench.utils.

    Release 1.1.1 imports two packages at its top that it does not depend on (autoattack and
    pkg_resources), for its own evaluation. Where they are absent, its top is left out.
    """
    if loaded := sys.modules.get("robustbench.utils"):
        return loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They are about timm's and torch's own modules.
        try:
            return importlib.import_module("robustbench.utils")
        except ModuleNotFoundError as e:
            spec = importlib.util.find_spec("robustbench") if e.name in ("autoattack", "pkg_resources") else None
            if spec is None:
                raise
        sys.modules["robustbench"] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module("robustbench.utils")
        finally:
            del sys.modules["robustbench"]


def _key(enum: str, value: str) -> Any:
    return getattr(sys.modules["robustbench.model_zoo.enums"], enum)(value)


def find(text: str, setting: str) -> ZooModel:
    """Return the model of ``robustbench:DATASET/THREAT_MODEL/ID``, or of an unambiguous ID alone.

    Args:
        setting: the field that holds the text, for messages.

    Raises:
        ConfigError: RobustBench is not installed, or has no such model.
    """
    try:
        zoo = _utils().all_models
    except ImportError as e:
        raise ConfigError(
            f"{setting} is {text!r}; the model zoo is in a package of its own ({first_line(e)}): "
            "pip install 'defendpp[robustbench]'"
        ) from None
    known = [
        ZooModel(dataset.value, threat.value, name)
        for dataset, threats in zoo.items()
        for threat, names in threats.items()
        for name in names
    ]
    named = text.removeprefix(PREFIX)
    matching = [model for model in known if named in (model.name, str(model).removeprefix(PREFIX))]
    if not matching:
        raise ConfigError.unknown(
            f"{setting} {PREFIX}",
            named,
            dict.fromkeys(str(model).removeprefix(PREFIX) if "/" in named else model.name for model in known),
            "https://robustbench.github.io",
        )
    if len(matching) > 1:
        raise ConfigError.of(setting, text, f"one of the models of this name: {', '.join(map(str, matching))}")
    return matching[0]


def build(arch: str) -> nn.Module:
    """Build the untrained network of ``robustbench:DATASET/THREAT_MODEL/ID``.

    Raises:
        ConfigError: as :func:`find`, or RobustBench cannot build the network.
    """
    model = find(arch, "train.arch")
    try:
        timm = importlib.import_module("timm")
        # RobustBench looks here first (robustbench.utils.load_model).
        registered = f"{model.name}_{model.dataset}_{model.threat_model}".lower().replace("-", "_")
        if timm.is_model(registered):
            network: nn.Module = timm.create_model(registered, num_classes=model.num_classes)
            return network
        zoo = _utils().all_models
        entry = zoo[_key("BenchmarkDataset", model.dataset)][_key("ThreatModel", model.threat_model)][model.name]
        built: nn.Module = entry["model"]()
        return built
    except Exception as e:  # A builder may need a package that is absent, or a download.
        raise ConfigError(f"{model}: RobustBench cannot build it ({type(e).__name__}: {first_line(e)})") from e


def load(text: str) -> nn.Module:
    """Load a model by RobustBench's own loader, which downloads weights that are not there.

    Raises:
        ConfigError: as :func:`find`.
        DataError: the weights cannot be downloaded or loaded.
    """
    model = find(text, "train.pretrained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = _utils().load_model(
                model.name, model_dir=model.directory, dataset=model.dataset, threat_model=model.threat_model
            )
        return network
    except Exception as e:  # gdown, requests, torch and timm raise errors of many types.
        file = model.directory / model.dataset / model.threat_model / f"{model.name}.pt"
        raise DataError(
            f"{model}: its weights cannot be loaded or downloaded ({type(e).__name__}: {first_line(e)}). Where there "
            f"is no internet, copy the file that RobustBench downloads to {file}"
        ) from e
