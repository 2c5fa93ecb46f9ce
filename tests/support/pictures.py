"""Checks of drawn pictures."""

from __future__ import annotations

import io

from PIL import Image


def assert_png(data: bytes) -> None:
    """Check that a PNG is whole and shows something."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 3  # A blank picture has one grey level.
