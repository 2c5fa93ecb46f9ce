"""Decoding of single images to the size and channels that a data set asks for."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from components.config import DataConfig
from components.errors import DataError
from pipeline.runtime.user_files import LFS_POINTER, reason

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
"""PIL modes of 8 bits per channel. PIL would silently clip the deeper ones (I;16, F) to 255."""
_MAX_PIXELS = 1 << 28
"""Pixels of a resized image before the crop: a strip of 1x60000 would take gigabytes."""


def decode(data: DataConfig, encoded: bytes, where: str, out: np.ndarray) -> None:
    """Decode an image file into ``out`` uint8 [C,H,W], converted to 1 or 3 channels.

    As in torchvision's folders, transparency is dropped, an animation is its first frame, and the
    orientation in EXIF is ignored.

    Raises:
        DataError: the image cannot be decoded, or its size or bits per channel are refused.
    """
    size = data.image_size
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode not in _MODES:
                raise DataError(
                    f"{where}: images of PIL mode {image.mode} (more than 8 bits per channel, or a colour space that "
                    "PIL does not convert) are not supported; convert the data set to 8 bits, grey or RGB"
                )
            if image.size != (size, size) and data.resize == "none":
                raise DataError(
                    f"{where}: the image is {image.size[0]}x{image.size[1]} pixels, but data.image_size is {size}; "
                    "set --data.image-size, or --data.resize crop"
                )
            mode = "L" if data.channels == 1 else "RGB"
            converted = image if image.mode == mode else image.convert(mode)
            array = np.asarray(fitted(converted, size))
    except DataError:
        raise
    # The decoders have no common base for what a broken file makes them raise: TypeError,
    # RuntimeError and NotImplementedError have been seen beside OSError and ValueError.
    except Exception as e:
        raise DataError(f"{where}: the image cannot be decoded ({_cause(encoded, e)}") from e
    out[:] = array[None] if data.channels == 1 else array.transpose(2, 0, 1)


def _cause(encoded: bytes, error: Exception) -> str:
    """Return why an image could not be decoded, and what to do."""
    if encoded.startswith(LFS_POINTER):
        return "it is a Git LFS pointer, not the file itself). Run `git lfs pull` where the data set was cloned"
    if isinstance(error, UnidentifiedImageError):
        # PIL's own text names only the buffer that it was given.
        why = f"none of Pillow's formats; {len(encoded)} bytes"
    else:
        why = reason(error)
    return f"{why}); it is truncated or not an image file. Get the file again or remove it"


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels (bicubic, antialiased), and crop the centre."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    shorter = min(width, height)
    # Rounding must not leave a side one pixel short.
    scaled = max(size, round(width * size / shorter)), max(size, round(height * size / shorter))
    if scaled[0] * scaled[1] > _MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are too long a strip to resize to {size} pixels")
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
