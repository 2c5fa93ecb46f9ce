"""Settings of a model and its training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from components.errors import did_you_mean
from components.fields import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Rule, check, check_values, hints_of

MAX_WIDTH = 4096
"""A ResNet-18 of this width takes 180 GB: a larger one is a mistake."""

ENCODER_BLOCKS: dict[str, int] = {"resnet18": 4, "resnet50": 4, "vgg16": 5, "vgg16_bn": 5}
"""Number of encoder blocks of each architecture, the upper bound of ``shared_blocks``."""

_TRAIN_RULES: dict[str, Rule] = {
    "width": (lambda v: 1 <= v <= MAX_WIDTH, f"1 to {MAX_WIDTH} channels"),
    "lam": NOT_NEGATIVE,
    "reconstruction_weight": NOT_NEGATIVE,
    "noise_sigma": NOT_NEGATIVE,
    "adversarial_eps": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "adversarial_beta": POSITIVE,
    "adversarial_steps": AT_LEAST_1,
    "adversarial_max_norm": NOT_NEGATIVE,
    "adversarial_share": (
        lambda v: 0 < v <= 1,
        "above 0 (no example would count; that is defense='none'), at most 1",
    ),
    "reformer_sigma": POSITIVE,
    "crop_padding": (lambda v: v >= 1, "at least 1 pixel"),
    "epochs": (lambda v: v >= 0, "0 or more"),
    "batch_size": AT_LEAST_1,
    "lr": POSITIVE,
    "lr_step_epochs": (lambda v: v >= 0, "at least 0 (0: a third of the epochs)"),
    "lr_gamma": POSITIVE,
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": NOT_NEGATIVE,
    "ema_decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "clip_norm": NOT_NEGATIVE,
    "normalize_mean": (lambda v: all(map(math.isfinite, v)), "finite numbers"),
    "normalize_std": (
        lambda v: all(0 < s < math.inf for s in v),
        "as many values as train.normalize_mean, all finite and above 0",
    ),
    "checkpoint_every_epochs": AT_LEAST_1,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one model: network, defense and optimisation."""

    arch: str = "resnet18"
    """Classifier, which the defense does not change (sec. 3.1, 4.5): resnet18, resnet50, vgg16,
    vgg16_bn, or MODULE:FUNCTION for a network of your own (docs/networks.md). Undefended models may
    also be torchvision:NAME or timm:NAME, the network of that name in the library, or
    robustbench:DATASET/THREAT_MODEL/ID."""
    width: int = 64
    """Channels of the first stage. 64 is the standard network; smaller ones are for tests and
    demos."""
    pretrained: str = ""
    """Weights to start from: a .safetensors or .pth file (path or URI), mlflow:models:/NAME@ALIAS,
    mlflow:runs:/ID/PATH, hf:ORG/NAME[@REVISION]/FILE, torchvision:NAME such as
    torchvision:IMAGENET1K_V1 (downloaded, or from torch's cache), or
    robustbench:DATASET/THREAT_MODEL/ID. Empty: none."""
    replace_head: bool = False
    """Use all pretrained weights but the last layer's, for another number of classes."""
    defense: Literal["none", "defend++", "adversarial", "comdefend"] = "defend++"
    """none: the classifier alone. defend++: with the auto-encoder (sec. 3.3). adversarial: the
    classifier trained on examples made online. comdefend: a reformer in front of the undefended
    classifier (Jia et al. 2019). For Defend++ on examples see adversarial_training."""
    decoder: Literal["pyramid", "hourglass", "hourglass_concat", "hourglass_add"] = "pyramid"
    """pyramid: U and H modules (Fig. 4). The hourglasses (Fig. 3), without skips or with
    concatenated or added ones, are Table 1's ablation."""
    targets: Literal["lowpass", "linear", "none"] = "lowpass"
    """lowpass: DCT low-pass images (the paper's MS-LP). linear: bilinear (MS-LI). none: level 0
    only (w/o MS-LP)."""
    shared_blocks: int = 4
    """Number of encoder blocks, from the input on, whose weights classifier and auto-encoder share
    (sec. 3.4, 4.2)."""
    lam: float = 0.01
    """lambda of eq. 3: weight of levels 1..M-1 relative to level 0."""
    reconstruction_weight: float = 1.0
    """w of L = L_cls + w * L_rec (the paper has 1)."""
    reconstruction_reduction: Literal["mean", "sum"] = "mean"
    """Reading of eq. 3's squared norm: mean or sum over pixels. Over the batch it is always the
    mean."""
    noise_location: Literal["none", "latent", "input"] = "none"
    """Where Gaussian noise is added during training (sec. 4.2, "ours + GN"). Only with defense none
    or defend++."""
    noise_sigma: float = 0.1
    """Standard deviation of that noise, in units of the tensor it is added to."""
    adversarial_training: bool = False
    """defend++ only: train on examples made online, as adversarial does. The classifier sees the
    example; the auto-encoder reconstructs the levels of the clean image from it."""
    adversarial_attack: Literal["fgsm", "n-fgsm", "pgd", "ddn"] = "fgsm"
    """Adversarial training only: attack that makes the examples. n-fgsm: one step from a noisy
    image (de Jorge et al. 2022), which may be longer than adversarial_eps."""
    adversarial_loss: Literal["ce", "trades"] = "ce"
    """Adversarial training only. ce: cross entropy of the examples (Madry et al. 2018). trades:
    cross entropy of the clean images and divergence between both predictions, which the examples
    maximise (Zhang et al. 2019); with n-fgsm or pgd."""
    adversarial_beta: float = 6.0
    """trades only: weight of the divergence (Zhang et al. 2019: 6 on CIFAR-10, 1 on MNIST)."""
    adversarial_eps: float = 0.2
    """Adversarial training with fgsm, n-fgsm or pgd: largest Linf norm, in units of images in [0,1]."""
    adversarial_steps: int = 10
    """Adversarial training with pgd or ddn: steps per example; pgd's step size is 2.5 eps / steps."""
    adversarial_max_norm: float = 0.0
    """Adversarial training only: largest L2 norm; longer perturbations are scaled down to it (Rony et al.
    2019: 2.4 on MNIST, 1 on CIFAR-10). 0: no limit."""
    adversarial_share: float = 1.0
    """Adversarial training with ce: share of the examples' loss; the clean images have the rest
    (Goodfellow et al. 2015: 0.5)."""
    adversarial_epochs: int = 0
    """Adversarial training only: number of adversarial epochs, after clean ones. 0: all."""
    reformer_sigma: float = 20.0
    """comdefend only: standard deviation of the noise on its code during training."""
    augment: Literal["none", "flip", "crop_flip"] = "none"
    """flip: half of the images are flipped horizontally, with their stored levels. crop_flip: also
    a random crop after padding by crop_padding; levels are computed on the training device."""
    crop_padding: int = 4
    """crop_flip only: pixels of zeros on each side."""
    schedule: Literal["joint", "alternating"] = "joint"
    """joint: one backward pass of L. alternating: cycles of auto-encoder epochs and classifier
    epochs, then joint epochs."""
    epochs: int = 4
    """Number of epochs over all phases. 0: the weights of ``pretrained`` are evaluated as they
    are."""
    cycles: int = 3
    """Alternating only: number of (auto-encoder, classifier) cycles before joint training."""
    autoencoder_epochs: int = 5
    """Alternating only: epochs on L_rec alone in each cycle."""
    classifier_epochs: int = 5
    """Alternating only: epochs on L_cls alone in each cycle."""
    batch_size: int = 256
    """Images per optimisation step over all workers together."""
    lr: float = 0.1
    """Peak (one_cycle) or initial (step) learning rate."""
    lr_schedule: Literal["one_cycle", "step"] = "one_cycle"
    """one_cycle: linear warm-up over 30 % of the steps, then a cosine to zero. step: multiplied by
    lr_gamma every lr_step_epochs."""
    lr_step_epochs: int = 100
    """step only: epochs between two drops. 0: a third of ``epochs``, rounded up, as the paper's 100
    of 300."""
    lr_gamma: float = 0.1
    """step only: factor of a drop."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum, as in the paper, or adam, with which ComDefend was trained."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """Weight decay."""
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average of the weights, which is then validated and
    exported, e.g. 0.999. 0: the weights of the last step."""
    clip_norm: float = 0.0
    """Largest L2 norm of the gradient; longer ones are scaled down. 0: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast of the forward pass; weights stay float32. float32: on a GPU with TF32 in
    convolutions, PyTorch's default. Validation is always in true float32."""
    channels_last: bool = False
    """Memory format of the network, faster on GPU and with bfloat16 on CPU. Refused with float32 on
    CPU."""
    normalize_mean: tuple[float, ...] = ()
    """Mean per channel that the network subtracts from [0,1] images. Empty: none."""
    normalize_std: tuple[float, ...] = ()
    """Standard deviation per channel that the network divides by. Empty: none."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the noise."""
    checkpoint_every_epochs: int = 1
    """Epochs between two checkpoints."""

    @property
    def kind(self) -> str:
        """Kind of the model, in one word for file names."""
        return {"none": "undefended", "defend++": "defended"}.get(self.defense, self.defense)

    @property
    def on_examples(self) -> bool:
        """Tell whether the model is trained on adversarial examples."""
        return self.defense == "adversarial" or (self.defense == "defend++" and self.adversarial_training)

    @property
    def example_passes(self) -> int:
        """Return the passes forward and back that an example of adversarial training takes."""
        return self.adversarial_steps if self.adversarial_attack in ("pgd", "ddn") else 1

    @property
    def may_fold_examples(self) -> bool:
        """Tell whether examples may be searched for on a copy with batch norm folded.

        Copying costs a fraction of a pass, so it pays for an attack of several steps. A network of
        the user's own may lose its gradient by it.
        """
        return self.on_examples and self.arch in ENCODER_BLOCKS and self.adversarial_attack in ("pgd", "ddn")

    @property
    def relative_cost(self) -> float:
        """Approximate time of training, in epochs of the bare classifier."""
        cost = 1.0 if self.defense in ("none", "adversarial") else 2.0
        if self.on_examples:
            cost += 0.7 * self.example_passes
        return self.epochs * cost

    def canonical(self) -> TrainConfig:
        """Return the config with every setting that has no influence on the model at its default.

        Equal models are then trained once.
        """
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in self.unused()})

    def unused(self) -> frozenset[str]:
        """Return the names of the settings that have no influence on the model."""
        unused = {"checkpoint_every_epochs"}
        if not self.epochs:
            used = {"arch", "width", "pretrained", "epochs", "normalize_mean", "normalize_std", "defense"}
            unused |= {f.name for f in dataclasses.fields(self)} - used
        if self.defense != "defend++":
            unused |= {
                "decoder",
                "targets",
                "shared_blocks",
                "lam",
                "reconstruction_weight",
                "reconstruction_reduction",
                "schedule",
            }
        elif self.targets == "none" or (self.reconstruction_weight == 0 and self.schedule == "joint"):
            unused |= {"lam"}  # Eq. 3 has no level that lambda weighs.
        if self.defense == "comdefend":
            unused |= {"arch", "pretrained", "replace_head", "normalize_mean", "normalize_std"}
        else:
            unused |= {"reformer_sigma"}
        if self.defense != "defend++":
            unused |= {"adversarial_training"}
        if not self.on_examples:
            unused |= {f.name for f in dataclasses.fields(self) if f.name.startswith("adversarial_")}
        else:
            unused |= {"adversarial_eps"} if self.adversarial_attack == "ddn" else set()
            unused |= {"adversarial_steps"} if self.adversarial_attack in ("fgsm", "n-fgsm") else set()
            unused |= {"adversarial_share"} if self.adversarial_loss == "trades" else {"adversarial_beta"}
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
        return frozenset(unused)

    def __post_init__(self) -> None:
        check_values(self, "train", _TRAIN_RULES)
        self._check_network()
        self._check_method()
        self._check_epochs()
        # 1 and 1.0 are the same setting, so they must have the same hash.
        for name, hint in hints_of(type(self)).items():
            if hint is float and isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_network(self) -> None:
        own = ":" in self.arch
        check(
            own or self.arch in ENCODER_BLOCKS,
            "train.arch",
            self.arch,
            ", ".join(ENCODER_BLOCKS)
            + " or MODULE:FUNCTION (docs/networks.md)"
            + did_you_mean(self.arch, ENCODER_BLOCKS),
        )
        if own:  # The number of its blocks is known once it is built.
            check(self.shared_blocks >= 1, "train.shared_blocks", self.shared_blocks, "at least 1")
        else:
            blocks = ENCODER_BLOCKS[self.arch]
            check(
                1 <= self.shared_blocks <= blocks,
                "train.shared_blocks",
                self.shared_blocks,
                f"1 to {blocks} ({self.arch} has {blocks} encoder blocks)",
            )
        check(
            not self.replace_head or bool(self.pretrained),
            "train.replace_head",
            self.replace_head,
            "False where no weights are given (--train.pretrained FILE)",
        )
        check(
            len(self.normalize_mean) == len(self.normalize_std),
            "train.normalize_std",
            self.normalize_std,
            "as many values as train.normalize_mean, all finite and above 0",
        )

    def _check_method(self) -> None:
        kind = "adversarial_training" if self.defense == "defend++" else f"defense={self.defense!r}"
        check(
            self.noise_location == "none" or (self.defense in ("none", "defend++") and not self.on_examples),
            "train.noise_location",
            self.noise_location,
            f"none with {kind}, whose training adds no such noise; set it on the models that have it, as in --models "
            "NAME:noise_location=latent",
        )
        check(
            not self.on_examples or self.adversarial_loss == "ce" or self.adversarial_attack in ("n-fgsm", "pgd"),
            "train.adversarial_attack",
            self.adversarial_attack,
            "n-fgsm or pgd with adversarial_loss=trades, whose divergence these maximise",
        )
        check(
            0 <= self.adversarial_epochs <= self.epochs,
            "train.adversarial_epochs",
            self.adversarial_epochs,
            f"0 (all) to train.epochs, which is {self.epochs}",
        )

    def _check_epochs(self) -> None:
        check(
            self.epochs > 0 or (bool(self.pretrained) and self.defense == "none" and not self.replace_head),
            "train.epochs",
            0,
            "at least 1; 0 takes given weights as they are: with --train.pretrained FILE and --train.defense none, "
            "without --train.replace-head",
        )
        # The schedule has no effect without an auto-encoder to alternate with.
        if self.schedule == "alternating" and self.defense == "defend++":
            for name in ("cycles", "autoencoder_epochs", "classifier_epochs"):
                check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
            alternating = self.cycles * (self.autoencoder_epochs + self.classifier_epochs)
            check(
                self.epochs >= alternating,
                "train.epochs",
                self.epochs,
                f"at least cycles * (autoencoder_epochs + classifier_epochs) = {alternating}; the rest is joint",
            )


def stored_levels(config: TrainConfig) -> bool:
    """Tell whether training reads levels from the shards.

    It reads none if no level above 0 has a target, or if crops need levels of their own.
    """
    return config.defense == "defend++" and config.targets != "none" and config.augment != "crop_flip"
