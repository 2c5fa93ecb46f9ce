"""Settings of the images and their low-pass pyramids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from components.errors import ConfigError
from components.fields import check, check_values

MIN_LEVEL_SIZE = 7
"""No loss is put on an output smaller than 7x7 pixels (sec. 3.4)."""
MAX_LEVELS = 4
MAX_IMAGE_SIZE = 2**14
"""One image of this size in RGB takes 800 MB: a larger one is a mistake."""
MAX_CLASSES = 10**6
"""ImageNet-21k has 21,841 classes. The last layer of a standard network takes 2 to 8 GB for a million."""


def level_sizes(image_size: int, levels: int = 0) -> tuple[int, ...]:
    """Side lengths in pixels of the reconstruction levels: W, W/2, W/4, ... (floor), none under 7, at most four.

    ``levels`` = 0 takes as many as that rule allows; otherwise exactly so many.

    Raises:
        ConfigError: the image or the last level asked for is smaller than 7x7 pixels (sec. 3.4).
    """
    if image_size < MIN_LEVEL_SIZE:
        raise ConfigError.of("data.image_size", image_size, f"at least {MIN_LEVEL_SIZE} pixels (sec. 3.4)")
    if image_size > MAX_IMAGE_SIZE:
        raise ConfigError.of("data.image_size", image_size, f"at most {MAX_IMAGE_SIZE} pixels")
    sizes = [image_size // 2**m for m in range(MAX_LEVELS) if image_size // 2**m >= MIN_LEVEL_SIZE]
    if levels == 0:
        return tuple(sizes)
    if not 1 <= levels <= len(sizes):
        raise ConfigError.of(
            "pyramids.levels",
            levels,
            f"1 to {len(sizes)} at image size {image_size}: no level under {MIN_LEVEL_SIZE}x{MIN_LEVEL_SIZE} pixels "
            f"(sec. 3.4) and at most {MAX_LEVELS}; 0 takes as many as that allows",
        )
    return tuple(sizes[:levels])


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and what they must look like."""

    source: str = "sample:mnist"
    """KIND:WHERE. sample:mnist (bundled), parquet:DIR (Hugging Face image layout), folder:DIR (DIR/train/CLASS/*,
    DIR/test/CLASS/*; see test_split), torchvision:mnist or torchvision:cifar10 (see root and download)."""
    root: str = ""
    """Directory of torchvision's files (only for torchvision:...). Empty: ~/.cache/defendpp."""
    download: bool = False
    """Let torchvision download what root lacks."""
    image_size: int = 28
    """Height and width in pixels; an image of another size is an error, unless resize says otherwise."""
    resize: Literal["none", "crop"] = "none"
    """crop: the shorter side is resized to image_size, then the centre is cut out (ImageNet's way)."""
    channels: int = 1
    """1 (grey) or 3 (RGB); images of the other mode are converted."""
    num_classes: int = 10
    """Labels are 0..num_classes-1."""
    class_order: Literal["", "text", "number"] = ""
    """Order of folder:DIR's class folders, which are labels 0, 1, ...: text (10 before 2, torchvision's) or number (2 before 10,
    timm's). Empty: where the two differ, refuse."""
    test_split: str = ""
    """Name of the source's split that the test images are taken from: validation, val, or another one that it has. Empty: test,
    or else validation, valid or val. train only where nothing is trained."""
    image_column: str = ""
    """Column of parquet:DIR with the images. Empty: image or img, or the only column of images."""
    label_column: str = ""
    """Column of parquet:DIR with the labels. Empty: label or labels, or the only column that is named like labels."""
    allow_empty_classes: bool = False
    """Accept a test split, or a training split without train_limit, in which a class has no image."""
    validation_fraction: float = 0.1
    """Share of the training images held out, by a seeded hash of the sample index. 0 at the paper's scale."""
    split_seed: int = 0
    """Seed of that hash."""
    train_limit: int = 0
    """Use so many training images, drawn over the whole split by subset_seed, before the validation split. 0: all."""
    test_limit: int = 0
    """Use so many test images, drawn over the whole split by subset_seed. 0: all."""
    subset_seed: int = 0
    """Seed of the order in which images are drawn for train_limit, test_limit and evaluation.test_images. The draw of N images is
    the beginning of the draw of more."""

    def __post_init__(self) -> None:
        kind, _, where = self.source.partition(":")
        check(
            kind in ("sample", "parquet", "folder", "torchvision") and bool(where),
            "data.source",
            self.source,
            "sample:mnist, parquet:DIR, folder:DIR, torchvision:mnist or torchvision:cifar10",
        )
        check_values(self, "data")
        level_sizes(self.image_size)
        check(self.channels in (1, 3), "data.channels", self.channels, "1 (grey) or 3 (RGB)")
        check(self.num_classes >= 2, "data.num_classes", self.num_classes, "at least 2")
        check(self.num_classes <= MAX_CLASSES, "data.num_classes", self.num_classes, f"at most {MAX_CLASSES}")
        check(0 <= self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction, "in [0, 1)")
        check(self.train_limit >= 0, "data.train_limit", self.train_limit, "0 (all) or more")
        check(self.test_limit >= 0, "data.test_limit", self.test_limit, "0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """The multi-scale reconstruction targets (sec. 3.3) and how they are stored."""

    levels: int = 0
    """Number of levels M. 0: W, W/2, W/4, ... down to 7 pixels, at most four."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of levels 1..M-1 (level 0 is the uint8 image itself)."""
    rows_per_shard: int = 0
    """Images per Parquet shard: the unit of work, of resumption and of memory. 0: as many as make about 32 MB, at most 16384."""

    def __post_init__(self) -> None:
        check_values(self, "pyramids")
        check(0 <= self.levels <= MAX_LEVELS, "pyramids.levels", self.levels, f"0 (by rule) to {MAX_LEVELS}")
        check(self.rows_per_shard >= 0, "pyramids.rows_per_shard", self.rows_per_shard, "0 (by size) or more")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a network must know of the data."""

    image_size: int
    channels: int
    num_classes: int
    sizes: tuple[int, ...]
    """Level sizes in pixels, level 0 first; the decoder has them all, whatever has a target."""
