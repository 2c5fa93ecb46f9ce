"""Figure 8: is the reconstruction nearer to the clean or to the attacked image?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.labels import attack_text
from pipeline.reporting.over_seeds import MIN_FOR_MEDIAN
from pipeline.reporting.plots import style
from pipeline.reporting.plots.style import Plot


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Statistics of R = D_rc / D_ra over the samples of a model."""

    n: int
    below: int
    """Samples with R < 1: the reconstruction is nearer to the clean than to the attacked image."""
    inside: int
    """Samples with 0 < R < 1."""
    undefined: int
    """Samples without a finite R: their reconstruction equals the attacked image."""
    gained: int
    """Samples whose reconstruction is nearer to the clean image than the attacked image is."""
    median: float
    """Median of the finite R; nan if they are fewer than MIN_FOR_MEDIAN."""
    largest: float
    """Largest finite R; nan if there is none."""

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], model: str) -> Ratios:
        """Compute the statistics of a model from the arrays of ``figures.npz``."""
        r = np.asarray(arrays[f"fig8__r__{model}"], dtype=np.float64)
        finite = r[np.isfinite(r)]
        nearer = arrays[f"fig8__d_rc__{model}"] < arrays[f"fig8__d_ac__{model}"]
        return cls(
            n=len(r),
            below=int((finite < 1).sum()),
            inside=int(((finite > 0) & (finite < 1)).sum()),
            undefined=len(r) - len(finite),
            gained=int(np.sum(nearer)),
            median=float(np.median(finite)) if len(finite) >= MIN_FOR_MEDIAN else math.nan,
            largest=float(finite.max()) if len(finite) else math.nan,
        )


def fig8(arrays: Mapping[str, np.ndarray], roles: Mapping[str, str], bases: Mapping[str, str]) -> Plot | None:
    """Draw a histogram of R = D_rc / D_ra for every model with an auto-encoder, if there is any.

    Replicates, which ``bases`` maps to one name, have one colour.
    """
    models = [m for m in roles if f"fig8__r__{m}" in arrays]
    if not models:
        return None
    ratios = {model: Ratios.of(arrays, model) for model in models}
    finite = {model: (r := arrays[f"fig8__r__{model}"])[np.isfinite(r)] for model in models}
    edges = _edges(np.concatenate(list(finite.values())))
    styles = style.styles({bases[model]: role for model, role in roles.items()})
    figure = _draw(ratios, finite, edges, {model: styles[bases[model]]["color"] for model in models})
    texts = (_sentence(model, ratios[model], int((finite[model] > edges[-1]).sum())) for model in models)
    holds = all(r.inside == r.n for r in ratios.values())
    caption = (
        f"All attacked test images, white-box {attack_text(str(arrays['fig8__attack']))}. D_rc and D_ra are the "
        "Euclidean distances of the auto-encoder's reconstruction of the attacked image from the clean and from the "
        'attacked image. Paper, sec. 4.5, MNIST: R "always falls into the interval (0, 1)". '
        f"{'So it does here' if holds else 'Here it does not always'}. {'; '.join(texts)}. R < 1 does not say that the "
        "perturbation is gone: blurring an image may have the same effect."
    )
    heading = "Figure 8: is the reconstruction nearer to the clean or to the attacked image?"
    return Plot(heading, caption, figure)


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of some 40 bins, up to 10. The largest hundredth of the values is left out."""
    end = min(10.0, max(1.2, 1.05 * float(np.quantile(values, 0.99)))) if len(values) else 1.2
    per_unit = max(5, round(40 / end))  # A whole number, so that R = 1 is an edge.
    edges: np.ndarray = np.arange(math.ceil(end * per_unit) + 1) / per_unit
    return edges


def _draw(
    ratios: Mapping[str, Ratios], finite: Mapping[str, np.ndarray], edges: np.ndarray, colours: Mapping[str, str]
) -> Figure:
    figure, axes = style.grid(len(ratios), columns=min(3, len(ratios)), width=4.6, height=3.3)
    for axis, (model, r) in zip(axes, ratios.items(), strict=True):
        axis.hist(finite[model], bins=edges.tolist(), color=colours[model])
        axis.axvline(1, color=style.TEXT, linewidth=1.1, linestyle="--")
        axis.set(title=f"{model}\nR < 1: {_share(r.below, r.n)}", xlabel="R = D_rc / D_ra", ylabel="test images")
        axis.set_xlim(0, float(edges[-1]))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.annotate("R = 1", (1, 0.97), (-4, 0), ("data", "axes fraction"), "offset points", ha="right", fontsize=8)
    return figure


def _sentence(model: str, ratios: Ratios, beyond: int) -> str:
    """Return the statistics of a model in words. ``beyond``: samples to the right of the axis."""
    parts = [f"{model}: R < 1 for {_share(ratios.below, ratios.n)}"]
    if math.isfinite(ratios.median):
        parts.append(f"median {ratios.median:.2f} of {ratios.n - ratios.undefined:,}")
    if math.isfinite(ratios.largest):
        parts.append(f"largest {ratios.largest:.3g}")
    if ratios.undefined:
        parts.append(f"{ratios.undefined:,} without a finite R, as the reconstruction equals the attacked image")
    if beyond:
        parts.append(f"{beyond:,} to the right of the axis")
    gained = _share(ratios.gained, ratios.n)
    return ", ".join([*parts, f"reconstruction nearer to the clean image than the attacked image is for {gained}"])


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "none of none"
