"""Adversarial training: examples made online against the network as it is, and the mixed loss.

Adv. FGSM: Goodfellow, Shlens, Szegedy 2015, https://arxiv.org/abs/1412.6572. Adv. PGD: Madry et al.
2018, https://arxiv.org/abs/1706.06083. Adv. DDN: Rony et al. 2019,
https://arxiv.org/abs/1811.09600.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.attacks.projections import project
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.errors import ConfigError


def adversarial_examples(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    generator: torch.Generator | None,
    max_norm: float = 0.0,
) -> Tensor:
    """Make examples against the classifier as it is now, to be trained on.

    They are made in eval mode: batch norm uses its running statistics and keeps them, and dropout
    is off. Afterwards, also after an error, the mode of every submodule and every parameter's
    ``requires_grad`` and ``.grad`` are as before. No sample is dropped on success: Madry et al.
    train on the last iterate, and examples just behind the decision boundary would be another
    training set. DDN and C&W return the image itself if it is misclassified already or nothing is
    found.

    An autocast around the call also holds inside, so the attack runs in the precision of training.
    Its loss and the gradient with respect to the images are float32. A ``torch.no_grad`` around the
    call changes nothing.

    Args:
        classifier: maps [0,1] images to logits [N,K]. A DDP wrapper is taken off, since its forward
            would wait for other ranks' gradients.
        images: float32 [N,C,H,W] in [0,1], without a gradient of their own.
        labels: int64 [N], true classes.
        spec: the attack and its settings.
        generator: CPU generator of the attack's draws (the start of PGD); None takes torch's global
            one.
        max_norm: largest L2 norm of a sample's perturbation; a longer one is scaled down. Rony et
            al. use it with DDN, 2.4 on MNIST and 1.0 on CIFAR-10. 0: no limit.

    Returns:
        A new float32 tensor [N,C,H,W] in [0,1], detached.

    Raises:
        ConfigError: max_norm is negative or not finite.
        ValueError: images or labels have the wrong type, shape or range.
    """
    if not 0 <= max_norm < math.inf:
        raise ConfigError.of("max_norm", max_norm, "a finite number, 0 (no limit) or more")
    network = classifier.module if isinstance(classifier, DistributedDataParallel) else classifier
    clean = images.detach()
    # With no_grad only the attack's own gradient passes record anything.
    with torch.no_grad(), _frozen(network):
        examples = run_attack(spec, _Float32Logits(network), clean, labels, generator=generator)
        if max_norm:
            examples = project(examples, clean, max_norm, "l2")
        return examples.clamp_(0, 1)


def mixed_loss(clean_loss: Tensor, adversarial_loss: Tensor, share: float) -> Tensor:
    """Return (1 - share) * clean + share * adversarial.

    Args:
        clean_loss, adversarial_loss: scalars, or tensors of one shape.
        share: 0 to 1. Goodfellow et al. 2015 use 0.5, Madry et al. use 1.

    Raises:
        ConfigError: the share is outside [0,1].
    """
    if not 0 <= share <= 1:
        raise ConfigError.of("share", share, "a number from 0 (clean only) to 1 (adversarial only)")
    return (1 - share) * clean_loss + share * adversarial_loss


class _Float32Logits(nn.Module):
    """A network with float32 logits under any autocast.

    In bfloat16 the softmax of a confident prediction would round to 1 and its gradient to 0.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits.float()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode without trainable parameters while the body runs.

    The modes are set one by one, since ``train()`` has one mode for all submodules and may be
    overridden. Freezing keeps autocast from caching casts of the weights during the attack, which a
    training pass under the same autocast would then use. It saves no time: attacks differentiate
    only with respect to the images.
    """
    modes = [(module, module.training) for module in network.modules()]
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
