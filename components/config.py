"""Every setting of a run, as frozen keyword-only dataclasses with units, validated when they are made.

A recipe (``pipeline/recipes.py``) is a function that returns a complete :class:`Experiment`; the command line overrides
any field of it. Section numbers are those of Liu et al., "Defending Adversarial Examples via DNN Bottleneck
Reinforcement", ACM MM 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from components.errors import ConfigError

MIN_LEVEL_SIZE = 7
"""No loss is put on an output smaller than 7x7 pixels (sec. 3.4)."""
MAX_LEVELS = 4
MAX_IMAGE_SIZE = 2**14
"""One image of this size in RGB takes 800 MB: a larger one is a mistake."""
MAX_WIDTH = 4096
"""A ResNet-18 of this width takes 180 GB: a larger one is a mistake."""
MAX_CLASSES = 10**6
"""ImageNet-21k has 21,841 classes. The last layer of a standard network takes 2 to 8 GB for a million."""
FIGURES = ("fig2", "fig5", "fig6", "fig7", "fig8")
PRINTED_IN = (*(f"table{i}" for i in range(1, 9)), "sec4.2", "sec4.3", "sec4.5")
"""Where the paper prints numbers: its tables and three sections of its text."""

ENCODER_BLOCKS: dict[str, int] = {"resnet18": 4, "resnet50": 4, "vgg16": 5, "vgg16_bn": 5}
"""How many encoder blocks each architecture has: the upper bound of ``shared_blocks``."""
SEED_STRIDE = 1000
"""Between the seeds of two replicates of a model: far more than a recipe has models."""
MAX_NAME_BYTES = 100
"""Longest name of an experiment or a model. A file system allows 255 bytes, and names are combined and given suffixes."""


def level_sizes(image_size: int, levels: int = 0) -> tuple[int, ...]:
    """Side lengths in pixels of the reconstruction levels: W, W/2, W/4, ... (floor), none under 7, at most four.

    ``levels`` = 0 takes as many as that rule allows; otherwise exactly so many.

    Raises:
        ConfigError: the image or the last level asked for is smaller than 7x7 pixels (sec. 3.4).
    """
    if image_size < MIN_LEVEL_SIZE:
        raise ConfigError.of("data.image_size", image_size, f"at least {MIN_LEVEL_SIZE} pixels (sec. 3.4)")
    if image_size > MAX_IMAGE_SIZE:
        raise ConfigError.of("data.image_size", image_size, f"at most {MAX_IMAGE_SIZE} pixels")
    sizes = [image_size // 2**m for m in range(MAX_LEVELS) if image_size // 2**m >= MIN_LEVEL_SIZE]
    if levels == 0:
        return tuple(sizes)
    if not 1 <= levels <= len(sizes):
        raise ConfigError.of(
            "pyramids.levels",
            levels,
            f"1 to {len(sizes)} at image size {image_size}: no level under {MIN_LEVEL_SIZE}x{MIN_LEVEL_SIZE} pixels "
            f"(sec. 3.4) and at most {MAX_LEVELS}; 0 takes as many as that allows",
        )
    return tuple(sizes[:levels])


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    # not(ok) also catches comparisons with NaN, which are False
    if not ok:
        raise ConfigError.of(name, value, allowed)


def is_name(name: str) -> bool:
    """Tell whether a name can be part of a path, a URI and an MLflow name on every system."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and len(name.encode()) <= MAX_NAME_BYTES


def check_name(where: str, name: str) -> None:
    """Refuse a name that could leave the storage's directories or that one of them does not take.

    Every name that becomes part of a path comes through here: of experiments, models and search spaces.

    Args:
        where: what has the name, as the user knows it.

    Raises:
        ConfigError: an empty or a long name, or one with other characters.
    """
    allowed = (
        f"1 to {MAX_NAME_BYTES} bytes of letters, digits, _ - + and ., beginning with a letter, a digit or _: "
        "it becomes part of a path"
    )
    _check(is_name(name), where, name, allowed)


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; finding them out parses their text, so once is enough."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def is_int64(value: float) -> bool:
    """Tell whether a whole number has at most 64 bits, as seeds, sizes and tensors have."""
    return -(2**63) <= value < 2**63


def _check_values(config: Any, prefix: str) -> None:
    """Refuse a value outside a field's Literal, which dataclasses do not, and a whole number of more than 64 bits."""
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        where = f"{prefix}.{f.name}".removeprefix(".")
        if typing.get_origin(hints[f.name]) is Literal:
            allowed = typing.get_args(hints[f.name])
            _check(value in allowed, where, value, "one of " + ", ".join(map(repr, allowed)))
        elif isinstance(value, int):
            _check(is_int64(value), where, value, "a number from -2**63 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and what they must look like."""

    source: str = "sample:mnist"
    """KIND:WHERE. sample:mnist (bundled), parquet:DIR (Hugging Face image layout), folder:DIR (DIR/train/CLASS/*,
    DIR/test/CLASS/*; see test_split), torchvision:mnist or torchvision:cifar10 (see root and download)."""
    root: str = ""
    """Directory of torchvision's files (only for torchvision:...). Empty: ~/.cache/defendpp."""
    download: bool = False
    """Let torchvision download what root lacks."""
    image_size: int = 28
    """Height and width in pixels; an image of another size is an error, unless resize says otherwise."""
    resize: Literal["none", "crop"] = "none"
    """crop: the shorter side is resized to image_size, then the centre is cut out (ImageNet's way)."""
    channels: int = 1
    """1 (grey) or 3 (RGB); images of the other mode are converted."""
    num_classes: int = 10
    """Labels are 0..num_classes-1."""
    class_order: Literal["", "text", "number"] = ""
    """Order of folder:DIR's class folders, which are labels 0, 1, ...: text (10 before 2, torchvision's) or number (2 before 10,
    timm's). Empty: where the two differ, refuse."""
    test_split: str = ""
    """Name of the source's split that the test images are taken from: validation, val, or another one that it has. Empty: test,
    or else validation, valid or val. train only where nothing is trained."""
    image_column: str = ""
    """Column of parquet:DIR with the images. Empty: image or img, or the only column of images."""
    label_column: str = ""
    """Column of parquet:DIR with the labels. Empty: label or labels, or the only column that is named like labels."""
    allow_empty_classes: bool = False
    """Accept a test split, or a training split without train_limit, in which a class has no image."""
    validation_fraction: float = 0.1
    """Share of the training images held out, by a seeded hash of the sample index. 0 at the paper's scale."""
    split_seed: int = 0
    """Seed of that hash."""
    train_limit: int = 0
    """Use so many training images, drawn over the whole split by subset_seed, before the validation split. 0: all."""
    test_limit: int = 0
    """Use so many test images, drawn over the whole split by subset_seed. 0: all."""
    subset_seed: int = 0
    """Seed of the order in which images are drawn for train_limit, test_limit and evaluation.test_images. The draw of N images is
    the beginning of the draw of more."""

    def __post_init__(self) -> None:
        kind, _, where = self.source.partition(":")
        _check(
            kind in ("sample", "parquet", "folder", "torchvision") and bool(where),
            "data.source",
            self.source,
            "sample:mnist, parquet:DIR, folder:DIR, torchvision:mnist or torchvision:cifar10",
        )
        _check_values(self, "data")
        level_sizes(self.image_size)
        _check(self.channels in (1, 3), "data.channels", self.channels, "1 (grey) or 3 (RGB)")
        _check(self.num_classes >= 2, "data.num_classes", self.num_classes, "at least 2")
        _check(self.num_classes <= MAX_CLASSES, "data.num_classes", self.num_classes, f"at most {MAX_CLASSES}")
        _check(0 <= self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "in [0, 1)")
        _check(self.train_limit >= 0, "data.train_limit", self.train_limit, "0 (all) or more")
        _check(self.test_limit >= 0, "data.test_limit", self.test_limit, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The multi-scale reconstruction targets (sec. 3.3) and how they are stored."""

    levels: int = 0
    """Number of levels M. 0: W, W/2, W/4, ... down to 7 pixels, at most four."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of levels 1..M-1 (level 0 is the uint8 image itself)."""
    rows_per_shard: int = 0
    """Images per Parquet shard: the unit of work, of resumption and of memory. 0: as many as make about 32 MB, at most 16384."""

    def __post_init__(self) -> None:
        _check_values(self, "pyramids")
        _check(0 <= self.levels <= MAX_LEVELS, "pyramids.levels", self.levels, f"0 (by rule) to {MAX_LEVELS}")
        _check(self.rows_per_shard >= 0, "pyramids.rows_per_shard", self.rows_per_shard, "0 (by size) or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One model: its network, its defense and its optimisation."""

    arch: str = "resnet18"
    """The classifier, untouched by the defense (sec. 3.1, 4.5): resnet18, resnet50, vgg16, vgg16_bn, or MODULE:FUNCTION, your
    own (docs/networks.md). Undefended also torchvision:NAME and timm:NAME, those libraries' networks of that name."""
    width: int = 64
    """Channels of the first stage; 64 is the standard network, less is for tests and demos."""
    pretrained: str = ""
    """Weights to start from: a .safetensors or .pth file (path or URI), mlflow:models:/NAME@ALIAS or mlflow:runs:/ID/PATH, or
    torchvision:NAME such as torchvision:IMAGENET1K_V1 (downloaded, or out of torch's cache). Empty: none."""
    replace_head: bool = False
    """Take all pretrained weights but those of the last layer, for another number of classes."""
    defense: Literal["none", "defend++", "adversarial", "comdefend"] = "defend++"
    """none: the classifier alone. defend++: with the auto-encoder (sec. 3.3). adversarial: the classifier trained on examples
    made online. comdefend: a reformer in front of the undefended classifier (Jia et al. 2019)."""
    decoder: Literal["pyramid", "hourglass", "hourglass_concat", "hourglass_add"] = "pyramid"
    """pyramid: U and H modules (Fig. 4). hourglass (Fig. 3), with concatenated or added skips: Table 1's ablation."""
    targets: Literal["lowpass", "linear", "none"] = "lowpass"
    """lowpass: DCT low-pass images (the paper's MS-LP). linear: bilinear (MS-LI). none: level 0 only (w/o MS-LP)."""
    shared_blocks: int = 4
    """Encoder blocks, from the input on, whose weights classifier and auto-encoder share (sec. 3.4, 4.2)."""
    lam: float = 0.01
    """lambda of eq. 3: weight of levels 1..M-1 against level 0."""
    reconstruction_weight: float = 1.0
    """w of L = L_cls + w * L_rec (the paper has 1)."""
    reconstruction_reduction: Literal["mean", "sum"] = "mean"
    """Reading of eq. 3's squared norm: mean or sum over pixels (mean over the batch either way)."""
    noise_location: Literal["none", "latent", "input"] = "none"
    """Where Gaussian noise is added during training (sec. 4.2, "ours + GN"); with defense none and defend++ only."""
    noise_sigma: float = 0.1
    """Standard deviation of that noise, in units of the tensor it is added to."""
    adversarial_attack: Literal["fgsm", "pgd", "ddn"] = "fgsm"
    """adversarial only: what makes the examples."""
    adversarial_eps: float = 0.2
    """adversarial only, fgsm and pgd: largest Linf norm, in units of images in [0,1]."""
    adversarial_steps: int = 10
    """adversarial only, pgd and ddn: steps per example; pgd's step size is 2.5 eps / steps."""
    adversarial_max_norm: float = 0.0
    """adversarial only: the perturbation is shortened to this L2 norm (Rony et al. 2019: 2.4 on MNIST, 1 on CIFAR-10). 0: not."""
    adversarial_share: float = 1.0
    """adversarial only: weight of the examples' loss, against that of the clean images (Goodfellow et al. 2015: 0.5)."""
    adversarial_epochs: int = 0
    """adversarial only: the last so many epochs are adversarial, those before are clean. 0: all."""
    reformer_sigma: float = 20.0
    """comdefend only: standard deviation of the noise on its code during training."""
    augment: Literal["none", "flip", "crop_flip"] = "none"
    """flip: horizontal, half of the images; stored levels are flipped with them. crop_flip: also a random crop after padding by
    crop_padding; levels are computed anew on the training device."""
    crop_padding: int = 4
    """crop_flip only: pixels of zeros on each side."""
    schedule: Literal["joint", "alternating"] = "joint"
    """joint: one backward of L. alternating: cycles of auto-encoder epochs, then classifier epochs, then joint."""
    epochs: int = 4
    """Epochs in all, every phase counted. 0: the weights that ``pretrained`` names are evaluated as they are."""
    cycles: int = 3
    """Alternating only: how many (auto-encoder, classifier) cycles come before joint training."""
    autoencoder_epochs: int = 5
    """Alternating only: epochs on L_rec alone in each cycle."""
    classifier_epochs: int = 5
    """Alternating only: epochs on L_cls alone in each cycle."""
    batch_size: int = 256
    """Images per optimisation step over all workers together."""
    lr: float = 0.1
    """Peak (one_cycle) or initial (step) learning rate."""
    lr_schedule: Literal["one_cycle", "step"] = "one_cycle"
    """one_cycle: linear warm-up over 30 % of the steps, then cosine to zero. step: x lr_gamma every lr_step_epochs."""
    lr_step_epochs: int = 100
    """step only: epochs between two drops. 0: a third of ``epochs``, rounded up, as the paper's 100 of 300."""
    lr_gamma: float = 0.1
    """step only: factor of a drop."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum (the paper's), or Adam (what ComDefend was trained with)."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """Weight decay."""
    clip_norm: float = 0.0
    """Largest L2 norm of the gradient; a longer one is scaled down. 0: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; weights stay float32. float32 on a GPU has TF32 in convolutions, as is PyTorch's
    default. Validation is in true float32 either way."""
    channels_last: bool = False
    """Memory format of the network: faster on GPU and with bfloat16 on CPU (refused with float32 on CPU)."""
    normalize_mean: tuple[float, ...] = ()
    """Per-channel mean that the network itself subtracts from [0,1] images; empty: none."""
    normalize_std: tuple[float, ...] = ()
    """Per-channel standard deviation that the network divides by; empty: none."""
    seed: int = 0
    """Initial weights, order of the images and noise all follow from it."""
    checkpoint_every_epochs: int = 1
    """Epochs between two checkpoints."""

    @property
    def kind(self) -> str:
        """One word for file names."""
        return {"none": "undefended", "defend++": "defended"}.get(self.defense, self.defense)

    @property
    def relative_cost(self) -> float:
        """About how long training takes, for sharing out models: an epoch of the bare classifier is 1."""
        if self.defense == "adversarial":
            return self.epochs * (1.0 + 0.7 * (1 if self.adversarial_attack == "fgsm" else self.adversarial_steps))
        return self.epochs * (1.0 if self.defense == "none" else 2.0)

    def canonical(self) -> TrainConfig:
        """The same model with every setting that has no influence on it at its default, so that it is trained once."""
        unused = {"checkpoint_every_epochs"}
        if not self.epochs:
            kept = {"arch", "width", "pretrained", "epochs", "normalize_mean", "normalize_std", "defense"}
            unused |= {f.name for f in dataclasses.fields(self)} - kept
        if self.defense != "defend++":
            unused |= {
                "decoder",
                "targets",
                "shared_blocks",
                "lam",
                "reconstruction_weight",
                "reconstruction_reduction",
            }
            unused |= {"schedule"}
        elif self.targets == "none" or (self.reconstruction_weight == 0 and self.schedule == "joint"):
            unused |= {"lam"}  # eq. 3 has no level that lambda weighs
        if self.defense == "comdefend":
            unused |= {"arch", "pretrained", "replace_head", "normalize_mean", "normalize_std"}
        else:
            unused |= {"reformer_sigma"}
        if self.defense != "adversarial":
            unused |= {f.name for f in dataclasses.fields(self) if f.name.startswith("adversarial_")}
        elif self.adversarial_attack == "ddn":
            unused |= {"adversarial_eps"}
        elif self.adversarial_attack == "fgsm":
            unused |= {"adversarial_steps"}
        if self.noise_location == "none" or self.noise_sigma == 0:
            unused |= {"noise_location", "noise_sigma"}
        if self.schedule == "joint" or "schedule" in unused:
            unused |= {"cycles", "autoencoder_epochs", "classifier_epochs"}
        if self.lr_schedule == "one_cycle":
            unused |= {"lr_step_epochs", "lr_gamma"}
        if self.augment != "crop_flip":
            unused |= {"crop_padding"}
        if self.optimizer == "adam":
            unused |= {"momentum"}
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in unused})

    def __post_init__(self) -> None:
        _check_values(self, "train")
        own = ":" in self.arch
        _check(
            own or self.arch in ENCODER_BLOCKS,
            "train.arch",
            self.arch,
            ", ".join(ENCODER_BLOCKS) + " or MODULE:FUNCTION (docs/networks.md)",
        )
        _check(self.width >= 1, "train.width", self.width, "at least 1 channel")
        _check(self.width <= MAX_WIDTH, "train.width", self.width, f"at most {MAX_WIDTH} channels")
        if own:  # how many blocks it has is known when it is built
            _check(self.shared_blocks >= 1, "train.shared_blocks", self.shared_blocks, "at least 1")
        else:
            blocks = ENCODER_BLOCKS[self.arch]
            _check(
                1 <= self.shared_blocks <= blocks,
                "train.shared_blocks",
                self.shared_blocks,
                f"1 to {blocks} ({self.arch} has {blocks} encoder blocks)",
            )
        _check(
            self.replace_head is False or bool(self.pretrained),
            "train.replace_head",
            self.replace_head,
            "False where no weights are given (--train.pretrained FILE)",
        )
        _check(0 < self.adversarial_eps <= 1, "train.adversarial_eps", self.adversarial_eps, "above 0, at most 1")
        _check(self.adversarial_steps >= 1, "train.adversarial_steps", self.adversarial_steps, "at least 1")
        _check(
            self.noise_location == "none" or self.defense in ("none", "defend++"),
            "train.noise_location",
            self.noise_location,
            f"none with defense={self.defense!r}, whose training adds no such noise; set it on the models that have it, "
            "as in --models NAME:noise_location=latent",
        )
        _check(
            0 < self.adversarial_share <= 1,
            "train.adversarial_share",
            self.adversarial_share,
            "above 0 (no example would count; that is defense='none'), at most 1",
        )
        _check(self.epochs >= 0, "train.epochs", self.epochs, "0 or more")
        _check(
            0 <= self.adversarial_epochs <= self.epochs,
            "train.adversarial_epochs",
            self.adversarial_epochs,
            f"0 (all) to train.epochs={self.epochs}",
        )
        _check(self.crop_padding >= 1, "train.crop_padding", self.crop_padding, "at least 1 pixel")
        for name in (
            "lam",
            "reconstruction_weight",
            "noise_sigma",
            "weight_decay",
            "clip_norm",
            "adversarial_max_norm",
        ):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"train.{name}", value, "a finite number, 0 or more")
        for name in ("lr", "lr_gamma", "reformer_sigma"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"train.{name}", value, "a finite number above 0")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        if self.epochs == 0:
            _check(
                bool(self.pretrained) and self.defense == "none" and not self.replace_head,
                "train.epochs",
                0,
                "at least 1; 0 takes given weights as they are: with --train.pretrained FILE and --train.defense none, "
                "without --train.replace-head",
            )
        _check(
            self.lr_step_epochs >= 0,
            "train.lr_step_epochs",
            self.lr_step_epochs,
            "at least 0 (0: a third of the epochs)",
        )
        for name in ("batch_size", "checkpoint_every_epochs"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _check(
            all(math.isfinite(m) for m in self.normalize_mean),
            "train.normalize_mean",
            self.normalize_mean,
            "finite numbers",
        )
        _check(
            len(self.normalize_mean) == len(self.normalize_std) and all(0 < s < math.inf for s in self.normalize_std),
            "train.normalize_std",
            self.normalize_std,
            "as many values as train.normalize_mean, all finite and above 0",
        )
        # where there is no auto-encoder to alternate with, the schedule says nothing
        if self.schedule == "alternating" and self.defense == "defend++":
            for name in ("cycles", "autoencoder_epochs", "classifier_epochs"):
                _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
            alternating = self.cycles * (self.autoencoder_epochs + self.classifier_epochs)
            _check(
                self.epochs >= alternating,
                "train.epochs",
                self.epochs,
                f"at least cycles * (autoencoder_epochs + classifier_epochs) = {alternating}; the rest is joint",
            )
        # "1" and "1.0" are the same setting: of one type, they have the same hash
        for name, hint in _hints(type(self)).items():
            if hint is float and isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a network must know of the data."""

    image_size: int
    channels: int
    num_classes: int
    sizes: tuple[int, ...]
    """Level sizes in pixels, level 0 first; the decoder has them all, whatever has a target."""


def stored_levels(config: TrainConfig) -> bool:
    """Whether training reads levels from the shards: not without targets for them, nor where crops need new ones."""
    return config.defense == "defend++" and config.targets != "none" and config.augment != "crop_flip"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What attacks what. No accuracy leaves this project without its threat model."""

    attacks: tuple[str, ...] = (
        "noise:eps=0.2",
        "fgsm:eps=0.2",
        "bim:eps=0.2,steps=100",
        "pgd:eps=0.2,steps=100",
        "cw",
        "ddn:steps=100",
    )
    """Attack specs, NAME or NAME:FIELD=VALUE,... (see components/attacks/spec.py)."""
    threat_models: tuple[str, ...] = ("white_box", "transfer")
    """white_box: examples made on the very model under test. black_box: the same from its scores alone (the attacks that need no
    gradients). transfer: made on transfer_source (for a model behind a reformer whose classifier that is, it is called
    grey_box). transfer:NAME: made on the model NAME; transfer:*: on each of them in turn, but for what transfer has already."""
    transfer_source: str = ""
    """The undefended model on which transferred examples are made. Empty: for each model, the first undefended one of the same
    architecture and width."""
    test_images: int = 0
    """Attack so many test images, drawn over the whole test split by data.subset_seed. 0: all."""
    chunk_size: int = 50
    """Images per chunk: the unit of random stream, record and resumption. Another value is another result."""
    seed: int = 0
    """Seed of the attacks' random streams."""
    search_precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: BIM, PGD and adaptive search on a bfloat16 copy of the network, in less time where the hardware has such
    arithmetic. Every verdict is float32 either way. Another value is another result (docs/evaluation.md)."""
    reliability_images: int = 32
    """How many of the attacked images the reliability probe and the active test of each attack use (docs/reliability.md). 0: neither
    is done."""

    def __post_init__(self) -> None:
        from components.attacks.spec import AttackSpec

        _check_values(self, "evaluation")
        texts: dict[str, str] = {}
        for attack in self.attacks:
            canonical = str(AttackSpec.parse(attack))
            if canonical in texts:
                raise ConfigError(
                    f"evaluation.attacks must have each attack once; {texts[canonical]} and {attack} are both {canonical}: "
                    "leave one out"
                )
            texts[canonical] = attack
        _check(bool(self.attacks), "evaluation.attacks", self.attacks, "at least one attack, e.g. pgd:eps=0.2")
        _check(
            len(set(self.threat_models)) == len(self.threat_models) > 0,
            "evaluation.threat_models",
            self.threat_models,
            "at least one threat model, and each of them once",
        )
        for threat in self.threat_models:
            _check(
                threat in ("white_box", "black_box", "transfer")
                or (threat.startswith("transfer:") and len(threat) > 9),
                "evaluation.threat_models",
                threat,
                "one of white_box, black_box, transfer, transfer:NAME and transfer:*",
            )
        _check(self.test_images >= 0, "evaluation.test_images", self.test_images, "0 (all) or more")
        _check(self.chunk_size >= 1, "evaluation.chunk_size", self.chunk_size, "at least 1")
        images = self.reliability_images
        _check(images >= 0, "evaluation.reliability_images", images, "0 (no such test) or more")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What the run may use of the cluster. Only ``workers`` changes a result (batch norm is per worker)."""

    workers: int = 1
    """Data-parallel training workers (DDP ranks)."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that Ray reserves for a training worker."""
    threads_per_worker: int = 1
    """PyTorch threads of a training worker and of an attack task."""
    gpu: bool = False
    """Give each training worker one GPU (NCCL); otherwise CPU (gloo)."""
    cpus_per_attack: float = 1.0
    """Logical CPUs that Ray reserves for an attack task."""
    gpus_per_attack: float = 0.0
    """GPUs (a fraction is allowed) that Ray reserves for an attack task; 0: CPU."""
    chunks_per_attack: int = 1
    """Chunks that one attack task computes one after the other; more of them spare a GPU the start of so many tasks."""
    parallel_models: int = 0
    """Models trained side by side, each on its own workers. 0: as many as there is room for."""
    wait_s: float = 0.0
    """On a cluster that grows: seconds to wait for nodes that the run needs and that are not there yet."""
    max_failures: int = 3
    """How often a training run is started again from its last checkpoint after a worker or node died."""

    def __post_init__(self) -> None:
        _check_values(self, "scaling")
        _check(self.workers >= 1, "scaling.workers", self.workers, "at least 1")
        _check(self.chunks_per_attack >= 1, "scaling.chunks_per_attack", self.chunks_per_attack, "at least 1")
        _check(self.threads_per_worker >= 1, "scaling.threads_per_worker", self.threads_per_worker, "at least 1")
        for name in ("cpus_per_worker", "cpus_per_attack"):
            _check(0 < getattr(self, name) < math.inf, f"scaling.{name}", getattr(self, name), "above 0")
        _check(0 <= self.gpus_per_attack < math.inf, "scaling.gpus_per_attack", self.gpus_per_attack, "0 or more")
        _check(0 <= self.wait_s < math.inf, "scaling.wait_s", self.wait_s, "0 or more seconds")
        _check(self.parallel_models >= 0, "scaling.parallel_models", self.parallel_models, "0 (room decides) or more")
        _check(self.max_failures >= 0, "scaling.max_failures", self.max_failures, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete run: data, targets, models, attacks, resources and where everything is kept."""

    name: str
    """Name of the recipe; also names the MLflow parent run."""
    description: str = ""
    """One line: what it shows."""
    data: DataConfig = field(default_factory=DataConfig)
    pyramids: PyramidConfig = field(default_factory=PyramidConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """What all models have in common."""
    models: tuple[str, ...] = (
        "no_defense:defense=none,seed=0",
        "control:defense=none,seed=1",
        "defend:defense=defend++,seed=1",
    )
    """The models compared, NAME or NAME:FIELD=VALUE,... where FIELD is one of train's."""
    seeds: int = 1
    """How many replicates of each model, from seeds that are SEED_STRIDE apart; above 1, the report gives mean and spread."""
    allow_diverged: bool = False
    """Go on without a model whose loss was not finite, and say so in the report, instead of stopping before the attacks."""
    paper: str = ""
    """The table of the paper (table1 ... table8) whose values the report prints beside; model names are its rows'."""
    figures: tuple[str, ...] = ()
    """Figures of the paper that the report draws from this run: fig2, fig5, fig6, fig7, fig8."""
    scale: str = ""
    """smoke, fast or paper, where the recipe is one of a table's; stands beside its numbers."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    storage: str = "~/defendpp"
    """Where shards, models and records are kept: an absolute path or a URI (s3://bucket/path) that every node reaches."""
    tracking_uri: str = ""
    """MLflow server (http://...) or database (sqlite:///...). Empty: $MLFLOW_TRACKING_URI, or mlflow.db in a local storage."""
    experiment_name: str = ""
    """MLflow experiment that the run is published in. Empty: $MLFLOW_EXPERIMENT_NAME, or defendpp."""

    def __post_init__(self) -> None:
        from components.attacks.spec import AttackSpec

        check_name("name", self.name)
        _check_values(self, "")
        _check(bool(self.models), "models", self.models, "at least one model, e.g. --models undefended:defense=none")
        _check(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        _check(self.paper in ("", *PRINTED_IN), "paper", self.paper, f"empty or one of {', '.join(PRINTED_IN)}")
        for figure in self.figures:
            _check(figure in FIGURES, "figures", figure, f"one of {', '.join(FIGURES)}")
        for attack in self.evaluation.attacks:
            AttackSpec.parse(attack).check_fits(self.data.channels, self.data.image_size)
        sizes = level_sizes(self.data.image_size, self.pyramids.levels)
        variants = self.variants()
        longest = math.sqrt(self.data.channels) * self.data.image_size
        for name, config in variants.items():
            _check(
                config.adversarial_max_norm <= longest,
                f"models[{name}].adversarial_max_norm",
                config.adversarial_max_norm,
                f"at most {longest:.4g}, the longest L2 perturbation of these images in [0,1]",
            )
            if config.normalize_mean:
                _check(
                    len(config.normalize_mean) == self.data.channels,
                    f"models[{name}].normalize_mean",
                    config.normalize_mean,
                    f"one value per channel ({self.data.channels})",
                )
            if config.defense == "defend++" and len(sizes) < 2:
                if self.pyramids.levels == 1:
                    raise ConfigError.of("pyramids.levels", 1, "0 or at least 2 for Defend++")
                raise ConfigError.of(
                    "data.image_size", self.data.image_size, "at least 14 pixels for Defend++ (two levels)"
                )
            # PyTorch 2.14.1 on an AVX2 processor: the weight gradient of a stride-2 1x1 convolution (every ResNet's
            # downsampling) writes outside its memory in this format; bfloat16, plain format and GPU do not
            _check(
                not config.channels_last or config.precision != "float32" or self.scaling.gpu,
                f"models[{name}].channels_last",
                config.channels_last,
                "False in float32 on a CPU, where PyTorch's channels-last gradients corrupt memory: "
                "use --train.precision bfloat16 or --scaling.gpu",
            )
            _check(
                config.batch_size % self.scaling.workers == 0,
                f"models[{name}].batch_size",
                config.batch_size,
                f"a multiple of scaling.workers ({self.scaling.workers})",
            )
        for name, config in variants.items():
            _check(
                config.epochs > 0 or self.seeds == 1,
                f"models[{name}].epochs",
                0,
                "at least 1 where seeds is above 1: weights that are given have no other seed",
            )
        self._check_seeds()
        bases = set(self.bases().values())
        explicit = self.evaluation.transfer_source
        if explicit and "transfer" in self.evaluation.threat_models:
            undefended = {base for base, config in self.firsts().items() if config.defense == "none"}
            _check(
                explicit in undefended,
                "evaluation.transfer_source",
                explicit,
                f"the name of an undefended model out of models ({', '.join(sorted(undefended)) or 'there is none'})",
            )
        for threat in self.evaluation.threat_models:
            _, _, named = threat.partition(":")
            _check(
                not named or named == "*" or named in bases,
                "evaluation.threat_models",
                threat,
                f"transfer: and one of the models {', '.join(sorted(bases))}",
            )
        for name, config in variants.items():
            needs = "transfer" in self.evaluation.threat_models or config.defense == "comdefend"
            if needs and config.defense != "none" and self.source_of(name) is None:
                raise ConfigError(
                    f"models: {name} needs an undefended model beside it, "
                    + ("which stands behind the reformer" if config.defense == "comdefend" else "for transfer")
                    + f": add one, e.g. undefended:defense=none,arch={config.arch},width={config.width}"
                )
        self._check_threat_models()

    def _check_threat_models(self) -> None:
        """Refuse threat models under none of which a model would be attacked."""
        remedies = [self._idle(threat) for threat in self.evaluation.threat_models]
        if all(remedies):
            raise ConfigError.of("evaluation.threat_models", ", ".join(self.evaluation.threat_models), remedies[0])

    def _idle(self, threat: str) -> str:
        """Return what a threat model lacks to attack any model; empty where it does."""
        from components.attacks.spec import AttackSpec

        kind, _, base = threat.partition(":")
        if kind == "black_box":
            specs = [AttackSpec.parse(attack) for attack in self.evaluation.attacks]
            if not any(not spec.needs_gradients and spec.name != "noise" for spec in specs):
                return (
                    "left out, or --evaluation.attacks must have an attack that needs no gradients, e.g. square:eps=0.2"
                )
        elif kind == "transfer":
            sources = set(self.bases().values()) if base == "*" else {base}
            if not any(self.source_of(name, source) for name in self.variants() for source in sources):
                return "left out, or --models must have a second model to make the examples on"
        return ""

    def _check_seeds(self) -> None:
        """Refuse a control that is its own source, replicates that are one network, and a seed without influence."""
        _check_twins(self.models, self.train, self.seeds)
        named = all("seed" in parse_spec(text)[1] for text in self.models)
        _check(
            self.train.seed == 0 or not named,
            "train.seed",
            self.train.seed,
            "0 where each of models names a seed of its own, as the recipes' do: "
            "set it there (--models NAME:seed=7,...), or ask for replicates (--seeds N)",
        )

    def _expanded(self) -> dict[str, tuple[str, int, TrainConfig]]:
        return _expand(self.models, self.train, self.seeds)

    def variants(self) -> dict[str, TrainConfig]:
        """The complete training config of each model, by name, in the order of ``models``; replicates end in -s0, -s1, ...

        Raises:
            ConfigError: a model is named twice, or names a field or value that ``train`` does not have.
        """
        return {name: config for name, (_, _, config) in self._expanded().items()}

    def replicates(self) -> dict[str, tuple[str, int]]:
        """Name of each model -> its name in ``models``, and which replicate of it this is."""
        return {name: (base, replicate) for name, (base, replicate, _) in self._expanded().items()}

    def bases(self) -> dict[str, str]:
        """Name of each model -> its name in ``models``."""
        return {name: base for name, (base, _, _) in self._expanded().items()}

    @property
    def trains(self) -> bool:
        """Tell whether any model is trained; those that are given need the test images alone."""
        return any(config.epochs for config in self.variants().values())

    def firsts(self) -> dict[str, TrainConfig]:
        """Each name in ``models`` -> the config of its first replicate."""
        return {base: config for base, replicate, config in self._expanded().values() if replicate == 0}

    def source_of(self, name: str, base: str = "") -> str | None:
        """The model on which examples are made that are then shown to ``name``; of the same replicate. None: itself or none.

        Args:
            base: a name out of ``models`` (of ``transfer:NAME``). Empty: as ``evaluation.transfer_source`` says.
        """
        models = self._expanded()
        _, replicate, config = models[name]
        base = base or self.evaluation.transfer_source
        for other, (other_base, other_replicate, other_config) in models.items():
            if other_replicate != replicate:
                continue
            same_network = (other_config.arch, other_config.width) == (config.arch, config.width)
            if other_base == base or (not base and other_config.defense == "none" and same_network):
                return None if other == name else other
        return None


@functools.lru_cache(maxsize=64)
def _expand(models: tuple[str, ...], train: TrainConfig, seeds: int) -> dict[str, tuple[str, int, TrainConfig]]:
    """Name of each model -> its name in ``models``, which replicate of it this is, and its config. Not to be changed."""
    out: dict[str, tuple[str, int, TrainConfig]] = {}
    for text in models:
        base, overrides = parse_spec(text)
        config = replace_typed(train, overrides, f"models[{base}]")
        for replicate in range(seeds):
            name = base if seeds == 1 else f"{base}-s{replicate}"
            if name in out:
                raise ConfigError(f"models: two models have the name {name!r}: give each a name of its own")
            out[name] = base, replicate, dataclasses.replace(config, seed=config.seed + SEED_STRIDE * replicate)
    return out


@functools.lru_cache(maxsize=64)  # a report makes its experiment out of the record again and again
def _check_twins(models: tuple[str, ...], train: TrainConfig, seeds: int) -> None:
    """Refuse one network under two names, unless both are defended and of one replicate: then it is merely trained once."""
    seen: dict[TrainConfig, tuple[str, int]] = {}
    for name, (base, replicate, config) in _expand(models, train, seeds).items():
        twin, of = seen.setdefault(config.canonical(), (name, replicate))
        if twin != name and (config.defense == "none" or replicate != of):
            raise ConfigError(
                f"models: {name} is the same network as {twin}, which would count as an independent one; "
                + (
                    f"give models[{base}] another seed (replicates are {SEED_STRIDE} apart)"
                    if config.epochs
                    else "remove one of them: both are the weights of train.pretrained"
                )
            )


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME:FIELD=VALUE,FIELD=VALUE`` into its name and its fields (values as text).

    Raises:
        ConfigError: the name is empty or a part is not FIELD=VALUE.
    """
    name, colon, rest = text.partition(":")
    check_name(f"the name in {text!r}", name)
    fields: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{part!r} in {text!r} is not FIELD=VALUE; the form is NAME:FIELD=VALUE,FIELD=VALUE")
        if key in fields:
            raise ConfigError(f"{text!r} sets {key} twice: leave one out")
        fields[key] = value.strip()
    return name, fields


ConfigT = TypeVar("ConfigT")


def replace_typed(config: ConfigT, overrides: dict[str, str], where: str) -> ConfigT:
    """A copy of a config dataclass with some fields replaced by values given as text, each converted to its field's type.

    Raises:
        ConfigError: unknown field, or text that is not a value of the field's type.
    """
    hints = _hints(type(config))
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        if name not in hints:
            raise ConfigError.unknown(f"field of {where}:", name, hints)
        values[name] = _convert(text, hints[name], f"{where}.{name}")
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _convert(text: str, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is Literal:
        return text  # checked against the literals by the dataclass itself
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError.of(where, text, "true or false")
        return text.lower() == "true"
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise ConfigError.of(where, text, f"a value of type {hint.__name__}") from None
    raise ConfigError(f"{where} cannot be set for one model: set it for all of them, as an option")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists), enough to repeat the run."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[ConfigT], values: Any) -> ConfigT:
    """Return the config whose :func:`to_dict` is ``values``.

    Args:
        values: parsed JSON, which may come out of anybody's file.

    Raises:
        ConfigError: an unknown or missing field, a value of another type, or one that the class itself refuses.
    """
    _check(isinstance(values, dict), cls.__name__, values, "a JSON object with the fields of this version")
    hints = _hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError.unknown(f"field of {cls.__name__}:", name, hints)
        kwargs[name] = _from_json(value, hints[name], f"{cls.__name__}.{name}")
    for f in dataclasses.fields(typing.cast(Any, cls)):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in kwargs:
            raise ConfigError(f"{cls.__name__} lacks the field {f.name}, which every record of this version has")
    return cls(**kwargs)


def _from_json(value: Any, hint: Any, where: str) -> Any:
    """Return a value of JSON as what a field of type ``hint`` holds."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value)
    if typing.get_origin(hint) is tuple:
        _check(isinstance(value, list), where, value, "a list")
        return tuple(_from_json(item, typing.get_args(hint)[0], where) for item in value)
    kinds = (str,) if typing.get_origin(hint) is Literal else typing.get_args(hint) or (hint,)
    accepted = {*kinds, int} if float in kinds else set(kinds)
    # exactly of the type: True is an int to Python
    _check(type(value) in accepted, where, value, f"a value of type {' or '.join(k.__name__ for k in kinds)}")
    if isinstance(value, int):
        _check(is_int64(value), where, value, "a number from -2**63 to 2**63 - 1")
    if isinstance(value, str):
        _check(is_text(value), where, value, "text without NUL characters and lone surrogates")
    return value


def is_unicode(text: str) -> bool:
    """Tell whether text can be written as UTF-8. Python keeps bytes that it cannot decode as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_text(text: str) -> bool:
    """Tell whether text can be written as UTF-8 and has no zero byte, as the name of a file must."""
    return "\0" not in text and is_unicode(text)


def content_hash(*parts: Any) -> str:
    """16 hex digits that name a result by all that it follows from. Parts must be JSON types."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
