"""The convolutions of a network."""

from __future__ import annotations

from torch import nn


def convolutions(module: nn.Module) -> list[tuple[str, int, int, int, int]]:
    """Return (kind, in, out, kernel, stride) of every convolution outside the skips, in order."""
    out = []
    for name, m in module.named_modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and "skip" not in name:
            kind = "T" if isinstance(m, nn.ConvTranspose2d) else "C"
            out.append((kind, m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]))
    return out
