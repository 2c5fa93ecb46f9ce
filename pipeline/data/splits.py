"""The rows of a split, and the seeded order in which a part of them is drawn.

A row's number and a seed decide, by two hashes, whether the row is held out for validation and when
it is drawn. The choice is the same for all kinds of sources, machines and versions of NumPy.
1.28 million rows take a quarter of a second.
"""

from __future__ import annotations

import numpy as np

DRAW_VERSION = 1
"""Part of the address of shard sets that are drawn. Raise it when a seed draws other rows."""
_DRAW_STREAM = 0xD4A3_5EED_0F_0A11
"""Separates the draw from the validation split, whose rows would otherwise be drawn first."""


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Return splitmix64 of each uint64, a bijective hash (Steele, Lea, Flood 2014)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw_order(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return a random order. Its first N entries are a draw of N rows without replacement.

    The order sorts the rows by a hash of number and seed. The draw of N rows is therefore a prefix
    of the draw of N+k rows. Rows appended to a Parquet or torchvision source do not change the
    order of the others (in a folder, a new file shifts them). Sorted sources give a mixture.

    Args:
        numbers: int64 [n], distinct row numbers in the whole split.
        seed: another seed gives an independent order.

    Returns:
        int64 [n]: positions in ``numbers``, the first one drawn first.
    """
    key = splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(_DRAW_STREAM)
    # The hash is a bijection, so no two rows are equal and the kind of sort does not matter.
    return np.argsort(splitmix64(numbers.astype(np.uint64) ^ splitmix64(key))).astype(np.int64)


def held_out(numbers: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which training rows are held out for validation, by a hash of number and seed.

    Args:
        numbers: int64 [n], row numbers in the whole split.
        fraction: expected share held out, in [0, 1).
        seed: another seed gives an independent split.

    Returns:
        bool [n].
    """
    # The seed is hashed, too: XOR with a small seed would only swap neighbours.
    hashes = splitmix64(numbers.astype(np.uint64) ^ splitmix64(np.array([seed % 2**64], np.uint64)))
    return hashes < np.uint64(int(fraction * 2**64))


def split_indices(numbers: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split training rows into those trained on and those held out.

    Rows added at the end never move another row, since only its own number and the seed decide.

    Returns:
        Positions in ``numbers``: (training rows, validation rows), each a sorted int64 array.
    """
    validation = held_out(numbers, fraction, seed)
    return np.flatnonzero(~validation).astype(np.int64), np.flatnonzero(validation).astype(np.int64)
