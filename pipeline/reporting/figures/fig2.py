"""Figure 2: spectra of perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pipeline.reporting.figures.common import Picture
from pipeline.reporting.plots import images, style

MAP_FLOOR = 1e-3
"""Smallest coefficient that a frequency map shows: about what rounding images to 8 bits puts into every one of them."""
MAPS_ACROSS = 9
"""Maps that fig2 has side by side, of all images together."""


def fig2(stored: Mapping[str, np.ndarray]) -> Picture | None:
    """Low-pass and pyramid images of each level with their frequency maps; None without them."""
    count = sum(name.startswith("fig2__level_") and name.removeprefix("fig2__level_").isdigit() for name in stored)
    if not count:
        return None
    n = min(len(stored["fig2__level_0"]), max(1, MAPS_ACROSS // count))
    sizes = [stored[f"fig2__level_{m}"].shape[-1] for m in range(count)]
    maps = {
        kind: [_magnitude(stored[f"fig2__{kind}_spectrum_{m}"]) for m in range(count)] for kind in ("level", "band")
    }
    cell, left, gap = 0.98, 1.25, 0.22
    width = left + n * count * cell + (n - 1) * gap + 0.75
    figure = Figure(figsize=(width, 4 * cell + 0.62))
    height = figure.get_figheight()
    norm = LogNorm(MAP_FLOOR, max(MAP_FLOOR * 10, max(m.max() for kind in maps.values() for m in kind)), clip=True)
    shown = None
    for row, (title, kind) in enumerate(
        (
            ("low-pass\nimages $I^m$", "level"),
            ("pyramid\nimages $P^m$", "band"),
            ("frequency maps\nof $I^m$", "level"),
            ("frequency maps\nof $P^m$", "band"),
        )
    ):
        bottom = (height - 0.32 - (row + 1) * cell - (0.1 if row > 1 else 0)) / height
        figure.text((left - 0.12) / width, bottom + cell / 2 / height, title, ha="right", va="center", fontsize=9)
        for i in range(n):
            for m in range(count):
                x = left + (i * count + m) * cell + i * gap
                axis = figure.add_axes((x / width, bottom, 0.93 * cell / width, 0.93 * cell / height))
                if row < 2:
                    image = stored[f"fig2__{kind}_{m}"][i]
                    if kind == "band" and m < count - 1:
                        image = 0.5 + image / (2 * max(float(np.abs(image).max()), 1e-6))
                    images.show_image(axis, image)
                else:
                    # in the frame of the whole map: the coefficients that a level lacks stay white
                    shown = axis.imshow(
                        maps[kind][m][i],
                        norm=norm,
                        cmap="cividis",
                        interpolation="nearest",
                        extent=(0, sizes[m], sizes[m], 0),
                    )
                    axis.set(xlim=(0, sizes[0]), ylim=(sizes[0], 0), xticks=[], yticks=[])
                    style.line_spines(axis, 0.5, "#9ca3af")
                if row == 0:
                    axis.set_title(f"m = {m}: {sizes[m]}×{sizes[m]}", fontsize=8.5, pad=3)
    if shown is not None:
        bar = figure.add_axes(((width - 0.62) / width, 0.2 / height, 0.13 / width, 1.9 * cell / height))
        figure.colorbar(shown, cax=bar)
        bar.tick_params(labelsize=8)
    shares = [
        f"the lowest {size}×{size} hold {100 * energy:.1f} %"
        for size, energy in zip(sizes[1:], low_energy(stored["fig2__level_spectrum_0"][:n], sizes[1:]), strict=True)
    ]
    caption = (
        f"The first {n} test images. Low-pass image I^m is the inverse DCT, at its own size, of the top-left block of "
        f"the image's coefficients; P^m = I^m - U(I^(m+1)) is what the next level lacks (mid-grey is 0, each stretched to its "
        "own range), the last one the smallest level itself. Maps: absolute DCT-II coefficients, logarithmic, constant term top "
        f"left, coefficients that a level does not have left white. Of the energy of these images (constant term included), "
        f'{", ".join(shares) if shares else "there is one level alone"}. Paper, sec. 3.3: adversarial perturbations "happen to '
        'be high frequency in nature"; this figure is of clean images and shows nothing of that either way.'
    )
    return "Figure 2: low-pass and pyramid images with their frequency maps", caption, style.png(figure)


def low_energy(spectra: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """Share of the energy of all coefficients [n,C,W,W] that lies in the top-left block of each size."""
    squares = np.asarray(spectra, dtype=np.float64) ** 2
    return [float(squares[..., :size, :size].sum() / squares.sum()) for size in sizes]


def _magnitude(spectra: np.ndarray) -> np.ndarray:
    """[n,W,W]: root mean square over the channels."""
    found: np.ndarray = np.sqrt((np.asarray(spectra, dtype=np.float64) ** 2).mean(axis=1))
    return found
