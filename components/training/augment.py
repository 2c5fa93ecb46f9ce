"""Training batches: augmentation, noise and targets, on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from components.config import TrainConfig
from components.dct import target_levels
from components.models.defend import Noise
from components.random_streams import AUGMENT_STREAM, stream_seed


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images and targets on the training device.

    Args:
        images: uint8 [N, C, W, W].
        labels: int64 [N].
        levels: stored levels 1, 2, ... as float16 or float32 [N, C, W_m, W_m]; empty if only level
            0 has a target.
    """

    images: Tensor
    labels: Tensor
    levels: tuple[Tensor, ...] = ()


def gaussian_noise(config: TrainConfig, step: int, rank: int, device: torch.device) -> Noise | None:
    """Return the Gaussian noise of one step (sec. 4.2; of ComDefend's code), or None.

    Its stream follows from seed, step and rank alone, so a continued run draws the same noise.
    """
    sigma = config.reformer_sigma if config.defense == "comdefend" else config.noise_sigma
    if (config.noise_location == "none" and config.defense != "comdefend") or sigma == 0:
        return None
    generator = torch.Generator(device).manual_seed(stream_seed(config.seed, step, rank))

    def add(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return x + (sigma * noise).to(x.dtype)

    return add


def augmented(batch: Batch, config: TrainConfig, step: int, rank: int) -> Batch:
    """Return the batch flipped and cropped as ``config.augment`` says.

    The random stream follows from seed, step and rank. Stored levels are flipped with their image:
    the low-pass operator of sec. 3.3 acts on the whole image and commutes with a flip, but not with
    a crop (docs/method.md).
    """
    if config.augment == "none":
        return batch
    images = batch.images
    n, _, height, width = images.shape
    generator = torch.Generator().manual_seed(stream_seed(config.seed, step, rank, AUGMENT_STREAM))
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device).view(n, 1, 1, 1)
    flipped = [torch.where(flip, x.flip(-1), x) for x in (images, *batch.levels)]
    if config.augment == "flip":
        return replace(batch, images=flipped[0], levels=tuple(flipped[1:]))
    p = config.crop_padding
    offsets = torch.randint(0, 2 * p + 1, (2, n, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = F.pad(flipped[0], (p, p, p, p))
    cropped = padded[torch.arange(n, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return replace(batch, images=cropped.permute(0, 3, 1, 2).contiguous(), levels=())


def targets_of(images: Tensor, batch: Batch, config: TrainConfig, sizes: Sequence[int]) -> list[Tensor]:
    """Return the levels that have a target, level 0 first.

    They are the stored levels, or are computed from ``images`` (float, in [0,1]).
    """
    if config.defense != "defend++" or config.targets == "none":
        return [images]
    if config.augment != "crop_flip":
        return [images, *(level.float() for level in batch.levels)]
    return target_levels(images, sizes, config.targets)
