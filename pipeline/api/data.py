"""Images of a data source in memory, as an evaluation in memory takes them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from components.config import DataConfig
from components.fields import check_choice
from pipeline.data.sources.base import Split, read_rows, split_rows
from pipeline.data.sources.open import open_source


def load_images(source: str = "sample:mnist", split: Split = "test", n: int = 0, **data: Any) -> tuple[Tensor, Tensor]:
    """Read images of a data source into memory.

    The first ``n`` test images are those that a run with ``evaluation.test_images=n`` attacks.

    Args:
        source: as ``--data.source``: sample:mnist, parquet:DIR, folder:DIR, hf:ORG/NAME or
            torchvision:NAME.
        split: "train", "validation" or "test".
        n: number of images. 0: all.
        data: other fields of ``data``, such as image_size, channels and num_classes.

    Returns:
        Images float32 [N,C,W,W] in [0,1], and labels int64 [N].

    Raises:
        ConfigError: there is no such split.
        ConfigError, DataError: the source cannot be read; the message says why and what to do.
    """
    check_choice(split, get_args(Split), "split")
    opened = open_source(DataConfig(source=source, **data), "test" if split == "test" else "train")
    rows = split_rows(opened, split)
    images, labels = read_rows(opened, rows[:n] if n else rows)
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
