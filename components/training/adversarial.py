"""Adversarial training: examples made online against the network as it is, and the mixed loss.

Adv. FGSM: Goodfellow, Shlens, Szegedy 2015, https://arxiv.org/abs/1412.6572. Adv. PGD: Madry et al.
2018, https://arxiv.org/abs/1706.06083. Adv. DDN: Rony et al. 2019,
https://arxiv.org/abs/1811.09600. TRADES: Zhang et al. 2019, https://arxiv.org/abs/1901.08573.
N-FGSM: de Jorge et al. 2022, https://arxiv.org/abs/2202.01181.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.attacks.common import input_gradient
from components.attacks.fast_copy import folded
from components.attacks.pgd import random_start
from components.attacks.projections import project
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.config import TrainConfig
from components.errors import ConfigError

N_FGSM_NOISE = 2.0
"""Largest noise of N-FGSM, in eps (de Jorge et al. 2022, sec. 4)."""
TRADES_START = 0.001
"""Standard deviation of the noise that TRADES' examples start from. At the image itself the
divergence has no slope."""


def adversarial_examples(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    generator: torch.Generator | None,
    max_norm: float = 0.0,
    fold: bool = False,
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
        fold: search on a copy with batch norm folded into the convolutions, equal but for rounding.
            It must be a network of this project's (see
            :func:`~components.attacks.fast_copy.folded`).

    Returns:
        A new float32 tensor [N,C,H,W] in [0,1], detached.

    Raises:
        ConfigError: max_norm is negative or not finite.
        ValueError: images or labels have the wrong type, shape or range.
    """

    def attack(network: nn.Module, clean: Tensor) -> Tensor:
        return run_attack(spec, network, clean, labels, generator=generator)

    return _run_frozen(attack, classifier, images, max_norm, fold)


def training_examples(
    classifier: nn.Module, images: Tensor, labels: Tensor, config: TrainConfig, generator: torch.Generator | None
) -> Tensor:
    """Make the examples of a step of adversarial training; see :func:`adversarial_examples`.

    With the cross entropy they are those of ``config.adversarial_attack``. TRADES maximises the
    divergence between the predictions of the example and of the clean image instead.

    - pgd and trades: from the image plus noise of standard deviation 0.001, as in Zhang et al.
      2019. Step size 2.5 eps / steps, as everywhere here.
    - n-fgsm: from the image plus noise that is uniform up to 2 eps, one step of size eps. The
      result is not projected to the eps-ball: it is up to 3 eps away (de Jorge et al. 2022).
    """
    eps, steps, max_norm = config.adversarial_eps, config.adversarial_steps, config.adversarial_max_norm
    single_step = config.adversarial_attack == "n-fgsm"
    # A GPU takes longer to copy a network than to attack it.
    fold = images.device.type == "cpu" and config.may_fold_examples
    if config.adversarial_loss == "ce" and not single_step:
        spec = adversarial_spec(config)
        return adversarial_examples(classifier, images, labels, spec, generator=generator, max_norm=max_norm, fold=fold)

    def attack(network: nn.Module, clean: Tensor) -> Tensor:
        losses: Callable[[Tensor], Tensor]
        if config.adversarial_loss == "trades":
            clean_logits = network(clean)
            losses = lambda logits: kl_divergence(logits, clean_logits)  # noqa: E731
        else:
            losses = lambda logits: F.cross_entropy(logits, labels, reduction="none")  # noqa: E731
        if single_step:
            start = random_start(clean, N_FGSM_NOISE * eps, "linf", generator)
            gradient, _ = input_gradient(network, start, losses)
            return start + eps * gradient.sign()
        x = clean + TRADES_START * torch.randn(clean.shape, generator=generator).to(clean.device)
        for _ in range(steps):
            gradient, _ = input_gradient(network, x, losses)
            x = project(x + (2.5 * eps / steps) * gradient.sign(), clean, eps, "linf")
        return x

    return _run_frozen(attack, classifier, images, max_norm, fold)


def adversarial_spec(config: TrainConfig) -> AttackSpec:
    """Return the attack of adversarial training with the cross entropy; n-fgsm has none."""
    eps, steps = config.adversarial_eps, config.adversarial_steps
    text = {"fgsm": f"fgsm:eps={eps}", "pgd": f"pgd:eps={eps},steps={steps}", "ddn": f"ddn:steps={steps}"}
    return AttackSpec.parse(text[config.adversarial_attack])


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference || prediction) of the softmaxes of two batches of logits [N,K], shape [N].

    It is TRADES' divergence of an example's prediction from the clean one.
    """
    # In logarithms, because the gradient of p log p is not a number where p underflows to 0.
    return F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True).sum(1)


def _run_frozen(
    attack: Callable[[nn.Module, Tensor], Tensor],
    classifier: nn.Module,
    images: Tensor,
    max_norm: float,
    fold: bool,
) -> Tensor:
    """Run ``attack(network, images)`` as :func:`adversarial_examples` describes."""
    if not 0 <= max_norm < math.inf:
        raise ConfigError.of("max_norm", max_norm, "a finite number, 0 (no limit) or more")
    network = classifier.module if isinstance(classifier, DistributedDataParallel) else classifier
    clean = images.detach()
    # With no_grad only the attack's own gradient passes record anything.
    with torch.no_grad(), _frozen(network):
        copy = folded(network) if fold else None
        examples = attack(_Float32Logits(network if copy is None else copy), clean)
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
