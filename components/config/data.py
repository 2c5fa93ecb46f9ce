"""Settings of the images and their low-pass pyramids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from components.errors import ConfigError
from components.fields import Rule, check_values

MIN_LEVEL_SIZE = 7
"""No loss is put on an output smaller than 7x7 pixels (sec. 3.4)."""
MAX_LEVELS = 4
MAX_IMAGE_SIZE = 2**14
"""One image of this size in RGB takes 800 MB: a larger one is a mistake."""
MAX_CLASSES = 10**6
"""ImageNet-21k has 21,841 classes. The last layer of a standard network takes 2 to 8 GB for a
million."""


def level_sizes(image_size: int, levels: int = 0) -> tuple[int, ...]:
    """Return the side lengths of the reconstruction levels in pixels: W, W/2, W/4, ... (floor).

    Args:
        levels: number of levels. 0: as many as are at least 7 pixels large, at most four.

    Raises:
        ConfigError: the image or the last level is smaller than 7x7 pixels (sec. 3.4).
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


_SOURCES = ("sample", "parquet", "folder", "hf", "torchvision", "memory")
"""Kinds of sources. memory:HASH stands for the images of ``defendpp.evaluate``, in its record only."""
_DATA_RULES: dict[str, Rule] = {
    "source": (
        lambda v: v.partition(":")[0] in _SOURCES and v.partition(":")[2] != "",
        "sample:mnist, parquet:DIR, folder:DIR, hf:ORG/NAME, torchvision:mnist or torchvision:cifar10",
    ),
    "channels": (lambda v: v in (1, 3), "1 (grey) or 3 (RGB)"),
    "num_classes": (lambda v: 2 <= v <= MAX_CLASSES, f"2 to {MAX_CLASSES}"),
    "validation_fraction": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "train_limit": (lambda v: v >= 0, "0 (all) or more"),
    "test_limit": (lambda v: v >= 0, "0 (all) or more"),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source and form of the images."""

    source: str = "sample:mnist"
    """KIND:WHERE. sample:mnist (bundled), parquet:DIR (Hugging Face image layout), folder:DIR
    (DIR/train/CLASS/*, DIR/test/CLASS/*; see test_split), hf:ORG/NAME (a data set of the Hugging
    Face Hub, with @REVISION and /CONFIG behind its name if needed), torchvision:mnist or
    torchvision:cifar10 (see root and download)."""
    root: str = ""
    """Directory of torchvision's files (only for torchvision:...). Empty: ~/.cache/defendpp."""
    download: bool = False
    """Let torchvision download the files that root lacks."""
    image_size: int = 28
    """Height and width in pixels. An image of another size is an error, unless resize says
    otherwise."""
    resize: Literal["none", "crop"] = "none"
    """crop: the shorter side is resized to image_size and the centre is cut out, as for
    ImageNet."""
    channels: int = 1
    """1 (grey) or 3 (RGB). Images of the other mode are converted."""
    num_classes: int = 10
    """Labels are 0..num_classes-1."""
    class_order: Literal["", "text", "number"] = ""
    """Order of folder:DIR's class folders, which are labels 0, 1, ...: text (10 before 2, as in
    torchvision) or number (2 before 10, as in timm). Empty: an error if the two differ."""
    test_split: str = ""
    """Split of the source that the test images are taken from, such as validation or val. Empty:
    test, or else validation, valid or val. train is allowed only if no model is trained."""
    image_column: str = ""
    """Image column of parquet:DIR. Empty: image or img, or the only column of images."""
    label_column: str = ""
    """Label column of parquet:DIR. Empty: label or labels, or the only column that is named like
    labels."""
    allow_empty_classes: bool = False
    """Accept a test split, or a training split without train_limit, in which a class has no
    image."""
    validation_fraction: float = 0.1
    """Share of the training images held out, by a seeded hash of the sample index. 0 at paper
    scale."""
    split_seed: int = 0
    """Seed of that hash."""
    train_limit: int = 0
    """Number of training images, drawn from the whole split by subset_seed before the validation
    split. 0: all."""
    test_limit: int = 0
    """Number of test images, drawn from the whole split by subset_seed. 0: all."""
    subset_seed: int = 0
    """Seed of the order in which images are drawn for train_limit, test_limit and
    evaluation.test_images. The draw of N images is the beginning of the draw of more."""

    def __post_init__(self) -> None:
        check_values(self, "data", _DATA_RULES)
        level_sizes(self.image_size)


_PYRAMID_RULES: dict[str, Rule] = {
    "levels": (lambda v: 0 <= v <= MAX_LEVELS, f"0 (by rule) to {MAX_LEVELS}"),
    "rows_per_shard": (lambda v: v >= 0, "0 (by size) or more"),
}


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Multi-scale reconstruction targets (sec. 3.3) and their storage."""

    levels: int = 0
    """Number of levels M. 0: W, W/2, W/4, ... down to 7 pixels, at most four."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored precision of levels 1..M-1 (level 0 is the uint8 image itself)."""
    rows_per_shard: int = 0
    """Images per Parquet shard, the unit of work, of resumption and of memory. 0: as many as make
    about 32 MB, at most 16384."""

    def __post_init__(self) -> None:
        check_values(self, "pyramids", _PYRAMID_RULES)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of the data that a network is built for."""

    image_size: int
    channels: int
    num_classes: int
    sizes: tuple[int, ...]
    """Level sizes in pixels, level 0 first. The decoder has all levels, also those without a
    target."""
