"""Independent random streams, derived from one seed."""

from __future__ import annotations

AUGMENT_STREAM = 1
ADVERSARIAL_STREAM = 2
DROPOUT_STREAM = 3
"""Numbers that keep the random streams of a step apart. The stream of its noise has no number."""


def stream_seed(*parts: int) -> int:
    """Mix small integers into the seed of a random stream (FNV-1a over their bytes, 63 bits)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little", signed=True):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1
