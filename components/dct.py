"""Multi-scale low-pass images by the DCT (Liu et al., sec. 3.3), their bands and spectra.

F = DCT-II(I), orthonormal, per channel. F^m is its top-left W_m x W_m block and I^m the inverse DCT
of F^m at its own size, scaled by W_m / W so that a constant image stays constant. Both transforms
are linear, so

    I^m = A_m I A_m^T,   A_m = sqrt(W_m / W) C_{W_m}^T C_W[:W_m]                          (*)

with C_W the orthonormal DCT-II matrix of size W. Each level follows exactly from the one before, at
a quarter of the cost, since

    A_{W -> W_{m+1}} = A_{W_m -> W_{m+1}} A_{W -> W_m}

Levels may overshoot the range of the image a little. They are targets of a regression, so nothing
is clipped.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "matmul", "fft"]
Targets = Literal["lowpass", "linear", "none"]

FFT_MIN_SIZE = 4096
"""Width from which on ``auto`` takes the FFT on a CPU. Measured, ms of CPU time for one channel and
four levels (AMD EPYC, AVX2, one thread, torch 2.14.1), matrix products against FFT: 224: 0.52,
1.55; 1024: 21.7, 33.6; 2048: 166, 208; 3072: 585, 627; 4096: 1335, 1204. On a GPU matrix products
are taken at every size."""
KRONECKER_MAX_SIZE = 14
"""Largest width at which one product with the Kronecker square of A, on flattened images, is taken
instead of two products with A. It needs more arithmetic, but products of such small matrices are
dominated by overhead. 256 images 14x14 -> 7x7: 82 us against 150. From 16 on it gains nothing."""


def lowpass_pyramid(images: Tensor, sizes: Sequence[int], backend: Backend = "auto") -> list[Tensor]:
    """Compute the low-pass images I^0 = I, I^1, ... (sec. 3.3, eq. (*) above).

    Differentiable, and computed in the precision of ``images`` even under autocast. Levels are less
    exact, about 1e-3, only on CUDA with TF32 matrix products allowed (not PyTorch's default).

    Args:
        images: [N,C,W,W] or [..,W,W], float32 or float64, any range; any device.
        sizes: side lengths in pixels, falling, the first is W (``components.config.level_sizes``).
        backend: ``matmul``, ``fft``, or ``auto``: the faster one for each size.

    Returns:
        One tensor [..,size,size] per size; the first is ``images`` itself. Constant images stay
        constant; the range is exceeded a little at edges.

    Raises:
        TypeError: ``images`` is not float32 or float64.
        ValueError: ``images`` are not square, or ``sizes`` do not start at W and fall.
    """
    _check(images, sizes)
    levels = [images]
    with torch.autocast(device_type=images.device.type, enabled=False):
        for size in sizes[1:]:
            levels.append(_resample(levels[-1], size, backend))
    return levels


def linear_pyramid(images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Compute the bilinear targets of the ablation "w/ MS-LI" (sec. 4.3, Table 1).

    Each level is interpolated directly from the image. Pixel centres are aligned
    (``align_corners=False``, which also commutes with flips). There is no anti-aliasing filter: it
    would be a low-pass filter, the very thing that the ablation leaves out.

    Args, Returns, Raises: as :func:`lowpass_pyramid`, with ``images`` [N,C,W,W].
    """
    _check(images, sizes)
    return [
        images,
        *(
            F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)
            for size in sizes[1:]
        ),
    ]


def target_levels(images: Tensor, sizes: Sequence[int], targets: Targets) -> list[Tensor]:
    """Compute the levels that have a target, level 0 first.

    ``lowpass`` and ``linear`` name the pyramid; ``none`` returns the images alone.

    Args, Raises: as :func:`linear_pyramid`.
    """
    if targets == "none":
        return [images]
    return linear_pyramid(images, sizes) if targets == "linear" else lowpass_pyramid(images, sizes)


def upsample(images: Tensor, size: int) -> Tensor:
    """Apply U of the Laplacian pyramid: zero padding in the DCT domain, [..,w,w] -> [..,size,size].

    Constants stay constant. Low-pass filtering the upsampled images gives ``images`` back.
    """
    _check(images, (images.shape[-1],))
    if size < images.shape[-1]:
        raise ValueError(f"size={size} is smaller than the images ({images.shape[-1]})")
    return _multiply(images, size)


def laplacian_bands(levels: Sequence[Tensor]) -> list[Tensor]:
    """Compute the bands P^m = I^m - U(I^{m+1}) for plots, with the smallest level last.

    See sec. 3.3 and Fig. 2.

    Args:
        levels: [..,W_m,W_m] per level, largest first.

    Returns:
        One signed tensor of the same shape per level; I^m = P^m + U(I^{m+1}) restores the levels.
    """
    bands = [level - upsample(smaller, level.shape[-1]) for level, smaller in itertools.pairwise(levels)]
    return [*bands, levels[-1]]


def spectrum(images: Tensor) -> Tensor:
    """Compute the orthonormal DCT-II of each channel, [..,H,W] -> [..,H,W] (the maps of Fig. 2).

    The constant term comes first. Energy is preserved: sum(spectrum**2) = sum(images**2). Images
    need not be square.
    """
    _check_float(images)
    rows, columns = (_dct_matrix_on(n, images.dtype, images.device) for n in images.shape[-2:])
    with torch.autocast(device_type=images.device.type, enabled=False):
        return rows @ images @ columns.T


def dct_matrix(size: int) -> np.ndarray:
    """Return C, the orthonormal DCT-II matrix, float64 [size,size]; row k is the k-th cosine."""
    k, i = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.cos(np.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def resampling_matrix(size: int, target: int) -> np.ndarray:
    """Return A of eq. (*), float64 [target,size].

    If ``target`` is above ``size``, A is U: zero padding in the DCT domain.
    """
    common = min(size, target)
    matrix: np.ndarray = math.sqrt(target / size) * (dct_matrix(target)[:common].T @ dct_matrix(size)[:common])
    return matrix


def _check_float(images: Tensor) -> None:
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"images are {images.dtype}; low-pass images need float32 or float64 (uint8: divide by 255 first)"
        )


def _check(images: Tensor, sizes: Sequence[int]) -> None:
    _check_float(images)
    if images.ndim < 2 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images of shape {tuple(images.shape)} are not square")
    if not sizes or sizes[0] != images.shape[-1] or any(b >= a or b < 1 for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"sizes={tuple(sizes)} must begin with the images' {images.shape[-1]} pixels and fall")


def _resample(images: Tensor, size: int, backend: Backend) -> Tensor:
    width = images.shape[-1]
    if backend == "auto":
        backend = "fft" if width >= FFT_MIN_SIZE and images.device.type == "cpu" else "matmul"
    if backend == "fft":
        return _fft_axis(_fft_axis(images, size).transpose(-1, -2), size).transpose(-1, -2)
    return _multiply(images, size)


def _multiply(images: Tensor, size: int) -> Tensor:
    width = images.shape[-1]
    matrix = _resampling_matrix_on(width, size, images.dtype, images.device)
    with torch.autocast(device_type=images.device.type, enabled=False):
        if width <= KRONECKER_MAX_SIZE:
            flat = images.reshape(*images.shape[:-2], width * width)
            return (flat @ torch.kron(matrix, matrix).T).reshape(*images.shape[:-2], size, size)
        return matrix @ images @ matrix.T


def _fft_axis(x: Tensor, size: int) -> Tensor:
    """Apply A of eq. (*) along the last axis, by real FFTs of the signals' own lengths.

    See Makhoul 1980.
    """
    width = x.shape[-1]
    order, spread, forward, low, backward = _fft_tables(width, size, x.dtype, x.device)
    spectrum_ = torch.fft.rfft(x.index_select(-1, order))
    # A real signal's FFT is stored up to width // 2 only. Beyond that, F_k is the conjugate of
    # F_{width - k}.
    half = spectrum_.index_select(-1, low)
    if size > width // 2 + 1:
        half = torch.where(torch.arange(size, device=x.device) <= width // 2, half, half.conj())
    coefficients = (half * forward).real
    mirrored = F.pad(coefficients[..., 1:].flip(-1), (1, 0))[..., : size // 2 + 1]
    signal = torch.fft.irfft(torch.complex(coefficients[..., : size // 2 + 1], -mirrored) * backward, n=size)
    restored: Tensor = signal.index_select(-1, spread)
    return restored


def _makhoul_order(size: int) -> np.ndarray:
    """Return 0, 2, 4, ..., 5, 3, 1, the order in which an FFT of equal length gives the DCT-II."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)[::-1]])


@functools.lru_cache(maxsize=64)
def _fft_tables(
    width: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    k = np.arange(size)
    forward = np.exp(-0.5j * np.pi * k / width)
    backward = np.exp(0.5j * np.pi * k[: size // 2 + 1] / size)
    # forward gives sum x cos without the orthonormal factors. Those of both transforms and of (*)
    # multiply to size / width.
    forward = forward * (size / width)
    low = np.where(k <= width // 2, k, width - k)
    # A table first made in inference mode could not take part in autograd later.
    with torch.inference_mode(False):
        return (
            torch.from_numpy(_makhoul_order(width)).to(device),
            torch.from_numpy(np.argsort(_makhoul_order(size))).to(device),
            torch.from_numpy(forward).to(device, complex_dtype),
            torch.from_numpy(low).to(device),
            torch.from_numpy(backward).to(device, complex_dtype),
        )


@functools.lru_cache(maxsize=64)
def _resampling_matrix_on(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(resampling_matrix(size, target)).to(device, dtype)


@functools.lru_cache(maxsize=64)
def _dct_matrix_on(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(dct_matrix(size)).to(device, dtype)
