"""Ray's metrics of the work: chunks attacked, images trained on, shards written.

Ray's agent on each node gives them to Prometheus, as it does its own (docs/ecosystem.md). Without
Ray, nothing is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import ray
from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.1, 1.0, 10.0, 60.0, 600.0, 3600.0]
"""Bounds of the buckets of a chunk's time."""


# A metric exists once in each process.


@functools.cache
def _counter(name: str, description: str, tags: tuple[str, ...]) -> Counter:
    return Counter(f"defendpp_{name}", description=description, tag_keys=tags)


@functools.cache
def _gauge(name: str, description: str, tags: tuple[str, ...]) -> Gauge:
    return Gauge(f"defendpp_{name}", description=description, tag_keys=tags)


@functools.cache
def _histogram(name: str, description: str, bounds: Sequence[float], tags: tuple[str, ...]) -> Histogram:
    return Histogram(f"defendpp_{name}", description=description, boundaries=list(bounds), tag_keys=tags)


def chunk_attacked(tags: Mapping[str, str], images: int, seconds: float) -> None:
    """Count a chunk of adversarial examples.

    Args:
        tags: run, model (that the examples are made on) and attack.
        images: images of the chunk.
        seconds: time that the attack took.
    """
    if not ray.is_initialized():
        return
    keys = tuple(tags)
    _counter("attack_chunks", "Chunks of adversarial examples made", keys).inc(1, dict(tags))
    _counter("attack_images", "Adversarial examples made", keys).inc(images, dict(tags))
    duration = _histogram("attack_chunk_seconds", "Time of an attack on a chunk", tuple(_SECONDS), keys)
    duration.observe(seconds, dict(tags))


def images_trained(path: str, images: int) -> None:
    """Count the images of a step on one rank. ``path`` is the model's, of which the tag is the end."""
    if ray.is_initialized():
        _counter("training_images", "Images trained on", ("model",)).inc(images, {"model": _name(path)})


def epoch_trained(path: str, images_per_second: float) -> None:
    """Note the speed of an epoch, over all ranks."""
    if ray.is_initialized():
        speed = _gauge("training_images_per_second", "Speed of the last epoch", ("model",))
        speed.set(images_per_second, {"model": _name(path)})


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def shard_written(split: str, images: int) -> None:
    """Count a shard of pyramids."""
    if not ray.is_initialized():
        return
    tags = {"split": split}
    _counter("shards_written", "Shards of pyramids written", ("split",)).inc(1, tags)
    _counter("shard_images", "Images in shards written", ("split",)).inc(images, tags)
