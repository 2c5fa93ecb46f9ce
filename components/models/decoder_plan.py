"""Plan of a decoder: which part mirrors which unit of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from components.errors import ConfigError
from components.models.adapter import Mirror

DecoderKind = Literal["pyramid", "hourglass", "hourglass_concat", "hourglass_add"]
Connection = Literal["none", "concat", "add"]


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """Shape of one encoder unit.

    Args:
        depth: residual blocks ("plain": convolutions) of its mirror; 0 for a pool.
        in_channels: channels of its input. For the first unit, which reads the image, the channels
            of its output.
        out_channels, size: channels and size in pixels of its output.
        mirror: kind of its mirror.
        stem: whether it begins with a convolution that ``depth`` does not count.
    """

    depth: int
    in_channels: int
    out_channels: int
    size: int
    mirror: Mirror = "basic"
    stem: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive units that are mirrored as one.

    Args:
        size_in, size: sizes of its input and its output in pixels.
        others: as for :class:`UnitShape`.
    """

    depth: int
    in_channels: int
    channels: int
    size_in: int
    size: int
    mirror: Mirror
    stem: bool


def stages_of(units: Sequence[UnitShape], image_size: int) -> list[Stage]:
    """Group an encoder's units into stages: every unit with the pools (depth 0) that follow it."""
    stages: list[Stage] = []
    size_in = image_size
    for unit in units:
        if unit.depth == 0 and not unit.stem and stages:
            stages[-1] = replace(stages[-1], size=unit.size)
        else:
            stages.append(
                Stage(
                    depth=unit.depth,
                    in_channels=unit.in_channels,
                    channels=unit.out_channels,
                    size_in=size_in,
                    size=unit.size,
                    mirror=unit.mirror,
                    stem=unit.stem,
                )
            )
        size_in = unit.size
    return stages


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """Checked plan of a decoder with M levels.

    Args:
        stages: stages from input to latent. The doubling of level m+1 to level m mirrors stage m <
            M-1, and D_{M-1} mirrors the others.
        sizes: level sizes in pixels, level 0 first.
        taps: for each level m < M-1 the unit whose map it reads.
        tap_channels, tap_sizes: of those maps. A map smaller than the level is doubled first.
        bottom_sizes: pixels before and after each step of D_{M-1}, which begins with the last
            stage.
    """

    stages: tuple[Stage, ...]
    sizes: tuple[int, ...]
    taps: tuple[int, ...]
    tap_channels: tuple[int, ...]
    tap_sizes: tuple[int, ...]
    bottom_sizes: tuple[int, ...]


def plan_decoder(units: Sequence[UnitShape], sizes: Sequence[int]) -> DecoderPlan:
    """Plan which stages the decoder mirrors and which map each level reads.

    Args:
        units: shapes of the encoder units, input to latent.
        sizes: level sizes in pixels, level 0 (the image) first (``components.config.level_sizes``).

    Raises:
        ConfigError: there are more levels than stages, or doubling does not reach the sizes.
    """
    levels = len(sizes)
    stages = stages_of(units, sizes[0])
    if not 1 <= levels <= len(stages):
        raise ConfigError.of("pyramids.levels", levels, f"at most {len(stages)}, one per stage of the encoder")

    def refuse(why: str) -> ConfigError:
        return ConfigError.of("data.image_size", sizes[0], f"a size {why}")

    for m in range(levels - 1):
        if not reaches(sizes[m + 1], sizes[m]):
            raise refuse(f"that stride 2 reaches: level {m + 1} has {sizes[m + 1]} pixels, level {m} has {sizes[m]}")
    taps = []
    for m in range(levels - 1):
        # Take the largest map that is not larger than the level. Of several, the last is processed
        # most.
        fitting = [(u.size, i) for i, u in enumerate(units) if u.size <= sizes[m]]
        size, index = max(fitting, default=(0, 0))
        if size != sizes[m] and not reaches(size, sizes[m]):
            raise refuse(
                f"whose levels the encoder has maps for: level {m} has {sizes[m]} pixels, the encoder's next map {size}"
            )
        taps.append(index)
    # The last stage's mirror comes first and grows, at most to the last level's size. That size is
    # smaller than the map's if floor and ceiling differ (image 30: maps of 15 and 8, level of 7).
    steps = [stages[-1].size]
    for stage in reversed(stages[levels - 1 :]):
        steps.append(min(stage.size_in, sizes[-1]))
        if steps[-1] != steps[-2] and not reaches(steps[-2], steps[-1]):
            raise refuse(
                f"whose last level stride 2 reaches from the latent map: {' -> '.join(map(str, steps))} "
                f"(of {sizes[-1]})"
            )
    if steps[-1] != sizes[-1]:
        raise refuse(f"whose last level {sizes[-1]} is reached from {steps[0]} pixels: {' -> '.join(map(str, steps))}")
    return DecoderPlan(
        stages=tuple(stages),
        sizes=tuple(sizes),
        taps=tuple(taps),
        tap_channels=tuple(units[i].out_channels for i in taps),
        tap_sizes=tuple(units[i].size for i in taps),
        bottom_sizes=tuple(steps),
    )


def reaches(size_in: int, size_out: int) -> bool:
    """Tell whether one stride-2 transposed convolution goes from one size to the other."""
    return size_out in (2 * size_in - 1, 2 * size_in)
