"""An external model as an experiment: ``defendpp attack --model FILE --arch ARCH --data SOURCE``."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from components.attacks.spec import AttackSpec
from components.config import DataConfig, EvaluationConfig, Experiment, PyramidConfig, Shapes, TrainConfig, level_sizes
from components.errors import ConfigError, DataError
from components.evaluation.metrics import standard_eps
from components.fields import MAX_NAME_BYTES
from components.models import libraries, own, zoo
from components.threat_models import BLACK_BOX, WHITE_BOX
from pipeline.cli import timm_model
from pipeline.cli.arguments import has_option, parse_attack
from pipeline.cli.options import parse_overrides
from pipeline.cli.usage import ATTACK_OPTIONS
from pipeline.data import hub
from pipeline.program import program
from pipeline.recipes.suites import full_suite
from pipeline.runtime.storage import Storage
from pipeline.tracking.uri import default_uri
from pipeline.training import exports, pretrained, weights_file

MAX_MODEL_NAME_BYTES = MAX_NAME_BYTES - len("attack-")
_USUAL_NAMES = ("classifier", "model", "pytorch_model")
"""Names of files of weights on the Hugging Face Hub, which tell nothing of the model."""


def parse_external_model(arguments: Sequence[str]) -> Experiment:
    """Return the experiment that attacks an external model.

    Raises:
        ConfigError: --arch is missing and the file does not say what it is, or a value is wrong.
        DataError, StorageError, UserError: the file cannot be read.
    """
    options, rest = parse_attack(arguments)
    tracking_uri = options.tracking_uri or default_uri(Storage(options.storage))
    of_zoo = options.model.startswith(zoo.PREFIX)
    described = _of_zoo(options) if of_zoo else _described(options.model, options.arch, tracking_uri)
    norm = options.norm or "linf"
    default = _experiment(options, described)
    experiment = parse_overrides(default, rest, "attack --model FILE", ATTACK_OPTIONS)
    # The budget and the step sizes follow from the images, which the overrides may describe.
    data = experiment.data
    eps = options.eps or f"{standard_eps(data.channels, data.image_size, norm)}"
    try:
        AttackSpec.parse(f"noise:eps={eps},norm={norm}").check_fits(data.channels, data.image_size)
    except ConfigError as e:
        raise ConfigError(str(e).replace("noise.eps", "--eps", 1)) from None
    if has_option(rest, "--evaluation.attacks"):
        return experiment
    attacks = full_suite(eps, norm, data.channels)
    return replace(experiment, evaluation=replace(experiment.evaluation, attacks=attacks))


def _of_zoo(options: argparse.Namespace) -> tuple[TrainConfig, Shapes]:
    """Return config and shapes of a model of RobustBench, and complete the options that follow from it.

    Raises:
        ConfigError: there is no such model, or --data is missing.
    """
    model = zoo.find(options.model, "--model")
    options.model = options.arch = str(model)
    options.norm = options.norm or model.norm
    options.name = options.name or default_name(model.name)
    if not options.data and model.dataset != "cifar10":
        raise ConfigError(f"--data is missing: name the test images of {model.dataset}, which {model} is for")
    options.data = options.data or "torchvision:cifar10"
    size, classes = model.image_size, model.num_classes
    shapes = Shapes(image_size=size, channels=3, num_classes=classes, sizes=level_sizes(size))
    return TrainConfig(arch=str(model)), shapes


def _experiment(options: argparse.Namespace, described: tuple[TrainConfig, Shapes] | None) -> Experiment:
    """Return the experiment before the overrides. The file may have described its network."""
    if described is None and not options.arch:
        raise ConfigError(
            "--arch is missing: name the network of the weights, since the file does not say it. Only files that this "
            f"project exported do ({program()} attack --help)"
        )
    train, data, pyramids = TrainConfig(), DataConfig(), PyramidConfig()
    if described is not None:
        config, shapes = described
        train = replace(
            train,
            arch=libraries.explicit(config.arch, bool(config.pretrained)),
            width=config.width,
            normalize_mean=config.normalize_mean,
            normalize_std=config.normalize_std,
        )
        data = replace(
            data, image_size=shapes.image_size, channels=shapes.channels, num_classes=shapes.num_classes, resize="none"
        )
        if shapes.sizes != level_sizes(shapes.image_size):
            pyramids = replace(pyramids, levels=len(shapes.sizes))  # The auto-encoder reconstructs these levels.
    name = options.name or default_name(options.model)
    return Experiment(
        name=f"attack-{name}",
        description=f"{options.model}, not trained here, under attack",
        data=replace(data, source=options.data or data.source, download=options.data.startswith("torchvision:")),
        pyramids=pyramids,
        train=replace(
            train,
            arch=options.arch or train.arch,
            shared_blocks=1,  # A network of the user's own may have no blocks to share, and none are needed.
            defense="none",
            pretrained=options.model,
            epochs=0,
        ),
        models=(name,),
        # The threat models need a suite of attacks. Its budget is known later.
        evaluation=EvaluationConfig(attacks=full_suite("0.1"), threat_models=(WHITE_BOX, BLACK_BOX), test_images=1000),
        storage=options.storage,
        tracking_uri=options.tracking_uri,
    )


def default_name(model: str) -> str:
    """Return the name of a model without --name: that of its file, if necessary changed."""
    if model.startswith(hub.PREFIX):
        address = hub.parse(model, "--model")
        file = address.path.rpartition("/")[2]
        model = address.repo.replace(".", "-") if PurePosixPath(file).stem in ("", *_USUAL_NAMES) else file
    text = model.partition("?")[0] if "://" in model else model
    path = PurePosixPath(text.rstrip("/").replace("@", "-"))
    stem = path.parent.name if path.stem == "classifier" and path.parent.name else path.stem
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).lstrip("-.").rstrip("-")
    if len(name.encode()) > MAX_MODEL_NAME_BYTES:  # Keep its beginning, and add a hash that tells it from others.
        begin = name.encode()[: MAX_MODEL_NAME_BYTES - 9].decode(errors="ignore")
        name = f"{begin}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "model"


def _described(model: str, arch: str, tracking_uri: str) -> tuple[TrainConfig, Shapes] | None:
    """Return config and shapes that a file of weights gives for its network, or None.

    Raises:
        DataError: it is no file of weights, or another version of ``arch`` made its weights.
        ConfigError: it names a module, and ``arch`` does not.
    """
    if model.startswith("torchvision:"):
        return None
    text, data, _ = pretrained.read_file(model, tracking_uri, "--model")
    if model.startswith(hub.PREFIX) and not arch and (timm := timm_model.described(text)):
        return timm
    if not weights_file.is_safetensors(data):
        if reason := weights_file.why_no_weights(data, text):
            raise DataError(f"{text} {reason}")
        return None
    try:
        described = exports.described(data)
    except DataError as e:
        raise DataError(f"{text} {e}") from e
    except ValueError as e:
        reason = weights_file.why_no_weights(data, text) or str(e)
        raise DataError(f"{text} is not a whole safetensors file ({reason}); copy it again") from e
    if arch:
        exports.check_source(data, arch, text)
    elif described is not None and own.is_own(described[0].arch):
        named = described[0].arch
        raise ConfigError(
            f"{text} says that {named} builds its network. A file does not decide which code is imported: "
            f"if you trust that module, add --arch {named}"
        )
    return described
