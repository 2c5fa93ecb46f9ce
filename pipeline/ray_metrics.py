"""Ray's metrics of the work: chunks attacked, images trained on, shards written.

Ray's agent on each node gives them to Prometheus, as it does its own (docs/ecosystem.md). All are
counters, whose rates are speeds: Ray rounds the values of a histogram, and drops a gauge when its
process ends. Without Ray, nothing is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ray
from ray.util.metrics import Counter


@functools.cache
def _counter(name: str, description: str, tags: tuple[str, ...]) -> Counter:
    # A metric exists once in each process.
    return Counter(f"defendpp_{name}", description=description, tag_keys=tags)


def _count(name: str, description: str, value: float, tags: Mapping[str, str]) -> None:
    if ray.is_initialized() and value > 0:
        _counter(name, description, tuple(tags)).inc(value, dict(tags))


def chunk_attacked(tags: Mapping[str, str], images: int, seconds: float) -> None:
    """Count a chunk of adversarial examples.

    Args:
        tags: run, model (that the examples are made on) and attack.
        images: images of the chunk.
        seconds: time that the attack took.
    """
    _count("attack_chunks", "Chunks of adversarial examples made", 1, tags)
    _count("attack_images", "Adversarial examples made", images, tags)
    _count("attack_seconds", "Time of the attacks", seconds, tags)


def images_trained(path: str, images: int) -> None:
    """Count the images of a step on one rank. ``path`` is the model's, of which the tag is the end."""
    _count("training_images", "Images trained on", images, {"model": path.rstrip("/").rpartition("/")[2]})


def shard_written(split: str, images: int) -> None:
    """Count a shard of pyramids."""
    _count("shards_written", "Shards of pyramids written", 1, {"split": split})
    _count("shard_images", "Images in shards written", images, {"split": split})
