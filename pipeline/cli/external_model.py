"""A classifier that was not trained here, as an experiment: ``main.py attack --model FILE --arch ARCH --data SOURCE``."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import PurePosixPath

from components.attacks.spec import AttackSpec
from components.config import DataConfig, EvaluationConfig, Experiment, PyramidConfig, TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError, DataError
from components.evaluation.metrics import usual_eps
from components.fields import MAX_NAME_BYTES
from components.models import libraries, own
from pipeline.cli.arguments import Parser
from pipeline.recipes.suites import full_suite
from pipeline.runtime.storage import Storage
from pipeline.training import exports, pretrained, weights_file

LONGEST_NAME = MAX_NAME_BYTES - len("attack-")
"""Bytes that are left for a model's name in that of its experiment."""
USAGE = """\
main.py attack --model MODEL [--arch ARCH] [--data SOURCE] [--eps EPS] [--norm linf|l2] [--name NAME] [--FIELD VALUE ...]

  --model  weights: a .safetensors or .pth file (path or URI), mlflow:models:/NAME@ALIAS, mlflow:runs:/ID/PATH, torchvision:WEIGHTS;
           FILE#KEY where a file holds several networks (checkpoint.pth#state_dict_ema)
  --arch   the network: resnet18, ..., torchvision:NAME, timm:NAME, or MODULE:FUNCTION that returns an nn.Module (docs/networks.md).
           torchvision:googlenet and :inception_v3 transform their images as torchvision's own weights want it; for others:
           torchvision:googlenet,transform_input=false
           A file that this project exported knows its own, but does not decide which code is imported: MODULE:FUNCTION must be
           given. The adaptive attack takes the autoencoder.safetensors beside it
  --data   the test images: sample:mnist, parquet:DIR, folder:DIR, torchvision:cifar10, ... (as data.source)
  --eps    budget of the attacks; without it the field's usual one: 0.3 for grey images, 8/255 up to 64 pixels, 4/255 above
  --norm   of that budget
  --name   of the model in the report

The network takes images in [0,1]; what it normalises with goes into --train.normalize-mean and --train.normalize-std.
Image size, channels and classes: --data.image-size, --data.channels, --data.num-classes. How many images: --evaluation.test-images.
"""


def parse(arguments: list[str]) -> tuple[Experiment, list[str]]:
    """The experiment that the arguments ask for, and those that are left: fields of it to be set otherwise.

    Raises:
        ConfigError: a file that does not say what it is, without --arch. DataError, StorageError, UserError: the file cannot
            be read.
    """
    parser = Parser("attack")
    for name in ("--model", "--arch", "--data", "--name", "--norm"):
        parser.add_argument(name, default="")
    parser.add_argument("--eps", default="")
    # an option of tyro's with the same beginning, such as --data.source, is not one of these
    known, rest = parser.parse_known_args(arguments)
    base = _described(known.model, known.arch, _tracking_uri(rest))
    experiment = _experiment(known, base)
    norm = known.norm or "linf"
    if norm not in ("linf", "l2"):
        raise ConfigError.of("--norm", norm, "linf or l2")
    # The budget and the step sizes follow from the images, which options among the rest may describe.
    data = _with(experiment, rest).data
    eps = known.eps or f"{usual_eps(data.channels, data.image_size, norm)}"
    try:
        AttackSpec.parse(f"noise:eps={eps},norm={norm}").check_fits(data.channels, data.image_size)
    except ConfigError as e:
        raise ConfigError(str(e).replace("noise.eps", "--eps", 1)) from None
    evaluation = replace(experiment.evaluation, attacks=full_suite(eps, norm, data.channels))
    return replace(experiment, evaluation=evaluation), rest


def _with(experiment: Experiment, rest: list[str]) -> Experiment:
    import tyro

    return tyro.cli(type(experiment), default=experiment, args=rest, prog="main.py attack --model ...")


def _experiment(known: argparse.Namespace, base: tuple[TrainConfig, Shapes] | None) -> Experiment:
    if base is None and not known.arch:
        raise ConfigError(
            "--arch is missing: name the network that the weights are of, since the file, which this project did not export, "
            "does not say (main.py attack --help)"
        )
    train, data, pyramids = TrainConfig(), DataConfig(), PyramidConfig()
    if base is not None:
        config, shapes = base
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
            pyramids = replace(pyramids, levels=len(shapes.sizes))  # those that its auto-encoder reconstructs
    name = known.name or _name(known.model)
    train = replace(
        train,
        arch=known.arch or train.arch,
        # a network of one's own may have no blocks to share, and none are asked for
        shared_blocks=1,
        defense="none",
        pretrained=known.model,
        epochs=0,
    )
    return Experiment(
        name=f"attack-{name}",
        description=f"{known.model}, not trained here, under attack",
        data=replace(data, source=known.data or data.source, download=known.data.startswith("torchvision:")),
        pyramids=pyramids,
        train=train,
        models=(name,),
        # A suite of any budget has the attacks that each threat model needs. The right budget is known later.
        evaluation=EvaluationConfig(
            attacks=full_suite("0.1"), threat_models=("white_box", "black_box"), test_images=1000
        ),
    )


def _name(model: str) -> str:
    """Return the name in the report of a model without --name: that of its file, as far as it can be one."""
    text = model.partition("?")[0] if "://" in model else model
    path = PurePosixPath(text.rstrip("/").replace("@", "-"))
    stem = path.parent.name if path.stem == "classifier" and path.parent.name else path.stem
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem).lstrip("-.").rstrip("-")
    if len(name.encode()) > LONGEST_NAME:  # its beginning, and what tells it from others that begin so
        begin = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
        name = f"{begin}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "model"


def _tracking_uri(rest: list[str]) -> str:
    """--tracking-uri out of the arguments that are left; without it the database in --storage."""
    from pipeline.tracking import uri

    options = Parser("attack")
    options.add_argument("--tracking-uri", default="")
    options.add_argument("--storage", default=Experiment(name="x").storage)
    known, _ = options.parse_known_args(rest)
    return known.tracking_uri or uri.default_uri(Storage(known.storage))


def _described(model: str, arch: str, tracking_uri: str) -> tuple[TrainConfig, Shapes] | None:
    """Return what a file of weights says of its own network, or None where it says nothing.

    Raises:
        DataError: it is no file of weights, or its weights were made by another version of ``arch``. ConfigError: it names a
            module, which ``arch`` does not.
    """
    if model.startswith("torchvision:"):
        return None
    text, data, _ = pretrained.read_file(model, tracking_uri)
    if not weights_file.is_safetensors(data):
        if reason := weights_file.why_no_weights(data, text):
            raise DataError(f"{text} {reason}")
        return None
    try:
        described = exports.described(data)
    except DataError as e:
        raise DataError(f"{text} {e}") from e
    except ValueError as e:
        reason = weights_file.why_no_weights(data, text) or e
        raise DataError(f"{text} is not a whole safetensors file ({reason}); copy it again") from e
    if arch:
        exports.check_source(data, arch, text)
    elif described is not None and own.is_own(described[0].arch):
        asked = described[0].arch
        raise ConfigError(
            f"{text} says that {asked} builds its network. A file does not decide which code is imported: if you trust that "
            f"module, add --arch {asked}"
        )
    return described
