"""Figure 2: low-pass and pyramid images with their frequency maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pipeline.reporting.plots import images, style
from pipeline.reporting.plots.style import Plot

MAP_FLOOR = 1e-3
"""Smallest coefficient that a frequency map shows. Rounding to 8 bits adds about as much."""
ROWS = (
    ("low-pass\nimages $I^m$", "level"),
    ("pyramid\nimages $P^m$", "band"),
    ("frequency maps\nof $I^m$", "level"),
    ("frequency maps\nof $P^m$", "band"),
)


def fig2(arrays: Mapping[str, np.ndarray]) -> Plot | None:
    """Draw low-pass and pyramid images of each level with their frequency maps, if there are any."""
    levels = sum(name.startswith("fig2__level_") and name.removeprefix("fig2__level_").isdigit() for name in arrays)
    if not levels:
        return None
    n = min(len(arrays["fig2__level_0"]), max(1, 9 // levels))  # Nine images have room side by side.
    sizes = [arrays[f"fig2__level_{m}"].shape[-1] for m in range(levels)]
    energies = low_energy(arrays["fig2__level_spectrum_0"][:n], sizes[1:])
    shares = [
        f"the lowest {size}×{size} hold {100 * energy:.1f} %" for size, energy in zip(sizes[1:], energies, strict=True)
    ]
    caption = (
        f"The first {n} test images. The low-pass image I^m is the inverse DCT, at its own size, of the top-left block "
        "of the image's coefficients. P^m = I^m - U(I^(m+1)) is the part that the next level lacks (mid-grey is 0, "
        "each image stretched to its own range). The last P^m is the smallest level itself. Maps: absolute DCT-II "
        "coefficients on a logarithmic scale, constant term top left. Coefficients that a level does not have are "
        "white. Share of the energy of these images (constant term included): "
        f"{', '.join(shares) if shares else 'there is only one level'}. Paper, sec. 3.3: adversarial perturbations "
        '"happen to be high frequency in nature". This figure is of clean images and can show nothing of that.'
    )
    heading = "Figure 2: low-pass and pyramid images with their frequency maps"
    return Plot(heading, caption, _draw(arrays, n, sizes))


def _draw(arrays: Mapping[str, np.ndarray], n: int, sizes: Sequence[int]) -> Figure:
    levels = len(sizes)
    cell, left, gap = 0.98, 1.25, 0.22
    width = left + n * levels * cell + (n - 1) * gap + 0.75
    height = 4 * cell + 0.62
    figure = Figure(figsize=(width, height))
    maps = {
        kind: [_magnitude(arrays[f"fig2__{kind}_spectrum_{m}"]) for m in range(levels)] for kind in ("level", "band")
    }
    norm = LogNorm(MAP_FLOOR, max(MAP_FLOOR * 10, max(m.max() for kind in maps.values() for m in kind)), clip=True)
    shown = None
    for row, (title, kind) in enumerate(ROWS):
        bottom = (height - 0.32 - (row + 1) * cell - (0.1 if row > 1 else 0)) / height
        figure.text((left - 0.12) / width, bottom + cell / 2 / height, title, ha="right", va="center", fontsize=9)
        for i, m in np.ndindex(n, levels):
            x = left + (i * levels + m) * cell + i * gap
            axis = figure.add_axes((x / width, bottom, 0.93 * cell / width, 0.93 * cell / height))
            if row < 2:
                image = arrays[f"fig2__{kind}_{m}"][i]
                if kind == "band" and m < levels - 1:
                    image = 0.5 + image / (2 * max(float(np.abs(image).max()), 1e-6))
                images.show_image(axis, image)
            else:
                # Use the frame of the whole map: coefficients that a level lacks stay white.
                extent = (0, sizes[m], sizes[m], 0)
                shown = axis.imshow(maps[kind][m][i], norm=norm, cmap="cividis", interpolation="none", extent=extent)
                axis.set(xlim=(0, sizes[0]), ylim=(sizes[0], 0), xticks=[], yticks=[])
                style.line_spines(axis, 0.5, style.FRAME)
            if row == 0:
                axis.set_title(f"m = {m}: {sizes[m]}×{sizes[m]}", fontsize=8.5, pad=3)
    if shown is not None:
        bar = figure.add_axes(((width - 0.62) / width, 0.2 / height, 0.13 / width, 1.9 * cell / height))
        figure.colorbar(shown, cax=bar)
        bar.tick_params(labelsize=8)
    return figure


def low_energy(spectra: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """Return the share of the energy of coefficients [n,C,W,W] in the top-left block of each size."""
    squares = np.asarray(spectra, dtype=np.float64) ** 2
    return [float(squares[..., :size, :size].sum() / squares.sum()) for size in sizes]


def _magnitude(spectra: np.ndarray) -> np.ndarray:
    """Return the root mean square [n,W,W] over the channels of coefficients [n,C,W,W]."""
    magnitude: np.ndarray = np.sqrt((np.asarray(spectra, dtype=np.float64) ** 2).mean(axis=1))
    return magnitude
