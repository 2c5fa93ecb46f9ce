"""The U/H pyramid decoder (sec. 3.3, Fig. 4): from the latent map to the image, level by level, low to high frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What a decoder must know of one encoder block: its residual blocks, output channels and output size in pixels."""

    depth: int
    in_channels: int
    out_channels: int
    size: int


def _output_padding(size_in: int, size_out: int) -> int:
    """A stride-2 transposed 3x3 convolution gives 2n-1 pixels, or 2n with one more row and column."""
    extra = size_out - (2 * size_in - 1)
    if extra not in (0, 1):
        raise ConfigError.of("data.image_size", size_out, f"a size that stride 2 reaches from {size_in} pixels")
    return extra


class DecodeBlock(nn.Module):
    """A residual block of the mirror: 3x3 convolution, then a 3x3 (transposed) convolution, added to a projection.

    Args:
        in_channels, out_channels: of the feature maps.
        size_in, size_out: side lengths in pixels; equal, or about doubled (4 -> 7 as well as 4 -> 8).
        last: no batch norm and no activation at the end, since what comes out is a (signed) image.

    Raises:
        ConfigError: a size that one stride-2 transposed convolution cannot reach.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, size_in: int, size_out: int, last: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2: nn.Module
        self.skip: nn.Module
        if size_in == size_out:
            self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1, bias=last)
            same = in_channels == out_channels
            self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        else:
            extra = _output_padding(size_in, size_out)
            self.conv2 = nn.ConvTranspose2d(hidden, out_channels, 3, 2, 1, output_padding=extra, bias=last)
            self.skip = nn.ConvTranspose2d(in_channels, out_channels, 1, 2, output_padding=extra, bias=False)
        self.bn2 = nn.Identity() if last else nn.BatchNorm2d(out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x)
        return y if self.last else torch.relu(y)


def mirrored(
    shape: BlockShape, in_channels: int, out_channels: int, size_in: int, size_out: int, *, extra_conv: bool, last: bool
) -> nn.Sequential:
    """The encoder block in reverse order: its convolutions with its channels, the last one transposed where size grows.

    ``extra_conv``: the block has a stem convolution in front, mirrored by one more (transposed) convolution at the end.
    """
    c = shape.out_channels
    blocks: list[nn.Module] = []
    for i in range(shape.depth):
        first, final = i == 0, i == shape.depth - 1 and not extra_conv
        blocks.append(
            DecodeBlock(
                in_channels if first else c,
                c,
                out_channels if final else c,
                size_in,
                size_out if final else size_in,
                last and final,
            )
        )
    if extra_conv:
        blocks.append(_StemMirror(c, out_channels, size_in, size_out))
    return nn.Sequential(*blocks)


class _StemMirror(nn.Module):
    """The mirror of the stem: one stride-2 transposed 3x3 convolution to the image, no activation."""

    def __init__(self, in_channels: int, out_channels: int, size_in: int, size_out: int) -> None:
        super().__init__()
        padding = _output_padding(size_in, size_out)
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class HighFrequency(nn.Module):
    """H: a 2-layer residual block from an encoder map to an image (sec. 3.3).

    3x3 convolution to the encoder map's own channels, 3x3 convolution to the image's, 1x1 convolution on the skip.
    """

    def __init__(self, encoder_channels: int, image_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(encoder_channels, encoder_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(encoder_channels)
        self.conv2 = nn.Conv2d(encoder_channels, image_channels, 3, padding=1)
        self.skip = nn.Conv2d(encoder_channels, image_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.conv2(torch.relu(self.bn1(self.conv1(features)))) + self.skip(features)
        return out


class PyramidDecoder(nn.Module):
    """image_{M-1} = D_{M-1}(latent); image_m = U(image_{m+1}) + H(E_m) for m < M-1 (eq. 2).

    Bands are signed, so nothing is activated after the last convolution of D_{M-1}, U and H, nor after their sum.

    Args:
        blocks: shapes of the encoder blocks, input to latent. Block m < M-1 has the size of level m; the rest is the
            stack that D_{M-1} mirrors.
        sizes: level sizes in pixels, level 0 first (``components.config.level_sizes``).
        image_channels: 1 or 3.

    Raises:
        ConfigError: a level for which the encoder has no map of its size.
    """

    def __init__(self, blocks: Sequence[BlockShape], sizes: Sequence[int], image_channels: int) -> None:
        super().__init__()
        levels = len(sizes)
        if levels > len(blocks):
            raise ConfigError.of("pyramids.levels", levels, f"at most {len(blocks)}, one per encoder block")
        for m in range(levels - 1):
            if blocks[m].size != sizes[m]:
                raise ConfigError.of(
                    "data.image_size",
                    sizes[0],
                    f"a size whose encoder maps are the levels: block {m} gives {blocks[m].size} pixels, level {m} has {sizes[m]}",
                )
        self.sizes = tuple(sizes)
        self.up = nn.ModuleList(
            mirrored(blocks[m], image_channels, image_channels, sizes[m + 1], sizes[m], extra_conv=m == 0, last=True)
            for m in range(levels - 1)
        )
        self.high = nn.ModuleList(HighFrequency(blocks[m].out_channels, image_channels) for m in range(levels - 1))

        # D_{M-1}: the last encoder block's mirror comes first and does the doubling; the others follow at stride 1
        bottom: list[nn.Module] = []
        size = blocks[-1].size
        for i in range(len(blocks) - 1, levels - 2, -1):
            final = i == levels - 1
            # the size that the mirrored block came from, 4 -> 7 by the transposed convolution's padding, 4 -> 8 exactly;
            # never above the level's own, which is the smaller of the two where floor and ceiling differ (30: 15, 8 | 7)
            grown = min(blocks[i - 1].size if i else sizes[-1], sizes[-1])
            out = image_channels if final else blocks[i].in_channels
            bottom.append(mirrored(blocks[i], blocks[i].out_channels, out, size, grown, extra_conv=i == 0, last=final))
            size = grown
        if size != sizes[-1]:
            raise ConfigError.of(
                "data.image_size",
                sizes[0],
                f"a size whose last level {sizes[-1]} is reached from {blocks[-1].size} pixels",
            )
        self.bottom = nn.Sequential(*bottom)

    def forward(self, features: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """Reconstructed images, level 0 first: [N, C, W_m, W_m], signed, about [0,1].

        Args:
            features: outputs of the encoder blocks, input to latent, [N, C_i, W_i, W_i].
            latent: the last of them, with noise if there is any.
        """
        image = self.bottom(latent)
        images = [image]
        for m in range(len(self.sizes) - 2, -1, -1):
            image = self.up[m](image) + self.high[m](features[m])
            images.append(image)
        return images[::-1]
