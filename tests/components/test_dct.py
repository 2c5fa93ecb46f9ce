"""Low-pass pyramids against torch-dct and scipy.fft, and the properties that sec. 3.3 relies on."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
import torch_dct
from hypothesis import given, settings
from hypothesis import strategies as st

from components import dct
from components.config import level_sizes
from components.dct import laplacian_bands, linear_pyramid, lowpass_pyramid, spectrum, upsample

BACKENDS = ("matmul", "fft", "auto")
SIZES = (14, 15, 28, 29, 31, 32, 33, 56, 63, 64, 96, 224)


def images(size: int, n: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_torch_dct_and_scipy(size: int, backend: dct.Backend) -> None:
    x = images(size)
    sizes = level_sizes(size)
    levels = lowpass_pyramid(x, sizes, backend)
    assert levels[0] is x
    # both references go from the image to each level directly
    coefficients = torch_dct.dct_2d(x, norm="ortho")
    for k, level in zip(sizes[1:], levels[1:], strict=True):
        reference = torch_dct.idct_2d(coefficients[..., :k, :k] * (k / size), norm="ortho")
        torch.testing.assert_close(level, reference, rtol=0, atol=1e-6)
        block = scipy.fft.dctn(x.numpy(), norm="ortho", axes=(-2, -1))[..., :k, :k] * (k / size)
        np.testing.assert_allclose(
            level.numpy(), scipy.fft.idctn(block, norm="ortho", axes=(-2, -1)), rtol=0, atol=1e-6
        )


@settings(max_examples=60)
@given(size=st.integers(2, 48), data=st.data())
def test_any_pair_of_sizes(size: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, size - 1))
    x = images(size, n=1, channels=1)
    block = scipy.fft.dctn(x.numpy(), norm="ortho", axes=(-2, -1))[..., :target, :target] * (target / size)
    reference = scipy.fft.idctn(block, norm="ortho", axes=(-2, -1))
    for backend in ("matmul", "fft"):
        np.testing.assert_allclose(lowpass_pyramid(x, (size, target), backend)[1].numpy(), reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [28, 31, 224])
def test_float32(size: int, backend: dct.Backend) -> None:
    x = images(size)
    for exact, level in zip(
        lowpass_pyramid(x, level_sizes(size)), lowpass_pyramid(x.float(), level_sizes(size), backend), strict=True
    ):
        assert level.dtype == torch.float32
        torch.testing.assert_close(level.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [28, 31, 32, 224])
def test_constant_stays_constant(size: int, backend: dct.Backend) -> None:
    for level in lowpass_pyramid(torch.full((1, 1, size, size), 0.7, dtype=torch.float64), level_sizes(size), backend):
        torch.testing.assert_close(level, torch.full_like(level, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pyramid", [lowpass_pyramid, linear_pyramid])
@pytest.mark.parametrize("size", [28, 31, 32])
@pytest.mark.parametrize("axis", [-1, -2])
def test_flip_commutes(pyramid, size: int, axis: int) -> None:
    x = images(size)
    flipped_first = pyramid(x.flip(axis), level_sizes(size))
    for a, b in zip(flipped_first, pyramid(x, level_sizes(size)), strict=True):
        torch.testing.assert_close(a, b.flip(axis), rtol=0, atol=1e-12)


def test_crop_does_not_commute() -> None:
    """Why levels are recomputed under crop augmentation: even a crop by a whole pixel of the level differs."""
    x = images(32)
    cropped_first = lowpass_pyramid(x[..., 4:28, 4:28].contiguous(), (24, 12))[1]
    cropped_last = lowpass_pyramid(x, (32, 16))[1][..., 2:14, 2:14]
    assert (cropped_first - cropped_last).abs().max() > 0.05


@pytest.mark.parametrize("size", [28, 29, 63, 224])
def test_level_from_level_equals_direct(size: int) -> None:
    x, sizes = images(size), level_sizes(size)
    for k, level in zip(sizes[1:], lowpass_pyramid(x, sizes)[1:], strict=True):
        torch.testing.assert_close(level, lowpass_pyramid(x, (size, k))[1], rtol=0, atol=1e-12)


def test_overshoot_is_not_clipped() -> None:
    step = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    step[..., 13:] = 1
    level = lowpass_pyramid(step, (28, 14))[1]
    assert level.max() > 1.01
    assert level.min() < -0.01


@pytest.mark.parametrize("size", [28, 31])
def test_bands_restore_the_levels(size: int) -> None:
    levels = lowpass_pyramid(images(size), level_sizes(size))
    bands = laplacian_bands(levels)
    assert [b.shape for b in bands] == [level.shape for level in levels]
    restored = bands[-1]
    for band, level in zip(bands[-2::-1], levels[-2::-1], strict=True):
        restored = band + upsample(restored, band.shape[-1])
        torch.testing.assert_close(restored, level, rtol=0, atol=1e-12)
    # a band holds just the frequencies that the next level lacks
    low = spectrum(bands[0])[..., : levels[1].shape[-1], : levels[1].shape[-1]]
    torch.testing.assert_close(low, torch.zeros_like(low), rtol=0, atol=1e-12)


def test_upsampling_is_undone_by_the_low_pass_filter() -> None:
    x = images(14)
    torch.testing.assert_close(lowpass_pyramid(upsample(x, 28), (28, 14))[1], x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="smaller"):
        upsample(x, 7)


def test_spectrum() -> None:
    x = images(20)[..., :13]
    reference = scipy.fft.dctn(x.numpy(), norm="ortho", axes=(-2, -1))
    np.testing.assert_allclose(spectrum(x).numpy(), reference, rtol=0, atol=1e-12)
    torch.testing.assert_close((spectrum(x) ** 2).sum(), (x**2).sum())


def test_linear_levels_are_taken_from_the_image() -> None:
    x = images(28)
    _, half, quarter = linear_pyramid(x, (28, 14, 7))
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(x, 2))
    # bilinear at a quarter of the size reads the four pixels around the centre of each 4x4 block, without anti-aliasing
    centre = (x[..., 1::4, 1::4] + x[..., 1::4, 2::4] + x[..., 2::4, 1::4] + x[..., 2::4, 2::4]) / 4
    torch.testing.assert_close(quarter, centre)


@pytest.mark.parametrize("pyramid", [lowpass_pyramid, linear_pyramid])
def test_refuses(pyramid) -> None:
    with pytest.raises(ValueError, match="not square"):
        pyramid(torch.rand(1, 1, 28, 30), (28, 14))
    with pytest.raises(TypeError, match="uint8"):
        pyramid(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), (28, 14))
    for sizes in [(), (14, 7), (28, 28), (28, 14, 14), (28, 0)]:
        with pytest.raises(ValueError, match="sizes="):
            pyramid(torch.rand(1, 1, 28, 28), sizes)


@pytest.mark.parametrize("backend", ["matmul", "fft"])
def test_gradients_also_after_inference_mode(backend: dct.Backend) -> None:
    dct._resampling_matrix_on.cache_clear()
    dct._fft_tables.cache_clear()
    with torch.inference_mode():
        lowpass_pyramid(images(12), (12, 6), backend)
    x = images(12, n=1, channels=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lowpass_pyramid(x, (12, 6, 3), backend)[1:], x)


def test_autocast_does_not_lower_the_precision() -> None:
    x = images(28).float()
    with torch.autocast("cpu", torch.bfloat16):
        level = lowpass_pyramid(x, (28, 14))[1]
    assert level.dtype == torch.float32
    torch.testing.assert_close(level, lowpass_pyramid(x, (28, 14))[1], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["matmul", "fft"])
def test_memory_layout_and_leading_axes_do_not_matter(backend: dct.Backend) -> None:
    x = images(28)
    reference = lowpass_pyramid(x, (28, 14), backend)[1]
    strided = lowpass_pyramid(x.to(memory_format=torch.channels_last), (28, 14), backend)[1]
    torch.testing.assert_close(strided, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(lowpass_pyramid(x[0, 0], (28, 14), backend)[1], reference[0, 0], rtol=0, atol=1e-12)


def test_auto_takes_the_fft_for_large_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    fft_axis = dct._fft_axis
    monkeypatch.setattr(dct, "_fft_axis", lambda x, size: used.append(x.shape[-1]) or fft_axis(x, size))
    monkeypatch.setattr(dct, "FFT_MIN_SIZE", 64)
    lowpass_pyramid(images(64), (64, 32, 16))
    assert used == [64, 64]
