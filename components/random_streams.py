"""Independent random streams, derived from one seed."""

from __future__ import annotations

from components.config import stored_levels as stored_levels

AUGMENT_STREAM = 1
ADVERSARIAL_STREAM = 2
DROPOUT_STREAM = 3
"""Keep the random streams of a step apart; its noise has none of these numbers."""


def stream_seed(*parts: int) -> int:
    """A seed for an independent random stream, mixed from small integers (FNV-1a over their bytes, 63 bits)."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little", signed=True):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1
