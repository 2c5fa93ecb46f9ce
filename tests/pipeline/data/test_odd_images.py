"""Any image file is read as torchvision reads it, or refused by one error that names it."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_files import encode, grey
from PIL import Image

from components.config import DataConfig
from components.errors import DataError
from pipeline.data.sources.decode import decode, fitted

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(frame) for frame in grey(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def float_tiff() -> bytes:
    return encode(Image.fromarray(np.random.default_rng(0).random((28, 28), np.float32)), "TIFF")


READABLE: dict[str, bytes] = {
    "grey": encode(RGB.convert("L")),
    "black and white": encode(RGB.convert("1")),
    "grey with transparency": encode(RGB.convert("LA")),
    "transparency": encode(RGB.convert("RGBA")),
    "palette": encode(RGB.convert("P")),
    "palette with a transparent colour": encode(RGB.convert("P"), transparency=3),
    "palette with transparencies": encode(RGB.convert("P"), transparency=bytes(range(256))),
    "transparent colour": encode(RGB, transparency=(0, 0, 0)),
    "interlaced GIF": encode(RGB.convert("P"), "GIF", interlace=1),
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP"),
    "animated PNG": animated("PNG"),
    "WebP": encode(RGB, "WEBP"),
    "WebP with transparency": encode(RGB.convert("RGBA"), "WEBP", lossless=True),
    "JPEG": encode(RGB, "JPEG"),
    "progressive JPEG": encode(RGB, "JPEG", progressive=True),
    "grey JPEG": encode(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG"),
    "rotated JPEG": encode(RGB, "JPEG", exif=exif(6)),
    "JPEG with bytes at its end": encode(RGB, "JPEG") + b"end",
    "multi-picture JPEG": encode(RGB, "MPO", save_all=True, append_images=[RGB]),
    "CMYK TIFF": encode(RGB.convert("CMYK"), "TIFF"),
    "multi-page TIFF": encode(RGB, "TIFF", save_all=True, append_images=[RGB.convert("L")]),
    "BMP": encode(RGB, "BMP"),
    "PPM": encode(RGB, "PPM"),
}


def at(channels: int = 3, **changes: Any) -> DataConfig:
    return DataConfig(channels=channels, **changes)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", READABLE)
def test_images_are_read_as_torchvision_reads_them(tmp_path: Path, name: str) -> None:
    from torchvision.datasets.folder import pil_loader

    (tmp_path / "image").write_bytes(READABLE[name])
    expected = np.asarray(pil_loader(str(tmp_path / "image"))).transpose(2, 0, 1)
    out = np.empty((3, 28, 28), np.uint8)
    decode(at(), READABLE[name], name, out)
    np.testing.assert_array_equal(out, expected)


def bomb() -> bytes:
    """Return a small file that claims 10^10 pixels."""
    png = bytearray(encode(RGB.convert("1")))
    png[16:24] = (100_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def bad_tiff() -> bytes:
    """Return a TIFF whose width is a fraction: Pillow raises TypeError."""
    tiff = encode(Image.new("L", (28, 28)), "TIFF")
    at_width = tiff.index(b"\x00\x01\x03\x00\x01\x00\x00\x00") if tiff[:2] == b"MM" else tiff.index(b"\x00\x01\x04\x00")
    return tiff[: at_width + 2] + b"\x05\x00" + tiff[at_width + 4 :]


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "none of Pillow's formats; 0 bytes"),
    "text": (b"no image at all", "none of Pillow's formats; 15 bytes"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "none of Pillow's formats"),
    "truncated JPEG": (READABLE["JPEG"][:400], "cannot be decoded"),
    "truncated WebP": (READABLE["WebP"][:200], "cannot be decoded"),
    "truncated GIF": (READABLE["animated GIF"][:100], "cannot be decoded"),
    "truncated PNG": (READABLE["transparency"][:100], "cannot be decoded"),
    "truncated TIFF": (READABLE["CMYK TIFF"][:300], "cannot be decoded"),
    "TIFF with a fraction for its width": (bad_tiff(), "cannot be decoded"),
    "unknown DDS": (b"DDS " + (124).to_bytes(4, "little") + b"\1" * 120, "cannot be decoded"),
    "16-bit PNG": (encode(grey(1)[0].astype(np.uint16) * 256), "PIL mode I;16 .*convert the data set"),
    "32-bit TIFF": (encode(Image.fromarray(grey(1)[0].astype(np.int32)), "TIFF"), "PIL mode I "),
    "float TIFF": (float_tiff(), "PIL mode F "),
    "LAB TIFF": (encode(Image.new("LAB", (28, 28)), "TIFF"), "PIL mode LAB "),
    "1x1": (encode(RGB.resize((1, 1))), "1x1 pixels, but data.image_size is 28"),
    "bomb": (bomb(), "exceeds limit"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_cannot_be_read_are_named(name: str, channels: int) -> None:
    encoded, message = BAD[name]
    with pytest.raises(DataError, match=r"^x\.png row 3: .*" + message) as refused:
        decode(at(channels), encoded, "x.png row 3", np.empty((channels, 28, 28), np.uint8))
    assert "0x" not in str(refused.value), "an address of this process's memory"
    assert "\n" not in str(refused.value)


def test_small_and_long_images_are_resized_or_refused() -> None:
    out = np.empty((3, 224, 224), np.uint8)
    decode(at(image_size=224, resize="crop"), BAD["1x1"][0], "x", out)
    assert (out == out[:, :1, :1]).all()
    strip = encode(Image.new("L", (60_000, 1)))
    with pytest.raises(DataError, match=r"60000x1 pixels are too long a strip to resize to 224 pixels"):
        decode(at(image_size=224, resize="crop"), strip, "x", out)
    assert fitted(Image.new("L", (3000, 28)), 28).size == (28, 28)


@settings(max_examples=300)
@example("JPEG", [(0.9, 0)], 0.5)
@given(
    name=st.sampled_from(list(READABLE)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1) | st.just(1.0),
)
def test_damaged_images_are_read_or_named(name: str, edits: list[tuple[float, int]], kept: float) -> None:
    damaged = bytearray(READABLE[name])
    for place, value in edits:  # most fields that matter are at the beginning
        damaged[int(place**3 * (len(damaged) - 1))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decode(at(), bytes(damaged[: int(kept * len(damaged))]), "x", np.empty((3, 28, 28), np.uint8))
        except DataError as e:
            assert str(e).startswith("x: ")  # noqa: PT017
