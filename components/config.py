"""Every setting of a run, as frozen keyword-only dataclasses with units, validated when they are made.

A recipe (``pipeline/recipes.py``) is a function that returns a complete :class:`Experiment`; the command line overrides
any field of it. Section numbers are those of Liu et al., "Defending Adversarial Examples via DNN Bottleneck
Reinforcement", ACM MM 2020.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from components.errors import ConfigError

MIN_LEVEL_SIZE = 7
"""No loss is put on an output smaller than 7x7 pixels (sec. 3.4)."""
MAX_LEVELS = 4

ENCODER_BLOCKS: dict[str, int] = {"resnet18": 4}
"""How many encoder blocks each architecture has: the upper bound of ``shared_blocks``."""


def level_sizes(image_size: int, levels: int = 0) -> tuple[int, ...]:
    """Side lengths in pixels of the reconstruction levels: W, W/2, W/4, ... (floor), none under 7, at most four.

    ``levels`` = 0 takes as many as that rule allows; otherwise exactly so many.

    Raises:
        ConfigError: the image or the last level asked for is smaller than 7x7 pixels (sec. 3.4).
    """
    if image_size < MIN_LEVEL_SIZE:
        raise ConfigError.of("data.image_size", image_size, f"at least {MIN_LEVEL_SIZE} pixels (sec. 3.4)")
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


def _check_literals(config: Any, prefix: str) -> None:
    """Refuse a value outside a field's Literal: dataclasses do not, and a recipe is plain Python."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        if typing.get_origin(hints[f.name]) is Literal:
            allowed = typing.get_args(hints[f.name])
            value = getattr(config, f.name)
            _check(value in allowed, f"{prefix}.{f.name}", value, "one of " + ", ".join(map(repr, allowed)))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and what they must look like."""

    source: str = "sample:mnist"
    """KIND:WHERE. sample:mnist (bundled), parquet:DIR (Hugging Face image layout), folder:DIR (DIR/train/CLASS/*,
    DIR/test/CLASS/*), torchvision:mnist or torchvision:cifar10 (see root and download)."""
    root: str = ""
    """Directory of torchvision's files (only for torchvision:...). Empty: ~/.cache/defendpp."""
    download: bool = False
    """Let torchvision download what root lacks."""
    image_size: int = 28
    """Height and width in pixels; an image of another size is an error."""
    channels: int = 1
    """1 (grey) or 3 (RGB); images of the other mode are converted."""
    num_classes: int = 10
    """Labels are 0..num_classes-1."""
    validation_fraction: float = 0.1
    """Share of the training images held out, by a seeded hash of the sample index. 0 at the paper's scale."""
    split_seed: int = 0
    """Seed of that hash."""
    train_limit: int = 0
    """Use the first so many training images of the source, before the validation split. 0: all."""
    test_limit: int = 0
    """Use the first so many test images of the source. 0: all."""

    def __post_init__(self) -> None:
        kind, _, where = self.source.partition(":")
        _check(
            kind in ("sample", "parquet", "folder", "torchvision") and bool(where),
            "data.source",
            self.source,
            "sample:mnist, parquet:DIR, folder:DIR, torchvision:mnist or torchvision:cifar10",
        )
        level_sizes(self.image_size)
        _check(self.channels in (1, 3), "data.channels", self.channels, "1 (grey) or 3 (RGB)")
        _check(self.num_classes >= 2, "data.num_classes", self.num_classes, "at least 2")
        _check(0 <= self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "in [0, 1)")
        _check(self.train_limit >= 0, "data.train_limit", self.train_limit, "0 (all) or more")
        _check(self.test_limit >= 0, "data.test_limit", self.test_limit, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The multi-scale reconstruction targets (sec. 3.3) and how they are stored."""

    targets: Literal["lowpass", "linear", "none"] = "lowpass"
    """lowpass: DCT low-pass images (the paper's MS-LP). linear: bilinear (MS-LI). none: level 0 only (w/o MS-LP)."""
    levels: int = 0
    """Number of levels M. 0: W, W/2, W/4, ... down to 7 pixels, at most four."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of levels 1..M-1 (level 0 is the uint8 image itself)."""
    rows_per_shard: int = 1024
    """Images per Parquet shard: the unit of work, of resumption and of memory."""

    def __post_init__(self) -> None:
        _check_literals(self, "pyramids")
        _check(0 <= self.levels <= MAX_LEVELS, "pyramids.levels", self.levels, f"0 (by rule) to {MAX_LEVELS}")
        _check(self.rows_per_shard >= 1, "pyramids.rows_per_shard", self.rows_per_shard, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One model: its network, its defense and its optimisation."""

    arch: Literal["resnet18"] = "resnet18"
    """The classifier, untouched by the defense (sec. 3.1)."""
    width: int = 64
    """Channels of the first stage; 64 is the standard network, less is for tests and demos."""
    defense: Literal["none", "defend++"] = "defend++"
    """none: the classifier alone. defend++: with the auto-encoder (sec. 3.3)."""
    decoder: Literal["pyramid"] = "pyramid"
    """pyramid: U and H modules (Fig. 4)."""
    shared_blocks: int = 4
    """Encoder blocks, from the input on, whose weights classifier and auto-encoder share (sec. 3.4, 4.2)."""
    lam: float = 0.01
    """lambda of eq. 3: weight of levels 1..M-1 against level 0."""
    reconstruction_weight: float = 1.0
    """w of L = L_cls + w * L_rec (the paper has 1)."""
    reconstruction_reduction: Literal["mean", "sum"] = "mean"
    """Reading of eq. 3's squared norm: mean or sum over pixels (mean over the batch either way)."""
    noise_location: Literal["none", "latent", "input"] = "none"
    """Where Gaussian noise is added during training (sec. 4.2, "ours + GN")."""
    noise_sigma: float = 0.1
    """Standard deviation of that noise, in units of the tensor it is added to."""
    schedule: Literal["joint", "alternating"] = "joint"
    """joint: one backward of L. alternating: cycles of auto-encoder epochs, then classifier epochs, then joint."""
    epochs: int = 4
    """Epochs in all, every phase counted."""
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
    """step only: epochs between two drops."""
    lr_gamma: float = 0.1
    """step only: factor of a drop."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """SGD weight decay."""
    clip_norm: float = 0.0
    """Largest L2 norm of the gradient; a longer one is scaled down. 0: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; weights stay float32."""
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
        return {"none": "undefended", "defend++": "defended"}[self.defense]

    @property
    def relative_cost(self) -> float:
        """About how long training takes, for sharing out models: an epoch of the bare classifier is 1."""
        return self.epochs * (1.0 if self.defense == "none" else 2.0)

    def __post_init__(self) -> None:
        _check_literals(self, "train")
        blocks = ENCODER_BLOCKS[self.arch]
        _check(self.width >= 1, "train.width", self.width, "at least 1 channel")
        _check(
            1 <= self.shared_blocks <= blocks,
            "train.shared_blocks",
            self.shared_blocks,
            f"1 to {blocks} ({self.arch} has {blocks} encoder blocks)",
        )
        for name in ("lam", "reconstruction_weight", "noise_sigma", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"train.{name}", value, "a finite number, 0 or more")
        for name in ("lr", "lr_gamma"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"train.{name}", value, "a finite number above 0")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        for name in ("epochs", "batch_size", "lr_step_epochs", "checkpoint_every_epochs"):
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
        if self.schedule == "alternating":
            _check(
                self.defense != "none",
                "train.schedule",
                self.schedule,
                "'joint' where defense='none' (no auto-encoder)",
            )
            for name in ("cycles", "autoencoder_epochs", "classifier_epochs"):
                _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
            alternating = self.cycles * (self.autoencoder_epochs + self.classifier_epochs)
            _check(
                self.epochs >= alternating,
                "train.epochs",
                self.epochs,
                f"at least cycles * (autoencoder_epochs + classifier_epochs) = {alternating}; the rest is joint",
            )


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
    threat_models: tuple[Literal["white_box", "transfer"], ...] = ("white_box", "transfer")
    """white_box: examples made on the very model under test. transfer: made on transfer_source."""
    transfer_source: str = "no_defense"
    """The model (a name out of models) on which transferred examples are made."""
    test_images: int = 0
    """Attack the first so many test images. 0: all."""
    chunk_size: int = 50
    """Images per chunk: the unit of random stream, record and resumption. Another value is another result."""
    seed: int = 0
    """Seed of the attacks' random streams."""

    def __post_init__(self) -> None:
        from components.attacks.spec import AttackSpec

        for attack in self.attacks:
            AttackSpec.parse(attack)
        _check(len(set(self.attacks)) == len(self.attacks), "evaluation.attacks", self.attacks, "each attack once")
        for threat in self.threat_models:
            _check(threat in ("white_box", "transfer"), "evaluation.threat_models", threat, "white_box, transfer")
        _check(self.test_images >= 0, "evaluation.test_images", self.test_images, "0 (all) or more")
        _check(self.chunk_size >= 1, "evaluation.chunk_size", self.chunk_size, "at least 1")


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
    parallel_models: int = 0
    """Models trained side by side, each on its own workers. 0: as many as there is room for."""
    wait_s: float = 0.0
    """On a cluster that grows: seconds to wait for nodes that the run needs and that are not there yet."""
    max_failures: int = 3
    """How often a training run is started again from its last checkpoint after a worker or node died."""

    def __post_init__(self) -> None:
        _check(self.workers >= 1, "scaling.workers", self.workers, "at least 1")
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    storage: str = "~/defendpp"
    """Where shards, models and records are kept: an absolute path or a URI (s3://bucket/path) that every node reaches."""
    tracking_uri: str = ""
    """MLflow server (http://...) or database (sqlite:///...). Empty: mlflow.db in storage, where that is local."""

    def __post_init__(self) -> None:
        _check(bool(self.name), "name", self.name, "a name")
        _check(bool(self.models), "models", self.models, "at least one model")
        sizes = level_sizes(self.data.image_size, self.pyramids.levels)
        variants = self.variants()
        for name, config in variants.items():
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
                "False with precision='float32' on CPU, where PyTorch's channels-last gradients corrupt memory; "
                "True with precision='bfloat16' or scaling.gpu",
            )
            _check(
                config.batch_size % self.scaling.workers == 0,
                f"models[{name}].batch_size",
                config.batch_size,
                f"a multiple of scaling.workers ({self.scaling.workers})",
            )
        if "transfer" in self.evaluation.threat_models:
            source = variants.get(self.evaluation.transfer_source)
            if source is None or source.defense != "none":
                raise ConfigError.of(
                    "evaluation.transfer_source",
                    self.evaluation.transfer_source,
                    f"the name of an undefended model out of models ({', '.join(variants)})",
                )

    def variants(self) -> dict[str, TrainConfig]:
        """The complete training config of each model, by name, in the order of ``models``.

        Raises:
            ConfigError: a model is named twice, or names a field or value that ``train`` does not have.
        """
        out: dict[str, TrainConfig] = {}
        for text in self.models:
            name, overrides = parse_spec(text)
            _check(name not in out, "models", text, "each model name once")
            out[name] = replace_typed(self.train, overrides, f"models[{name}]")
        return out


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME:FIELD=VALUE,FIELD=VALUE`` into its name and its fields (values as text).

    Raises:
        ConfigError: the name is empty or a part is not FIELD=VALUE.
    """
    name, colon, rest = text.partition(":")
    if not name.replace("_", "").replace("-", "").replace("+", "").replace(".", "").isalnum():
        raise ConfigError.of("spec", text, "NAME or NAME:FIELD=VALUE,... with a name of letters, digits, _ - + .")
    fields: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError.of("spec", text, f"NAME:FIELD=VALUE,...; {part!r} is not FIELD=VALUE")
        if key in fields:
            raise ConfigError.of("spec", text, f"each field once; {key!r} stands twice")
        fields[key] = value.strip()
    return name, fields


ConfigT = TypeVar("ConfigT")


def replace_typed(config: ConfigT, overrides: dict[str, str], where: str) -> ConfigT:
    """A copy of a config dataclass with some fields replaced by values given as text, each converted to its field's type.

    Raises:
        ConfigError: unknown field, or text that is not a value of the field's type.
    """
    hints = typing.get_type_hints(type(config))
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        if name not in hints:
            raise ConfigError.of(f"{where}.{name}", text, "no such field; there are " + ", ".join(hints))
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
    raise ConfigError.of(where, text, "this field cannot be set inside a spec; set it for all models")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists), enough to repeat the run."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The inverse of :func:`to_dict`. Raises ConfigError for a field that the class does not have."""
    hints = typing.get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError.of(f"{cls.__name__}.{name}", value, "no such field in this version")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            kwargs[name] = from_dict(typing.cast(Any, hint), value)
        elif isinstance(value, list):
            kwargs[name] = tuple(value)
        else:
            kwargs[name] = value
    return cls(**kwargs)


def content_hash(*parts: Any) -> str:
    """16 hex digits that name a result by all that it follows from. Parts must be JSON types."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
