"""Decoding of single images to the size and channels that a data set asks for."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from components.config import DataConfig
from components.errors import DataError

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""PIL modes of 8 bits per channel. PIL would silently clip the deeper ones (I;16, F) to 255, so they are refused."""


def decode(data: DataConfig, encoded: bytes | Path, where: Callable[[], str], out: np.ndarray) -> None:
    """Decode an image file into ``out`` uint8 [C,H,W], converted to 1 or 3 channels (transparency is dropped).

    Args:
        data: says the size, the channels and whether the image may be resized.
        encoded: the file, or its content.
        where: returns what a message calls the image.

    Raises:
        DataError: the image cannot be decoded, or is of another size or of more than 8 bits per channel.
    """
    size = data.image_size
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            if image.mode not in _MODES:
                raise DataError(
                    f"{where()}: images of PIL mode {image.mode} (more than 8 bits per channel) are not supported; "
                    "convert the data set to 8 bits"
                )
            if image.size != (size, size) and data.resize == "none":
                raise DataError(
                    f"{where()}: the image is {image.size[0]}x{image.size[1]} pixels, but data.image_size is {size}; "
                    "set data.image_size, or data.resize=crop"
                )
            mode = "L" if data.channels == 1 else "RGB"
            converted = image if image.mode == mode else image.convert(mode)
            array = np.asarray(fitted(converted, size))
    # PIL has no common base for what a broken file makes it raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as e:
        raise DataError(
            f"{where()}: the image cannot be decoded ({e}); it is truncated or not an image file. "
            "Get the file again or remove this row"
        ) from e
    out[:] = array[None] if data.channels == 1 else array.transpose(2, 0, 1)


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels (bicubic, antialiased), then cut out the centre."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    shorter = min(width, height)
    # at least size: rounding must not leave a side one pixel short
    scaled = max(size, round(width * size / shorter)), max(size, round(height * size / shorter))
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
