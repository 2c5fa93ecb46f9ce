"""Optimisation step of each phase, and one batch of validation.

A phase is a module that registers exactly the parameters that get a gradient in it, so that DDP
never has to search for unused ones. The training loop (``pipeline/training/loop.py``) wraps it in
DDP and rebuilds it when the phase changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.config import TrainConfig
from components.models.comdefend import ComDefend
from components.models.defend import DefendNet, Noise, classify_with_noise
from components.network import classifier_of
from components.precision import true_float32
from components.training.adversarial import kl_divergence, mixed_loss, training_examples
from components.training.augment import Batch, targets_of
from components.training.losses import reconstruction_loss, reconstruction_terms
from components.training.schedule import Phase


class PhaseModule(nn.Module):
    """Loss of one phase, as a module over exactly the parameters that the phase trains.

    - classifier: L_cls.
    - autoencoder: L_rec.
    - joint: L_cls + w * L_rec (eq. 3).
    - adversarial, adversarial_autoencoder, adversarial_joint: the same on examples. L_cls is then
      the loss of adversarial training (``adversarial_loss``), and L_rec compares with the levels of
      the clean images.
    - reformer: ComDefend's loss.
    """

    def __init__(self, net: nn.Module, phase: Phase, config: TrainConfig) -> None:
        super().__init__()
        self.phase = phase
        self.config = config
        self.on_examples = phase.startswith("adversarial")
        # A tuple hides the module: nn.Module would register its parameters as the phase's own.
        self._attacked = (classifier_of(net),) if self.on_examples else ()
        if phase in ("classifier", "adversarial"):
            self.classifier = classifier_of(net)
        elif phase == "reformer":
            self.reformer = net
        elif not isinstance(net, DefendNet):
            raise ValueError(f"phase {phase!r} needs an auto-encoder")
        elif phase in ("autoencoder", "adversarial_autoencoder"):
            self.autoencoder = net.autoencoder
        else:
            self.net = net

    @property
    def attacked(self) -> nn.Module | None:
        """Return the classifier that examples are made on; None if the phase has no examples."""
        return self._attacked[0] if self._attacked else None

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Sequence[Tensor],
        noise: Noise | None,
        adversarial: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (a scalar) and its detached terms: loss_cls, rec_0, rec_1, ...

        Args:
            images: float32 [N, C, W, W] in [0,1], the network's input.
            targets: the clean levels that have a target, level 0 first.
            noise: added to the latent map or to the images, as the config says, or to a reformer's
                code.
            adversarial: examples of ``images``, in the phases on examples.
        """
        if self.phase == "reformer":
            return self._reformer(images, noise)
        latent_noise = noise if self.config.noise_location == "latent" else None
        if noise is not None and self.config.noise_location == "input":
            images = noise(images)
        inputs = images
        if self.on_examples:
            assert adversarial is not None
            inputs = adversarial
        terms: dict[str, Tensor] = {}
        loss: Tensor | None = None
        reconstruction = None
        if hasattr(self, "autoencoder"):
            reconstruction = self.autoencoder(inputs, latent_noise)
        else:
            if hasattr(self, "net"):
                classifier = self.net.classifier
                logits, reconstruction = self.net.joint(inputs, latent_noise, latent_noise)
            else:
                classifier = self.classifier
                logits = classify_with_noise(classifier, inputs, latent_noise)
            clean = (classifier, images) if self.on_examples else None
            loss, terms = self._classification(logits, labels, clean)
        if reconstruction is not None:
            levels = reconstruction_terms(reconstruction, targets, self.config.reconstruction_reduction)
            rec = reconstruction_loss(levels, self.config.lam)
            terms["loss_rec"] = rec.detach()
            terms |= {f"rec_{m}": term.detach() for m, term in enumerate(levels)}
            loss = rec if loss is None else loss + self.config.reconstruction_weight * rec
        assert loss is not None  # Every phase has at least one of the two losses.
        terms["loss"] = loss.detach()
        return loss, terms

    def _classification(
        self, logits: Tensor, labels: Tensor, clean: tuple[nn.Module, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the classifier's loss, and its terms.

        Args:
            logits: of the clean images, or of the examples if ``clean`` is given.
            clean: classifier and clean images of a phase on examples.
        """
        if clean is None:
            loss = F.cross_entropy(logits.float(), labels)
            return loss, {"loss_cls": loss.detach()}
        classifier, images = clean
        share, trades = self.config.adversarial_share, self.config.adversarial_loss == "trades"
        if trades:
            clean_logits = classifier(images).float()
            natural = F.cross_entropy(clean_logits, labels)
            divergence = kl_divergence(logits.float(), clean_logits).mean()
            loss = natural + self.config.adversarial_beta * divergence
            return loss, {"loss_cls": natural.detach(), "loss_kl": divergence.detach()}
        loss = F.cross_entropy(logits.float(), labels)
        terms = {"loss_adv": loss.detach()}
        if share < 1:
            natural = F.cross_entropy(classifier(images).float(), labels)
            terms["loss_cls"] = natural.detach()
            loss = mixed_loss(natural, loss, share)
        return loss, terms

    def _reformer(self, images: Tensor, noise: Noise | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self.reformer, ComDefend)
        loss, terms = self.reformer.training_loss(images, noise)
        return loss, {**terms, "loss": loss.detach()}


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return SGD or Adam over every parameter of both networks.

    A parameter without a gradient in a phase keeps its value and its momentum, since the optimizer
    skips it.
    """
    if config.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    lr: float,
    config: TrainConfig,
    sizes: Sequence[int] = (),
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Run forward, backward and one step of the optimizer.

    Args:
        module: a PhaseModule, or DDP around one.
        sizes: level sizes in pixels, level 0 first; needed if levels are computed and not stored
            (:func:`targets_of`).
        generator: of the attack of adversarial training.

    Returns:
        The detached terms of the loss (see :meth:`PhaseModule.forward`).
    """
    device = batch.images.device
    # The images are copied to memory of the plain format. The strides of cropped grey images also
    # read as channels-last, in which PyTorch's float32 gradients on CPU corrupt memory
    # (components.config).
    images = torch.empty(batch.images.shape, device=device).copy_(batch.images).div_(255)
    targets = targets_of(images, batch, config, sizes)
    network_input = images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
    optimizer.zero_grad(set_to_none=True)
    phase_module = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(phase_module, PhaseModule)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        examples = None
        if phase_module.attacked is not None:
            # Not the wrapped module: DDP would count these passes as steps.
            examples = training_examples(phase_module.attacked, network_input, batch.labels, config, generator)
        loss, terms = module(network_input, batch.labels, targets, noise, examples)
    loss.backward()
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    result: dict[str, Tensor] = terms
    return result


@torch.no_grad()
@true_float32()
def validation_sums(net: nn.Module, batch: Batch) -> Tensor:
    """Return the sums over a batch from which accuracy and reconstruction error follow.

    They are computed in true float32 whatever training computes in, since a sweep chooses by this
    accuracy.

    Args:
        net: in eval mode.

    Returns:
        float64 [3]: number of correct images, number of images, and summed mean squared error of
        level 0. Without a classifier or a reconstruction that sum is 0.
    """
    images = batch.images.float().div_(255)
    correct = torch.zeros((), device=images.device)
    reconstruction = images
    if isinstance(net, ComDefend):
        reconstruction = net(images)
    else:
        correct = (classifier_of(net)(images).argmax(1) == batch.labels).sum()
    if isinstance(net, DefendNet):
        reconstruction = net.autoencoder(images)[0]
    error = (reconstruction.float() - images).square().mean((1, 2, 3)).sum()
    count = torch.tensor(float(len(images)), device=correct.device)
    return torch.stack([correct.double(), count.double(), error.double()])
