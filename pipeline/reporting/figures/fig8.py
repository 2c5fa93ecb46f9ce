"""Figure 8: ratios of distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from pipeline.reporting import over_seeds
from pipeline.reporting.figures.common import Picture
from pipeline.reporting.labels import attack_text
from pipeline.reporting.plots import style

BINS = 40
"""Of fig8, about."""
MAX_R = 10.0
"""Where fig8's axis ends at the latest."""


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """What the R of a model's samples come to."""

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
    """Over the finite R; nan if these are fewer than comparison.MIN_FOR_MEDIAN."""
    largest: float

    @classmethod
    def of(cls, stored: Mapping[str, np.ndarray], model: str) -> Ratios:
        r = np.asarray(stored[f"fig8__r__{model}"], dtype=np.float64)
        finite = r[np.isfinite(r)]
        nearer = stored[f"fig8__d_rc__{model}"] < stored[f"fig8__d_ac__{model}"]
        return cls(
            n=len(r),
            below=int((finite < 1).sum()),
            inside=int(((finite > 0) & (finite < 1)).sum()),
            undefined=len(r) - len(finite),
            gained=int(np.sum(nearer)),
            median=float(np.median(finite)) if len(finite) >= over_seeds.MIN_FOR_MEDIAN else math.nan,
            largest=float(finite.max()) if len(finite) else math.nan,
        )


def fig8(stored: Mapping[str, np.ndarray], roles: Mapping[str, str], bases: Mapping[str, str]) -> Picture | None:
    """Histogram of R = D_rc / D_ra of every model with an auto-encoder; None without distances.

    ``bases``: model -> name in the recipe; replicates have one colour.
    """
    models = [m for m in roles if f"fig8__r__{m}" in stored]
    if not models:
        return None
    found = {m: Ratios.of(stored, m) for m in models}
    finite = {m: stored[f"fig8__r__{m}"][np.isfinite(stored[f"fig8__r__{m}"])] for m in models}
    everything = np.concatenate(list(finite.values()))
    # the furthest hundredth would press the rest to the left
    end = min(MAX_R, max(1.2, 1.05 * float(np.quantile(everything, 0.99)))) if len(everything) else 1.2
    per_unit = max(5, round(BINS / end))  # whole: no bin lies on both sides of R = 1
    edges = np.arange(math.ceil(end * per_unit) + 1) / per_unit
    end = float(edges[-1])
    beyond = {m: int((values > end).sum()) for m, values in finite.items()}
    looks = style.styles({bases[m]: role for m, role in roles.items()})
    figure, axes = style.grid(len(models), columns=min(3, len(models)), width=4.6, height=3.3)
    for axis, model in zip(axes, models, strict=True):
        axis.hist(finite[model], bins=edges.tolist(), color=looks[bases[model]]["color"])
        axis.axvline(1, color="#111827", linewidth=1.1, linestyle="--")
        ratios = found[model]
        axis.set(title=f"{model}\nR < 1: {_of(ratios.below, ratios.n)}", xlabel="R = D_rc / D_ra", ylabel="test images")
        axis.set_xlim(0, end)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.annotate("R = 1", (1, 0.97), (-4, 0), ("data", "axes fraction"), "offset points", ha="right", fontsize=8)
    said = []
    for model, ratios in found.items():
        parts = [f"{model}: R < 1 for {_of(ratios.below, ratios.n)}"]
        if math.isfinite(ratios.median):
            parts.append(f"median {ratios.median:.2f} of {ratios.n - ratios.undefined:,}")
        if math.isfinite(ratios.largest):
            parts.append(f"largest {ratios.largest:.3g}")
        if ratios.undefined:
            parts.append(f"{ratios.undefined:,} without a finite R, as the reconstruction equals the attacked image")
        if beyond[model]:
            parts.append(f"{beyond[model]:,} to the right of the axis")
        parts.append(
            f"reconstruction nearer to the clean image than the attacked image is for {_of(ratios.gained, ratios.n)}"
        )
        said.append(", ".join(parts))
    holds = all(r.inside == r.n for r in found.values())
    caption = (
        f"All attacked test images, white-box {attack_text(str(stored['fig8__attack']))}. D_rc and D_ra: Euclidean distance from "
        "the auto-encoder's reconstruction of the attacked image to the clean and to the attacked image. Paper, sec. 4.5, MNIST: "
        f'R "always falls into the interval (0, 1)". {"So it does here" if holds else "Here it does not always"}. {"; ".join(said)}. '
        "R < 1 does not say that the perturbation is gone: a blurred image may do."
    )
    return "Figure 8: is the reconstruction nearer to the clean or to the attacked image?", caption, style.png(figure)


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "none of none"
