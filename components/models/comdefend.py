"""ComDefend, a reformer in front of a classifier that is not trained with it.

Jia, Wei, Cao, Foroosh, "ComDefend: An Efficient Image Compression Model to Defend Adversarial
Examples", CVPR 2019, https://arxiv.org/abs/1811.12673

It compresses an image to a few bits per pixel and reconstructs it. This module has its shapes, loss
and constants; the training loop is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.errors import ConfigError

BIT_PENALTY = 1e-4
"""Weight of the mean square of the soft bits in the loss. It favours zeros, that is, a shorter
code."""
_CODE_CHANNELS = {1: 4, 3: 12}
# Hidden channels of the two networks at width 64.
_COM = {1: (32, 64, 128, 256, 128, 64, 64, 32), 3: (16, 32, 64, 128, 256, 128, 64, 32)}
_REC = {1: (32, 64, 128, 256, 128, 64, 64, 32), 3: (32, 64, 128, 256, 128, 64, 32, 16)}


class ComDefend(nn.Module):
    """ComCNN (image to code) and RecCNN (bits to image).

    Each has nine 3x3 convolutions with ELU between them. Training adds noise to the code, far
    larger than a sigmoid's own scale, so that only what survives as a bit reaches the
    reconstruction. At test time (``forward``, in either mode) the code is binarised. Any image size
    works.

    **Choice**, initial weights (the paper names none): He et al. 2015, and ComCNN's last layer
    times sigma / 2, so that the code begins on the scale of the noise. With PyTorch's initial
    weights the code drowns in the noise at first: after 400 steps of Adam at 1e-3 (14x14 MNIST,
    width 8, seed 0) the MSE was 0.0862, that of a constant image, where this choice had 0.0050.

    Args:
        channels: image channels, 1 or 3.
        width: 64 is the paper's; hidden channels are multiplied by width / 64 and rounded, at least
            4 each.
        sigma: standard deviation of the noise on the code.
        seed: the only seed of the initial weights.

    Raises:
        ConfigError: channels, width or sigma is out of range.
    """

    def __init__(self, channels: int, *, width: int = 64, sigma: float = 20.0, seed: int = 0) -> None:
        super().__init__()
        if channels not in _CODE_CHANNELS:
            raise ConfigError.of("comdefend.channels", channels, "1 (grey) or 3 (RGB)")
        if width < 1:
            raise ConfigError.of("comdefend.width", width, "at least 1 (64 is the paper's)")
        if not 0 < sigma < math.inf:
            raise ConfigError.of("comdefend.sigma", sigma, "a finite number above 0 (20 is the paper's)")
        self.sigma = sigma
        self.surrogate_width = sigma / 3
        """Absolute code at which the surrogate gradient of ``forward`` has fallen to a quarter."""
        code = _CODE_CHANNELS[channels]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.com = _convolutions([channels, *_scaled(_COM[channels], width), code], last_gain=sigma / 2)
            self.rec = _convolutions([code, *_scaled(_REC[channels], width), channels], last_gain=1)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [N,C,H,W] in [0,1] to codes float32 [N, 4 or 12, H, W].

        The codes are those before noise and binarisation.
        """
        code: Tensor = self.com(images - 0.5)
        return code.float()

    def decode(self, bits: Tensor) -> Tensor:
        """Decode bits (or soft bits) in [0,1] to images float32 [N,C,H,W] in [0,1]."""
        return torch.sigmoid(self.rec(bits).float())

    def training_loss(
        self, images: Tensor, noise: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ComDefend's training loss, MSE(decode(b), images) + 1e-4 * mean(b^2).

        The soft bits are b = sigmoid(code + noise). The penalty is on them, as in the authors' code
        (jiaxiaojunQAQ/Comdefend, both versions). On the linear code it would hold the code within
        the noise.

        Args:
            images: float [N,C,H,W] in [0,1].
            noise: code -> code + N(0, sigma^2), so that the caller owns the random stream. It must
                apply ``sigma`` itself. None draws from torch's global stream of the device.

        Returns:
            The loss (a scalar) and its detached terms: ``loss``, ``loss_rec`` (the MSE),
            ``bit_power`` (mean(b^2)).
        """
        code = self.encode(images)
        noisy = noise(code) if noise is not None else code + self.sigma * torch.randn_like(code)
        bits = torch.sigmoid(noisy)
        reconstruction = F.mse_loss(self.decode(bits), images.float())
        power = bits.square().mean()
        loss = reconstruction + BIT_PENALTY * power
        return loss, {"loss": loss.detach(), "loss_rec": reconstruction.detach(), "bit_power": power.detach()}

    def forward(self, images: Tensor) -> Tensor:
        """Return the reformed images, float32 [N,C,H,W] in [0,1]: RecCNN of the bits code > 0.

        The result is deterministic. The step has no gradient, so a white-box attack gets that of a
        surrogate: straight through (Bengio et al. 2013) with the slope (1 + |code| / w)^-2, w =
        sigma / 3. The identity ignores how far a bit is from flipping. The sigmoid's slope is
        exactly 0 in float32 above 17, and training takes most of the code beyond that.

        The width was chosen on held-out training images (`benchmarks/bench_surrogate.py --device
        cuda --width 16 --steps 300 --samples 300 --seeds 3`: MNIST, n = 300, seeds 0 to 2, code rms
        90 to 102; NVIDIA H200, torch 2.11.0, 2026-11-28). Accuracy in % that PGD of 20 steps
        leaves, and median L2 of DDN's successes (40 steps), by seed:

        ========= ================== ================== ==================
        w         PGD, Linf 0.1      PGD, Linf 0.2      DDN, median L2
        ========= ================== ================== ==================
        sigma/10  82.3 / 77.7 / 74.0 55.7 / 46.3 / 41.0 1.35 / 1.28 / 1.16
        sigma/3   80.0 / 74.3 / 73.7 43.3 / 33.7 / 27.7 1.35 / 1.28 / 1.16
        sigma     81.3 / 77.0 / 75.3 43.7 / 30.7 / 23.3 1.42 / 1.35 / 1.28
        3 sigma   84.3 / 82.0 / 79.3 50.7 / 37.0 / 30.7 1.50 / 1.57 / 1.45
        10 sigma  87.7 / 84.7 / 83.3 56.7 / 48.3 / 43.3 1.61 / 1.69 / 1.58
        identity  88.0 / 87.0 / 84.7 60.3 / 60.3 / 51.7 1.76 / 1.83 / 1.65
        ========= ================== ================== ==================

        DDN leaves at most 2.3 % with any width. An attack with 20 steps leaves more than one with
        100 would.
        """
        bits: Tensor = _Binarise.apply(self.encode(images), self.surrogate_width)
        return self.decode(bits)


class _Binarise(torch.autograd.Function):
    """Step function of the code, 1 above 0, with the surrogate slope of ``ComDefend.forward``."""

    @staticmethod
    def forward(ctx: Any, code: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(code)
        ctx.width = width
        return (code > 0).to(code.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (code,) = ctx.saved_tensors
        return gradients[0] / (1 + code.abs() / ctx.width).square(), None


class Reformed(nn.Module):
    """Reformer in front of a classifier, as one model for any attack: images [0,1] -> logits.

    Examples made on it are white-box; examples made on ``classifier`` alone and judged on it are
    grey-box. At test time call ``eval()`` on it, which puts both parts into eval mode.

    Args:
        reformer: images [N,C,H,W] in [0,1] to images of the same shape and range.
        classifier: images [N,C,H,W] in [0,1] to logits [N,K].
    """

    def __init__(self, reformer: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.reformer = reformer
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.reformer(images))
        return logits


def _scaled(channels: Sequence[int], width: int) -> list[int]:
    return [max(4, round(c * width / 64)) for c in channels]


def _convolutions(channels: Sequence[int], last_gain: float) -> nn.Sequential:
    """Build 3x3 convolutions over these channels, with ELU between them.

    The initial weights of the last one are multiplied by ``last_gain``.
    """
    layers: list[nn.Module] = []
    for i in range(len(channels) - 1):
        conv = nn.Conv2d(channels[i], channels[i + 1], 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers += [conv, nn.ELU()]
    layers.pop()
    with torch.no_grad():
        conv.weight.mul_(last_gain)
    return nn.Sequential(*layers)
