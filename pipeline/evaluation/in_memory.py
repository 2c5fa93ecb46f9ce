"""Networks and test images that a caller holds in memory, in place of files on a storage."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False, kw_only=True)
class InMemory:
    """Test images and the networks that are evaluated on them.

    The attack stage takes it in place of a test set's shards. Its jobs then read images and
    networks from it, and write to the storage as always.
    """

    address: str
    """``memory/<hash>`` of images and labels."""
    images: np.ndarray[Any, Any]
    """float32 [N,C,W,W] in [0,1]."""
    labels: np.ndarray[Any, Any]
    """int64 [N]."""
    networks: Mapping[str, nn.Module]
    """Each network, in eval mode, by the text that names its weights in a job."""
    device: str
    """Device that the attacks run on."""

    @property
    def num_rows(self) -> int:
        """Number of images."""
        return len(self.images)

    def read_rows(self, start: int, stop: int, columns: Sequence[str] = ()) -> dict[str, np.ndarray[Any, Any]]:
        """Return index, label and image of rows start..stop-1, whatever columns are asked for."""
        return {
            "index": np.arange(start, stop),
            "label": self.labels[start:stop].astype(np.int32),
            "image": self.images[start:stop],
        }


def as_images(pixels: np.ndarray[Any, Any], device: str = "cpu") -> Tensor:
    """Return images in [0,1], float32 [N,C,W,W]: of a shard's uint8 pixels, or as they are in memory."""
    images = torch.tensor(pixels, device=device)
    return images.float().div_(255) if pixels.dtype == np.uint8 else images


@functools.lru_cache(maxsize=1)
def _fetched(reference: ray.ObjectRef[InMemory]) -> InMemory:
    # A worker process runs many tasks of one evaluation: it copies the networks once.
    inputs: InMemory = ray.get(reference)
    return inputs


def in_memory_of(job: Mapping[str, Any]) -> InMemory | None:
    """Return what a job reads from memory, or None if it reads from the storage.

    Where Ray runs the job, Ray's object store holds it.
    """
    inputs = job.get("in_memory")
    return _fetched(inputs) if isinstance(inputs, ray.ObjectRef) else inputs
