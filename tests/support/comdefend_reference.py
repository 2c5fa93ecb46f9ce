"""Inputs of the frozen comparison with ComDefend's published training loss, and the script that freezes it.

``tests/components/models/test_comdefend.py`` compares our loss and its gradients on these inputs with
the figures in ``tests/support/comdefend_reference.json``. Those come from the authors' own ``train``
function, which is not part of this repository. To make them again, clone
https://github.com/jiaxiaojunQAQ/Comdefend and run, from the root,

    PYTHONPATH=.:CLONE python tests/support/comdefend_reference.py

https://github.com/ZhangYuef/Comdefend_tensorflow (9e5391f) and the authors' TensorFlow script have the
same loss: MSE of the reconstruction + 1e-4 * mean(b^2), b = sigmoid(code - noise).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import math
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from authors_reference import Draws, as_text
from torch import Tensor, nn

FIGURES = Path(__file__).with_suffix(".json")
SIGMA = 20.0
CASES = ("reconstruction", "penalty")


def fill(com: nn.Module, rec: nn.Module, case: str) -> None:
    """Give the convolutions of ComCNN and RecCNN weights by seed.

    The codes lie on the scale of the noise. In the case "penalty" RecCNN's last layer is zero: with
    images close to 0.5 the reconstruction costs next to nothing, and the penalty is most of the loss.
    """
    draw = Draws(3)
    with torch.no_grad():
        for network, last_gain in ((com, SIGMA / 2), (rec, 0.0 if case == "penalty" else 1.0)):
            layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
            for layer in layers:
                bound = math.sqrt(6 / (9 * layer.in_channels)) * (last_gain if layer is layers[-1] else 1)
                layer.weight.copy_(bound * (2 * draw(*layer.weight.shape) - 1))
                assert layer.bias is not None
                layer.bias.copy_(0.1 * bound * (2 * draw(*layer.bias.shape) - 1))


def images_and_noise(case: str) -> tuple[Tensor, Tensor]:
    """Return images float32 [2,3,8,8] and the noise [2,12,8,8] that the authors subtract from the code."""
    images, noise = Draws(4)(2, 3, 8, 8), 2 * (2 * Draws(5)(2, 12, 8, 8) - 1)
    return (0.5 + 0.01 * (images - 0.5) if case == "penalty" else images), noise


def gradient_norms(network: nn.Module) -> list[float]:
    return [float(f"{p.grad.norm().item():.6g}") for p in network.parameters() if p.grad is not None]


# --- the authors' figures


class Centred(nn.Module):
    """The authors' encoder on images minus 0.5.

    Their TensorFlow script subtracts 0.5; their Torch script does not.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.encoder(x - 0.5)
        return code


def freeze_case(case: str) -> dict[str, Any]:
    import Train_comdefend_Torch as authors

    com, rec = authors.encoder(), authors.decoder()
    fill(com, rec, case)
    images, noise = images_and_noise(case)
    optimizer = mock.Mock()  # The authors call zero_grad and step. The mock keeps the gradients.
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(Tensor, "cuda", lambda tensor: tensor),
        mock.patch.object(torch, "randn", return_value=noise),
    ):
        args = argparse.Namespace(std=SIGMA, interval=1)
        authors.train(args, [(images, torch.zeros(2))], Centred(com), rec, optimizer)
    (loss,) = re.findall(r"^loss: (\S+)$", printed.getvalue(), re.MULTILINE)
    return {"loss": float(loss), "com": gradient_norms(com), "rec": gradient_norms(rec)}


if __name__ == "__main__":
    import Train_comdefend_Torch

    clone = Path(Train_comdefend_Torch.__file__).parent
    revision = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    figures = {
        "source": "github.com/jiaxiaojunQAQ/Comdefend, Train_comdefend_Torch.py: train()",
        "revision": revision.stdout.strip(),
        "made_by": "tests/support/comdefend_reference.py",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        **{case: freeze_case(case) for case in CASES},
    }
    FIGURES.write_text(as_text(figures))
