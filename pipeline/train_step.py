"""One optimisation step of each phase, and one pass of validation: PyTorch alone, no Ray.

A phase is a module that registers exactly the parameters which get a gradient in it, so that DDP never has to search for
unused ones. The driver of the steps (``pipeline/train.py``) wraps it in DDP and rebuilds it where the phase changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.config import TrainConfig
from components.losses import reconstruction_loss, reconstruction_terms
from components.models.classifiers import ResNet18, build_classifier
from components.models.defend import DefendNet, Noise, classify_with_noise
from components.schedule import Phase


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a network must know of the data."""

    image_size: int
    channels: int
    num_classes: int
    sizes: tuple[int, ...]
    """Level sizes in pixels, level 0 first; the decoder has them all, whatever has a target."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images and targets on the training device.

    images: uint8 [N, C, W, W]. labels: int64 [N]. levels: stored levels 1.. as float16 or float32 [N, C, W_m, W_m];
    empty where only level 0 has a target.
    """

    images: Tensor
    labels: Tensor
    levels: tuple[Tensor, ...] = ()


def build_net(config: TrainConfig, shapes: Shapes) -> ResNet18 | DefendNet:
    """The untrained network of a config: the bare classifier, or the classifier with its auto-encoder.

    Raises:
        ConfigError: sizes or blocks that do not fit together.
    """
    classifier = build_classifier(
        config.arch,
        num_classes=shapes.num_classes,
        channels=shapes.channels,
        image_size=shapes.image_size,
        width=config.width,
        mean=config.normalize_mean,
        std=config.normalize_std,
        seed=config.seed,
    )
    if config.defense == "none":
        return classifier
    return DefendNet(
        classifier,
        shared_blocks=config.shared_blocks,
        sizes=shapes.sizes,
        channels=shapes.channels,
        seed=config.seed,
    )


def classifier_of(net: ResNet18 | DefendNet) -> ResNet18:
    """The classifier of a network that may or may not have an auto-encoder."""
    return net.classifier if isinstance(net, DefendNet) else net


class PhaseModule(nn.Module):
    """The loss of one phase as a module over exactly the parameters that the phase trains.

    classifier: L_cls. autoencoder: L_rec. joint: L_cls + w * L_rec (eq. 3).
    """

    def __init__(self, net: ResNet18 | DefendNet, phase: Phase, config: TrainConfig) -> None:
        super().__init__()
        self.phase = phase
        self.config = config
        if phase == "classifier":
            self.classifier = classifier_of(net)
        elif not isinstance(net, DefendNet):
            raise ValueError(f"phase {phase!r} needs an auto-encoder")
        elif phase == "autoencoder":
            self.autoencoder = net.autoencoder
        else:
            self.net = net

    def forward(
        self, images: Tensor, labels: Tensor, targets: Sequence[Tensor], noise: Noise | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a scalar) and its detached terms: loss_cls, rec_0, rec_1, ...

        Args:
            images: float [N, C, W, W] in [0,1], what the network sees.
            targets: the clean levels that have a target, level 0 first.
            noise: added to the latent, or to the images, as the config says.
        """
        latent_noise = noise if self.config.noise_location == "latent" else None
        if noise is not None and self.config.noise_location == "input":
            images = noise(images)
        terms: dict[str, Tensor] = {}
        loss = None
        reconstruction = None
        if self.phase == "autoencoder":
            reconstruction = self.autoencoder(images, latent_noise)
        else:
            if self.phase == "joint":
                logits, reconstruction = self.net.joint(images, latent_noise, latent_noise)
            else:
                logits = classify_with_noise(self.classifier, images, latent_noise)
            loss = F.cross_entropy(logits.float(), labels)
            terms["loss_cls"] = loss.detach()
        if reconstruction is not None:
            levels = reconstruction_terms(reconstruction, targets, self.config.reconstruction_reduction)
            rec = reconstruction_loss(levels, self.config.lam)
            terms["loss_rec"] = rec.detach()
            terms |= {f"rec_{m}": term.detach() for m, term in enumerate(levels)}
            loss = rec if loss is None else loss + self.config.reconstruction_weight * rec
        assert loss is not None  # every phase has at least one of the two
        terms["loss"] = loss.detach()
        return loss, terms


def gaussian_noise(config: TrainConfig, step: int, rank: int, device: torch.device) -> Noise | None:
    """The noise of one step (sec. 4.2), or None. Its stream follows from seed, step and rank alone, so a continued run
    draws what the unbroken one would have drawn."""
    if config.noise_location == "none" or config.noise_sigma == 0:
        return None
    generator = torch.Generator(device).manual_seed(stream_seed(config.seed, step, rank))

    def add(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return x + (config.noise_sigma * noise).to(x.dtype)

    return add


def stream_seed(*parts: int) -> int:
    """A seed for an independent random stream, mixed from small integers (FNV-1a over their bytes, 63 bits)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little", signed=True):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD over every parameter of both networks: momentum is kept per parameter over changes of phase.

    A parameter without a gradient in a phase keeps its value and its momentum: SGD skips it.
    """
    return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    lr: float,
    config: TrainConfig,
    noise: Noise | None = None,
) -> dict[str, Tensor]:
    """Forward, backward and one step of SGD. Returns the detached terms of the loss (see PhaseModule.forward).

    Args:
        module: a PhaseModule, or DDP around one.
    """
    device = batch.images.device
    images = batch.images.float().div_(255)
    targets = [images, *(level.float() for level in batch.levels)]
    network_input = images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss, terms = module(network_input, batch.labels, targets, noise)
    loss.backward()
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    result: dict[str, Tensor] = terms
    return result


@torch.no_grad()
def validation_sums(net: ResNet18 | DefendNet, batch: Batch, config: TrainConfig) -> Tensor:
    """float64 [3]: how many are right, how many there are, and the summed squared error per pixel of level 0.

    The network must be in eval mode. The last entry is 0 without an auto-encoder.
    """
    images = batch.images.float().div_(255)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = classifier_of(net)(images)
        reconstruction = net.autoencoder(images)[0] if isinstance(net, DefendNet) else images
    right = (logits.argmax(1) == batch.labels).sum()
    error = (reconstruction.float() - images).square().mean((1, 2, 3)).sum()
    return torch.stack([right.double(), torch.tensor(float(len(images)), device=right.device).double(), error.double()])
