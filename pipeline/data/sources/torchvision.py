"""A torchvision data set as a source of images."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from components.config import DataConfig
from components.errors import ConfigError, DataError
from pipeline.data.sources.base import Batch, Source, absolute_path
from pipeline.data.sources.decode import fitted
from pipeline.data.sources.split_names import SourceSplit
from pipeline.runtime.user_files import printable, reason

_TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10"}


@dataclass(frozen=True, kw_only=True)
class TorchvisionSource(Source):
    """MNIST or CIFAR-10 by torchvision. A reader holds the split in memory (at most 150 MB)."""

    name: str
    root: str
    train: bool
    """Whether these are torchvision's training images."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all pixels and labels of the split."""
        images, labels = load_arrays(self.name, self.root, self.train)
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def labels(self) -> np.ndarray:
        """Return all labels, int64 [num_rows]."""
        labels: np.ndarray = load_arrays(self.name, self.root, self.train)[1][self.numbers]
        return labels

    def _read_into(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        all_images, all_labels = load_arrays(self.name, self.root, self.train)
        rows = self.numbers[indices]
        labels[:] = all_labels[rows]
        self._check_label_range(labels, lambda i: f"{self.place} row {rows[i]}")
        size = all_images.shape[1]
        if size != self.data.image_size and self.data.resize == "none":
            raise DataError(
                f"{self.place}: images are {size}x{size} pixels, but data.image_size is {self.data.image_size}; "
                "set --data.image-size, or --data.resize crop"
            )
        mode = "L" if self.data.channels == 1 else "RGB"
        for position, row in enumerate(rows):
            image = Image.fromarray(all_images[row]).convert(mode)
            array = np.asarray(fitted(image, self.data.image_size))
            images[position] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def open_torchvision(data: DataConfig, split: SourceSplit, name: str) -> TorchvisionSource:
    """Open the images of a split of a torchvision data set. Raises DataError, ConfigError."""
    if name not in _TORCHVISION:
        raise ConfigError.of("data.source", data.source, "torchvision:" + " or torchvision:".join(_TORCHVISION))
    if data.test_split not in ("", "train", "test"):
        raise ConfigError.of("data.test_split", data.test_split, f"train or test, the splits of torchvision:{name}")
    root = absolute_path(data.root or "~/.cache/defendpp", "data.root")
    train = "train" in (split, data.test_split)
    dataset = open_dataset(name, root, train, data.download)
    return TorchvisionSource(
        data=data,
        split=split,
        num_rows=len(dataset),
        class_names=tuple(map(str, dataset.classes)),
        name=name,
        root=root,
        train=train,
    )


def open_dataset(name: str, root: str, train: bool, download: bool) -> Any:
    """Return torchvision's data set. Raises DataError."""
    import torchvision.datasets  # This import takes 2.4 s.

    try:
        return getattr(torchvision.datasets, _TORCHVISION[name])(root, train=train, download=download)
    # torchvision checks MNIST's files by assertions and lookups.
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError, LookupError) as e:
        raise DataError(
            f"torchvision:{name} is not usable in {printable(root)} ({reason(e)}); set --data.download, or "
            "--data.root to where torchvision's files are"
        ) from e


@functools.lru_cache(maxsize=2)
def load_arrays(name: str, root: str, train: bool) -> Batch:
    """Return all images uint8 [n,H,W] or [n,H,W,3] and labels int64 [n].

    They are cached, since a worker reads many shards of a set.
    """
    dataset = open_dataset(name, root, train, download=False)
    return np.asarray(dataset.data), np.asarray(dataset.targets, np.int64)
