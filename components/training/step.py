"""One optimisation step of each phase, and one pass of validation: PyTorch alone, no Ray.

A phase is a module that registers exactly the parameters which get a gradient in it, so that DDP never has to search for
unused ones. The driver of the steps (``pipeline/training/train.py``) wraps it in DDP and rebuilds it where the phase changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.attacks.spec import AttackSpec
from components.config import TrainConfig
from components.config import stored_levels as stored_levels
from components.models.comdefend import ComDefend
from components.models.defend import DefendNet, Noise, classify_with_noise
from components.network import classifier_of
from components.precision import true_float32
from components.training.adversarial import adversarial_examples, mixed_loss
from components.training.augment import Batch, targets_of
from components.training.losses import reconstruction_loss, reconstruction_terms
from components.training.schedule import Phase


class PhaseModule(nn.Module):
    """The loss of one phase as a module over exactly the parameters that the phase trains.

    classifier: L_cls. autoencoder: L_rec. joint: L_cls + w * L_rec (eq. 3). adversarial: L_cls of examples, and of the clean
    images too where ``adversarial_share`` is below 1. reformer: ComDefend's own.
    """

    def __init__(self, net: nn.Module, phase: Phase, config: TrainConfig) -> None:
        super().__init__()
        self.phase = phase
        self.config = config
        if phase in ("classifier", "adversarial"):
            self.classifier = classifier_of(net)
        elif phase == "reformer":
            self.reformer = net
        elif not isinstance(net, DefendNet):
            raise ValueError(f"phase {phase!r} needs an auto-encoder")
        elif phase == "autoencoder":
            self.autoencoder = net.autoencoder
        else:
            self.net = net

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Sequence[Tensor],
        noise: Noise | None,
        adversarial: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a scalar) and its detached terms: loss_cls, rec_0, rec_1, ...

        Args:
            images: float [N, C, W, W] in [0,1], what the network sees.
            targets: the clean levels that have a target, level 0 first.
            noise: added to the latent, or to the images, as the config says; to a reformer's code.
            adversarial: examples of ``images``, phase "adversarial" only.
        """
        if self.phase == "reformer":
            loss, terms = self.reformer.training_loss(images, noise)
            return loss, {**terms, "loss": loss.detach()}
        if self.phase == "adversarial":
            assert adversarial is not None
            return self._adversarial(images, labels, adversarial)
        latent_noise = noise if self.config.noise_location == "latent" else None
        if noise is not None and self.config.noise_location == "input":
            images = noise(images)
        terms = {}
        loss: Tensor | None = None
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

    def _adversarial(self, images: Tensor, labels: Tensor, adversarial: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = self.config.adversarial_share
        loss = F.cross_entropy(self.classifier(adversarial).float(), labels)
        terms = {"loss_adv": loss.detach()}
        if share < 1:
            clean = F.cross_entropy(self.classifier(images).float(), labels)
            terms["loss_cls"] = clean.detach()
            loss = mixed_loss(clean, loss, share)
        return loss, {**terms, "loss": loss.detach()}


def make_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD (or Adam) over every parameter of both networks: momentum is kept per parameter over changes of phase.

    A parameter without a gradient in a phase keeps its value and its momentum: the optimizer skips it.
    """
    if config.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def adversarial_spec(config: TrainConfig) -> AttackSpec:
    """The attack of adversarial training."""
    eps, steps = config.adversarial_eps, config.adversarial_steps
    text = {"fgsm": f"fgsm:eps={eps}", "pgd": f"pgd:eps={eps},steps={steps}", "ddn": f"ddn:steps={steps}"}
    return AttackSpec.parse(text[config.adversarial_attack])


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
    """Forward, backward and one step of the optimizer. Returns the detached terms of the loss (see PhaseModule.forward).

    Args:
        module: a PhaseModule, or DDP around one.
        sizes: level sizes in pixels, level 0 first; needed where levels are computed and not stored (``targets_of``).
        generator: of the attack of adversarial training.
    """
    device = batch.images.device
    # into memory of the plain format: a crop of grey images has strides that read as channels-last too, in which PyTorch's
    # float32 gradients on CPU corrupt memory (see components.config)
    images = torch.empty(batch.images.shape, device=device).copy_(batch.images).div_(255)
    targets = targets_of(images, batch, config, sizes)
    network_input = images.contiguous(memory_format=torch.channels_last) if config.channels_last else images
    optimizer.zero_grad(set_to_none=True)
    phase_module = getattr(module, "module", module)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        examples = None
        if phase_module.phase == "adversarial":
            examples = adversarial_examples(
                phase_module.classifier,  # not the wrapped module: DDP would count these passes as steps
                network_input,
                batch.labels,
                adversarial_spec(config),
                generator=generator,
                max_norm=config.adversarial_max_norm,
            )
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
    """Return float64 [3]: how many are right, how many there are, and the summed squared error per pixel of level 0.

    The network must be in eval mode. What it does not have (a classifier, a reconstruction) counts 0. Computed in true
    float32, whatever training computes in: a sweep chooses by this accuracy.
    """
    images = batch.images.float().div_(255)
    right = torch.zeros((), device=images.device)
    reconstruction = images
    if isinstance(net, ComDefend):
        reconstruction = net(images)
    else:
        right = (classifier_of(net)(images).argmax(1) == batch.labels).sum()
    if isinstance(net, DefendNet):
        reconstruction = net.autoencoder(images)[0]
    error = (reconstruction.float() - images).square().mean((1, 2, 3)).sum()
    return torch.stack([right.double(), torch.tensor(float(len(images)), device=right.device).double(), error.double()])
