"""Settings of one model and its training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from components.fields import check, check_values, hints_of

MAX_WIDTH = 4096
"""A ResNet-18 of this width takes 180 GB: a larger one is a mistake."""

ENCODER_BLOCKS: dict[str, int] = {"resnet18": 4, "resnet50": 4, "vgg16": 5, "vgg16_bn": 5}
"""How many encoder blocks each architecture has: the upper bound of ``shared_blocks``."""


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
        check_values(self, "train")
        own = ":" in self.arch
        check(
            own or self.arch in ENCODER_BLOCKS,
            "train.arch",
            self.arch,
            ", ".join(ENCODER_BLOCKS) + " or MODULE:FUNCTION (docs/networks.md)",
        )
        check(self.width >= 1, "train.width", self.width, "at least 1 channel")
        check(self.width <= MAX_WIDTH, "train.width", self.width, f"at most {MAX_WIDTH} channels")
        if own:  # how many blocks it has is known when it is built
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
            self.replace_head is False or bool(self.pretrained),
            "train.replace_head",
            self.replace_head,
            "False where no weights are given (--train.pretrained FILE)",
        )
        check(0 < self.adversarial_eps <= 1, "train.adversarial_eps", self.adversarial_eps, "above 0, at most 1")
        check(self.adversarial_steps >= 1, "train.adversarial_steps", self.adversarial_steps, "at least 1")
        check(
            self.noise_location == "none" or self.defense in ("none", "defend++"),
            "train.noise_location",
            self.noise_location,
            f"none with defense={self.defense!r}, whose training adds no such noise; set it on the models that have it, "
            "as in --models NAME:noise_location=latent",
        )
        check(
            0 < self.adversarial_share <= 1,
            "train.adversarial_share",
            self.adversarial_share,
            "above 0 (no example would count; that is defense='none'), at most 1",
        )
        check(self.epochs >= 0, "train.epochs", self.epochs, "0 or more")
        check(
            0 <= self.adversarial_epochs <= self.epochs,
            "train.adversarial_epochs",
            self.adversarial_epochs,
            f"0 (all) to train.epochs={self.epochs}",
        )
        check(self.crop_padding >= 1, "train.crop_padding", self.crop_padding, "at least 1 pixel")
        for name in (
            "lam",
            "reconstruction_weight",
            "noise_sigma",
            "weight_decay",
            "clip_norm",
            "adversarial_max_norm",
        ):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"train.{name}", value, "a finite number, 0 or more")
        for name in ("lr", "lr_gamma", "reformer_sigma"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"train.{name}", value, "a finite number above 0")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        if self.epochs == 0:
            check(
                bool(self.pretrained) and self.defense == "none" and not self.replace_head,
                "train.epochs",
                0,
                "at least 1; 0 takes given weights as they are: with --train.pretrained FILE and --train.defense none, "
                "without --train.replace-head",
            )
        check(
            self.lr_step_epochs >= 0,
            "train.lr_step_epochs",
            self.lr_step_epochs,
            "at least 0 (0: a third of the epochs)",
        )
        for name in ("batch_size", "checkpoint_every_epochs"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        check(
            all(math.isfinite(m) for m in self.normalize_mean),
            "train.normalize_mean",
            self.normalize_mean,
            "finite numbers",
        )
        check(
            len(self.normalize_mean) == len(self.normalize_std) and all(0 < s < math.inf for s in self.normalize_std),
            "train.normalize_std",
            self.normalize_std,
            "as many values as train.normalize_mean, all finite and above 0",
        )
        # where there is no auto-encoder to alternate with, the schedule says nothing
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
        # "1" and "1.0" are the same setting: of one type, they have the same hash
        for name, hint in hints_of(type(self)).items():
            if hint is float and isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))


def stored_levels(config: TrainConfig) -> bool:
    """Whether training reads levels from the shards: not without targets for them, nor where crops need new ones."""
    return config.defense == "defend++" and config.targets != "none" and config.augment != "crop_flip"
