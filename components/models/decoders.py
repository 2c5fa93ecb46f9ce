"""Decoders: from the latent map to the image, level by level, low to high frequency.

``pyramid`` is the paper's decoder (sec. 3.3, Fig. 4). ``hourglass`` (Fig. 3), ``hourglass_concat``
and ``hourglass_add`` are compared with it (Table 1). All mirror the encoder and reconstruct every
level.

A decoder is built from the measured shapes of the encoder's units. A *stage* is a unit with the
pools that follow it, and is mirrored as one. Mirrors never interpolate: a stride-2 transposed
convolution lets a map grow from n pixels to 2n-1 or 2n. Sizes that this cannot reach are refused
before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models.decoder_plan import Connection, DecoderKind, DecoderPlan, Stage, UnitShape, plan_decoder, reaches


def _output_padding(size_in: int, size_out: int) -> int:
    """Return a stride-2 transposed convolution's output padding: 0 for 2n-1 pixels, 1 for 2n."""
    if not reaches(size_in, size_out):
        raise ConfigError.of("data.image_size", size_out, f"a size that stride 2 reaches from {size_in} pixels")
    return size_out - (2 * size_in - 1)


def _conv3(in_channels: int, out_channels: int, size_in: int, size_out: int, bias: bool) -> nn.Module:
    """Build a 3x3 convolution, transposed and with stride 2 if the size grows."""
    if size_in == size_out:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    padding = _output_padding(size_in, size_out)
    return nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding=padding, bias=bias)


def _skip(in_channels: int, out_channels: int, size_in: int, size_out: int) -> nn.Module:
    """Build a residual block's skip: an identity or a 1x1 (transposed) convolution."""
    if size_in != size_out:
        padding = _output_padding(size_in, size_out)
        return nn.ConvTranspose2d(in_channels, out_channels, 1, 2, output_padding=padding, bias=False)
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)


class DecodeBlock(nn.Module):
    """Residual block of a mirror: two 3x3 convolutions, one may be transposed, and a skip.

    Args:
        in_channels, out_channels: of the feature maps.
        size_in, size_out: side lengths in pixels; equal, or about doubled (4 -> 7 as well as 4 ->
            8).
        last: no batch norm and no activation at the end, since the output is a (signed) image.

    Raises:
        ConfigError: one stride-2 transposed convolution cannot reach the size.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, size_in: int, size_out: int, last: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = _conv3(hidden, out_channels, size_in, size_out, bias=last)
        self.skip = _skip(in_channels, out_channels, size_in, size_out)
        self.bn2 = nn.Identity() if last else nn.BatchNorm2d(out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x)
        return y if self.last else torch.relu(y)


class DecodeBottleneck(nn.Module):
    """Bottleneck of a mirror: 1x1, 3x3 (transposed if the size grows) and 1x1, added to a skip.

    Arguments and errors as for :class:`DecodeBlock`.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, size_in: int, size_out: int, last: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = _conv3(hidden, hidden, size_in, size_out, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=last)
        self.skip = _skip(in_channels, out_channels, size_in, size_out)
        self.bn3 = nn.Identity() if last else nn.BatchNorm2d(out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y)) + self.skip(x)
        return y if self.last else torch.relu(y)


class DecodeConv(nn.Module):
    """One 3x3 (transposed) convolution with batch norm and ReLU.

    With ``last`` it has neither of the two, since the output is a signed image.

    Raises:
        ConfigError: one stride-2 transposed convolution cannot reach the size.
    """

    def __init__(self, in_channels: int, out_channels: int, size_in: int, size_out: int, last: bool) -> None:
        super().__init__()
        self.conv = _conv3(in_channels, out_channels, size_in, size_out, bias=last)
        self.bn = nn.Identity() if last else nn.BatchNorm2d(out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y if self.last else torch.relu(y)


def mirrored(
    stage: Stage, in_channels: int, out_channels: int, size_in: int, size_out: int, *, last: bool
) -> nn.Sequential:
    """Build the mirror of a stage: its blocks in reverse. The size grows in the last block.

    One more (transposed) convolution at the end mirrors a stem. The mirror of a stem alone, or of a
    single "plain" convolution, begins with a convolution to the stage's channels. Otherwise it
    would be one convolution from an image to an image.

    Args:
        in_channels, size_in: of its input.
        out_channels, size_out: of its output.
        last: its output is an image: no batch norm and no activation at the end.
    """
    channels = stage.channels
    depth = stage.depth
    if stage.mirror == "plain" and not stage.stem:
        depth = max(depth, 2)
    blocks: list[nn.Module] = []
    if depth == 0:
        blocks.append(DecodeConv(in_channels, channels, size_in, size_in, last=False))
    for i in range(depth):
        final = i == depth - 1 and not stage.stem
        inputs, outputs = (in_channels if i == 0 else channels), (out_channels if final else channels)
        size, end = (size_out if final else size_in), last and final
        if stage.mirror == "basic":
            blocks.append(DecodeBlock(inputs, channels, outputs, size_in, size, end))
        elif stage.mirror == "bottleneck":
            blocks.append(DecodeBottleneck(inputs, max(1, channels // 4), outputs, size_in, size, end))
        else:
            blocks.append(DecodeConv(inputs, outputs, size_in, size, end))
    if stage.stem:
        blocks.append(DecodeConv(channels, out_channels, size_in, size_out, last))
    return nn.Sequential(*blocks)


def _bottom(plan: DecoderPlan, out_channels: int, *, last: bool) -> nn.Sequential:
    """Build D_{M-1}: mirrors of stages M-1, ... in reverse, the last with ``out_channels``."""
    mirrors = []
    stages = plan.stages[len(plan.sizes) - 1 :]
    for step, i in enumerate(reversed(range(len(stages)))):
        stage, final = stages[i], i == 0
        out = out_channels if final else stage.in_channels
        size_in, size_out = plan.bottom_sizes[step : step + 2]
        mirrors.append(mirrored(stage, stage.channels, out, size_in, size_out, last=last and final))
    return nn.Sequential(*mirrors)


def _grow(channels: int, size_in: int, size_out: int) -> nn.Module:
    """Build an identity or, for a map smaller than its level, a convolution that doubles it."""
    if size_in == size_out:
        return nn.Identity()
    return nn.ConvTranspose2d(channels, channels, 3, 2, 1, output_padding=_output_padding(size_in, size_out))


class HighFrequency(nn.Module):
    """H: residual block of two layers from an encoder map to an image (sec. 3.3).

    A 3x3 convolution keeps the map's channels, another one leads to the image's, and the skip is a
    1x1 convolution. A transposed convolution first doubles a map that is smaller than the level.

    Args:
        size_in, size_out: pixels of the map and of the level; both 0 if they are equal.
    """

    def __init__(self, encoder_channels: int, image_channels: int, size_in: int = 0, size_out: int = 0) -> None:
        super().__init__()
        self.grow = _grow(encoder_channels, size_in, size_out)
        self.conv1 = nn.Conv2d(encoder_channels, encoder_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(encoder_channels)
        self.conv2 = nn.Conv2d(encoder_channels, image_channels, 3, padding=1)
        self.skip = nn.Conv2d(encoder_channels, image_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.grow(features)
        out: Tensor = self.conv2(torch.relu(self.bn1(self.conv1(x)))) + self.skip(x)
        return out


class PyramidDecoder(nn.Module):
    """Pyramid of eq. 2: image_{M-1} = D_{M-1}(latent), image_m = U(image_{m+1}) + H(E_m).

    Bands are signed, so there is no activation after the last convolution of D_{M-1}, U and H, or
    after their sum.

    Args:
        units: shapes of the encoder units, input to latent.
        sizes: level sizes in pixels, level 0 first (``components.config.level_sizes``).
        image_channels: 1 or 3.

    Raises:
        ConfigError: doubling does not reach the sizes, or the encoder has no maps for them.
    """

    def __init__(self, units: Sequence[UnitShape], sizes: Sequence[int], image_channels: int) -> None:
        super().__init__()
        plan = plan_decoder(units, sizes)
        levels = len(sizes)
        self.sizes = plan.sizes
        self.taps = plan.taps
        self.up = nn.ModuleList(
            mirrored(plan.stages[m], image_channels, image_channels, sizes[m + 1], sizes[m], last=True)
            for m in range(levels - 1)
        )
        self.high = nn.ModuleList(
            HighFrequency(plan.tap_channels[m], image_channels, plan.tap_sizes[m], sizes[m]) for m in range(levels - 1)
        )
        self.bottom = _bottom(plan, image_channels, last=True)

    def forward(self, features: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """Return the reconstructed images, level 0 first: [N, C, W_m, W_m], signed, about [0,1].

        Args:
            features: outputs of the encoder units, input to latent, [N, C_i, W_i, W_i].
            latent: the last of them, possibly with noise.
        """
        image = self.bottom(latent)
        images = [image]
        for m in range(len(self.sizes) - 2, -1, -1):
            image = self.up[m](image) + self.high[m](features[self.taps[m]])
            images.append(image)
        return images[::-1]


class HourglassDecoder(nn.Module):
    """Hourglass of Fig. 3: D_0(D_1(...D_{M-1}(latent))), with an image head per level.

    Features, not images, pass between levels. D_m, m < M-1, has as many output channels as the map
    that H_m would read, so the three kinds of Table 1 differ only in the connection: the map is
    concatenated to the output of D_m (SC) or added to it (SA), as in U-Net.

    Args:
        units, sizes, image_channels: as for :class:`PyramidDecoder`.
        connection: "none", "concat" (SC) or "add" (SA).
        heads: number of levels with an image head, from level 0 on; the others have no target. 0:
            all.

    Raises:
        ConfigError: as for :class:`PyramidDecoder`.
    """

    def __init__(
        self,
        units: Sequence[UnitShape],
        sizes: Sequence[int],
        image_channels: int,
        connection: Connection = "none",
        heads: int = 0,
    ) -> None:
        super().__init__()
        plan = plan_decoder(units, sizes)
        levels = len(sizes)
        self.sizes = plan.sizes
        self.taps = plan.taps
        self.connection: Connection = connection
        channels = [*plan.tap_channels, plan.stages[levels - 1].in_channels]
        tapped = [2 * c if connection == "concat" else c for c in plan.tap_channels]
        in_channels = [*tapped, channels[-1]]
        self.up = nn.ModuleList(
            mirrored(plan.stages[m], in_channels[m + 1], channels[m], sizes[m + 1], sizes[m], last=False)
            for m in range(levels - 1)
        )
        self.grow = nn.ModuleList(
            _grow(channels[m], plan.tap_sizes[m], sizes[m]) for m in range(levels - 1) if connection != "none"
        )
        self.heads = nn.ModuleList(nn.Conv2d(c, image_channels, 1) for c in in_channels[: heads or levels])
        self.bottom = _bottom(plan, channels[-1], last=False)

    def forward(self, features: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """Return the reconstructed images of the levels that have a head, level 0 first.

        Args: as :meth:`PyramidDecoder.forward`.
        """
        x = self.bottom(latent)
        outputs = [x]
        for m in range(len(self.sizes) - 2, -1, -1):
            x = self.up[m](x)
            if self.connection != "none":
                tap = self.grow[m](features[self.taps[m]])
                x = torch.cat([x, tap], 1) if self.connection == "concat" else x + tap
            outputs.append(x)
        return [head(x) for head, x in zip(self.heads, reversed(outputs), strict=False)]


def build_decoder(
    kind: str, units: Sequence[UnitShape], sizes: Sequence[int], image_channels: int, heads: int = 0
) -> nn.Module:
    """Build a decoder: outputs of the encoder units and latent to the images of all levels.

    Args:
        kind: a DecoderKind.
        heads: as for :class:`HourglassDecoder`. A pyramid always has all levels, since each is made
            of the next.

    Raises:
        ConfigError: the kind is unknown; otherwise as for :class:`PyramidDecoder`.
    """
    if kind == "pyramid":
        return PyramidDecoder(units, sizes, image_channels)
    connections: dict[str, Connection] = {"hourglass": "none", "hourglass_concat": "concat", "hourglass_add": "add"}
    if kind not in connections:
        raise ConfigError.of("train.decoder", kind, "one of " + " | ".join(get_args(DecoderKind)))
    return HourglassDecoder(units, sizes, image_channels, connections[kind], heads)
