"""Decoders: from the latent map to the image, level by level, low to high frequency.

``pyramid`` is the paper's own (sec. 3.3, Fig. 4); ``hourglass`` (Fig. 3), ``hourglass_concat`` and ``hourglass_add`` are those
it is compared with (Table 1). All mirror the encoder and all reconstruct every level.

What a decoder knows of the encoder is the measured shape of each of its units. *Stages* are what mirrors: a unit with the pool
that follows it. Mirrors never resize: a map grows by a stride-2 transposed convolution, n pixels to 2n-1 or 2n, or not at all,
and sizes that this cannot reach are refused before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from components.errors import ConfigError
from components.models.decoder_plan import Connection, DecoderKind, DecoderPlan, Stage, UnitShape, plan_decoder, reaches


def _output_padding(size_in: int, size_out: int) -> int:
    """A stride-2 transposed convolution gives 2n-1 pixels, or 2n with one more row and column."""
    if not reaches(size_in, size_out):
        raise ConfigError.of("data.image_size", size_out, f"a size that stride 2 reaches from {size_in} pixels")
    return size_out - (2 * size_in - 1)


def _conv3(in_channels: int, out_channels: int, size_in: int, size_out: int, bias: bool) -> nn.Module:
    """A 3x3 convolution; transposed, with stride 2, where the size grows."""
    if size_in == size_out:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    padding = _output_padding(size_in, size_out)
    return nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding=padding, bias=bias)


def _skip(in_channels: int, out_channels: int, size_in: int, size_out: int) -> nn.Module:
    """Beside a residual block: nothing, or where the shape changes a 1x1 (transposed) convolution."""
    if size_in != size_out:
        padding = _output_padding(size_in, size_out)
        return nn.ConvTranspose2d(in_channels, out_channels, 1, 2, output_padding=padding, bias=False)
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)


# --- mirrors


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
        self.conv2 = _conv3(hidden, out_channels, size_in, size_out, bias=last)
        self.skip = _skip(in_channels, out_channels, size_in, size_out)
        self.bn2 = nn.Identity() if last else nn.BatchNorm2d(out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x)
        return y if self.last else torch.relu(y)


class DecodeBottleneck(nn.Module):
    """A bottleneck of the mirror: 1x1, 3x3 (transposed where the size grows), 1x1, added to a projection.

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
    """One 3x3 (transposed) convolution with batch norm and ReLU; ``last``: neither of the two, a signed image comes out.

    Raises:
        ConfigError: a size that one stride-2 transposed convolution cannot reach.
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
    """A stage in reverse order: its convolutions with its channels, in the last block of which the size grows.

    A stem is mirrored by one more (transposed) convolution at the end. A stage that is a stem alone, and a "plain" one of a
    single convolution, begins with a convolution to the stage's channels: it would otherwise be one convolution from an image
    to an image.

    Args:
        in_channels, size_in: of what it reads.
        out_channels, size_out: of what it gives.
        last: what it gives is an image: no batch norm, no activation at the end.
    """
    c = stage.channels
    depth = stage.depth
    if stage.mirror == "plain" and not stage.stem:
        depth = max(depth, 2)
    blocks: list[nn.Module] = []
    if depth == 0:
        blocks.append(DecodeConv(in_channels, c, size_in, size_in, last=False))
    for i in range(depth):
        final = i == depth - 1 and not stage.stem
        read, give = (in_channels if i == 0 else c), (out_channels if final else c)
        grown, end = (size_out if final else size_in), last and final
        if stage.mirror == "basic":
            blocks.append(DecodeBlock(read, c, give, size_in, grown, end))
        elif stage.mirror == "bottleneck":
            blocks.append(DecodeBottleneck(read, max(1, c // 4), give, size_in, grown, end))
        else:
            blocks.append(DecodeConv(read, give, size_in, grown, end))
    if stage.stem:
        blocks.append(DecodeConv(c, out_channels, size_in, size_out, last))
    return nn.Sequential(*blocks)


def _bottom(p: DecoderPlan, out_channels: int, *, last: bool) -> nn.Sequential:
    """D_{M-1}: the mirrors of stages M-1.. in reverse. Only the last one changes to ``out_channels``."""
    mirrors = []
    stages = p.stages[len(p.sizes) - 1 :]
    for step, i in enumerate(reversed(range(len(stages)))):
        stage, final = stages[i], i == 0
        out = out_channels if final else stage.in_channels
        size_in, size_out = p.bottom_sizes[step : step + 2]
        mirrors.append(mirrored(stage, stage.channels, out, size_in, size_out, last=last and final))
    return nn.Sequential(*mirrors)


def _grow(channels: int, size_in: int, size_out: int) -> nn.Module:
    """Where the encoder has no map of a level's size: the next smaller one, doubled; otherwise nothing."""
    if size_in == size_out:
        return nn.Identity()
    return nn.ConvTranspose2d(channels, channels, 3, 2, 1, output_padding=_output_padding(size_in, size_out))


# --- decoders


class HighFrequency(nn.Module):
    """H: a 2-layer residual block from an encoder map to an image (sec. 3.3).

    3x3 convolution to the encoder map's own channels, 3x3 convolution to the image's, 1x1 convolution on the skip. A map
    smaller than the level is first doubled by a transposed convolution.

    Args:
        size_in, size_out: pixels of the map and of the level; both 0 is the same as equal.
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
    """image_{M-1} = D_{M-1}(latent); image_m = U(image_{m+1}) + H(E_m) for m < M-1 (eq. 2).

    Bands are signed, so nothing is activated after the last convolution of D_{M-1}, U and H, nor after their sum.

    Args:
        units: shapes of the encoder units, input to latent.
        sizes: level sizes in pixels, level 0 first (``components.config.level_sizes``).
        image_channels: 1 or 3.

    Raises:
        ConfigError: sizes that doubling does not reach, or that the encoder has no maps for.
    """

    def __init__(self, units: Sequence[UnitShape], sizes: Sequence[int], image_channels: int) -> None:
        super().__init__()
        p = plan_decoder(units, sizes)
        levels = len(sizes)
        self.sizes = p.sizes
        self.taps = p.taps
        self.up = nn.ModuleList(
            mirrored(p.stages[m], image_channels, image_channels, sizes[m + 1], sizes[m], last=True)
            for m in range(levels - 1)
        )
        self.high = nn.ModuleList(
            HighFrequency(p.tap_channels[m], image_channels, p.tap_sizes[m], sizes[m]) for m in range(levels - 1)
        )
        self.bottom = _bottom(p, image_channels, last=True)

    def forward(self, features: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """Reconstructed images, level 0 first: [N, C, W_m, W_m], signed, about [0,1].

        Args:
            features: outputs of the encoder units, input to latent, [N, C_i, W_i, W_i].
            latent: the last of them, with noise if there is any.
        """
        image = self.bottom(latent)
        images = [image]
        for m in range(len(self.sizes) - 2, -1, -1):
            image = self.up[m](image) + self.high[m](features[self.taps[m]])
            images.append(image)
        return images[::-1]


class HourglassDecoder(nn.Module):
    """D_0(D_1(...D_{M-1}(latent))), the plain mirror of Fig. 3, with a 1x1 convolution to an image at every level.

    Between levels go features, not images. D_m, m < M-1, gives as many channels as the map that H_m would read, with or
    without a connection, so that the three kinds of Table 1 differ in the connection alone: the map is concatenated to what D_m
    gives (SC) or added to it (SA), as in U-Net.

    Args:
        units, sizes, image_channels: as for :class:`PyramidDecoder`.
        connection: "none", "concat" (SC) or "add" (SA).
        heads: only levels 0 .. heads-1 get an image head, since only they have a target; 0: all.

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
        p = plan_decoder(units, sizes)
        levels = len(sizes)
        self.sizes = p.sizes
        self.taps = p.taps
        self.connection: Connection = connection
        channels = [*p.tap_channels, p.stages[levels - 1].in_channels]
        double = [2 * c if connection == "concat" else c for c in p.tap_channels]
        read = [*double, channels[-1]]
        self.up = nn.ModuleList(
            mirrored(p.stages[m], read[m + 1], channels[m], sizes[m + 1], sizes[m], last=False)
            for m in range(levels - 1)
        )
        self.grow = nn.ModuleList(
            _grow(channels[m], p.tap_sizes[m], sizes[m]) for m in range(levels - 1) if connection != "none"
        )
        self.heads = nn.ModuleList(nn.Conv2d(c, image_channels, 1) for c in read[: heads or levels])
        self.bottom = _bottom(p, channels[-1], last=False)

    def forward(self, features: Sequence[Tensor], latent: Tensor) -> list[Tensor]:
        """Reconstructed images of the levels that have a head, level 0 first; arguments as for :class:`PyramidDecoder`."""
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
    """The decoder of a kind (DecoderKind): maps (outputs of the encoder units, latent) to the images of all levels.

    ``heads``: as for :class:`HourglassDecoder`; the pyramid's levels are made of one another, so it has them all.

    Raises:
        ConfigError: unknown kind; otherwise as for :class:`PyramidDecoder`.
    """
    if kind == "pyramid":
        return PyramidDecoder(units, sizes, image_channels)
    connections: dict[str, Connection] = {"hourglass": "none", "hourglass_concat": "concat", "hourglass_add": "add"}
    if kind not in connections:
        raise ConfigError.of("train.decoder", kind, "one of " + " | ".join(get_args(DecoderKind)))
    return HourglassDecoder(units, sizes, image_channels, connections[kind], heads)
