"""Figures of the paper that a recipe asks for (``Experiment.figures``), drawn from records alone.

Each comes with a caption that says what was measured, on what and on how many images, and what the paper says of its own
figure. figures.npz is described in ``pipeline/gallery.py``, which writes it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from components.attacks.spec import AttackSpec
from components.errors import ConfigError
from pipeline import comparison, plots
from pipeline.comparison import by_seed, experiment_of
from pipeline.records import attack_text, threat_title

FILE = "figures.npz"
MAP_FLOOR = 1e-3
"""Smallest coefficient that a frequency map shows: about what rounding images to 8 bits puts into every one of them."""
MAPS_ACROSS = 9
"""Maps that fig2 has side by side, of all images together."""
PERTURBED_IMAGES = 3
"""Images of fig5."""
BINS = 40
"""Of fig8, about."""
MAX_R = 10.0
"""Where fig8's axis ends at the latest."""

Picture = tuple[str, str, bytes]
"""Heading, caption, PNG."""


def draw(
    record: Mapping[str, Any],
    gallery: Mapping[str, np.ndarray],
    stored: Mapping[str, np.ndarray],
    roles: Mapping[str, str],
) -> dict[str, Picture]:
    """Every figure that the recipe asks for and there are data for, by name, in the paper's order.

    Args:
        record: run.json. gallery: gallery.npz. stored: figures.npz.
        roles: model -> source, control or defended, in table order.
    """
    experiment = experiment_of(record)
    bases = experiment.bases()
    made: dict[str, Callable[[], Picture | None]] = {
        "fig2": lambda: fig2(stored),
        "fig5": lambda: fig5(record, gallery, roles),
        "fig6": lambda: fig6(stored, roles),
        "fig7": lambda: fig7(record, roles),
        "fig8": lambda: fig8(stored, roles, bases),
    }
    found = {name: make() for name, make in made.items() if name in experiment.figures}
    return {name: picture for name, picture in found.items() if picture is not None}


# -- figure 2 --------------------------------------------------------------------------------------------------------------


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
                    plots.show_image(axis, image)
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
                    plots.line_spines(axis, 0.5, "#9ca3af")
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
    return "Figure 2: low-pass and pyramid images with their frequency maps", caption, plots.png(figure)


def low_energy(spectra: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """Share of the energy of all coefficients [n,C,W,W] that lies in the top-left block of each size."""
    squares = np.asarray(spectra, dtype=np.float64) ** 2
    return [float(squares[..., :size, :size].sum() / squares.sum()) for size in sizes]


def _magnitude(spectra: np.ndarray) -> np.ndarray:
    """[n,W,W]: root mean square over the channels."""
    found: np.ndarray = np.sqrt((np.asarray(spectra, dtype=np.float64) ** 2).mean(axis=1))
    return found


# -- figure 5 --------------------------------------------------------------------------------------------------------------


def fig5(record: Mapping[str, Any], gallery: Mapping[str, np.ndarray], roles: Mapping[str, str]) -> Picture | None:
    """White-box examples of every attack on one model, each above its perturbation; None without examples."""
    keys: dict[str, dict[str, str]] = {}
    for e in record["evaluations"]:
        if e["threat_model"] == "white_box" and f"adversarial__{e['model']}__{e['attack']}" in gallery:
            keys.setdefault(e["model"], {})[e["attack"]] = f"{e['model']}__{e['attack']}"
    model = next((m for m in roles if m in keys), None)
    if model is None:
        return None
    attacks = keys[model]
    n = min(PERTURBED_IMAGES, len(gallery["clean"]))
    clean, labels = gallery["clean"][:n].astype(np.float64), gallery["label"][:n]
    deltas = {a: gallery[f"adversarial__{key}"][:n] - clean for a, key in attacks.items()}
    norms = {a: perturbation_norms(d) for a, d in deltas.items()}
    factor = _round_factor(0.5 / max(1e-6, statistics.median(float(x) for _, linf in norms.values() for x in linf)))

    columns = 1 + len(attacks)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.0)
    figure = Figure(figsize=(1.5 * columns + 0.75, 2 * n * 1.62 + 0.55), layout=layout)
    axes = figure.subplots(2 * n, columns, squeeze=False)
    for i in range(n):
        upper, lower = axes[2 * i], axes[2 * i + 1]
        plots.show_image(upper[0], clean[i])
        upper[0].set_title(f"is {int(labels[i])}", fontsize=9, pad=3)
        lower[0].set_axis_off()
        lower[0].text(
            0.98, 0.5, f"perturbation\n× {factor:g}", transform=lower[0].transAxes, ha="right", va="center", fontsize=9
        )
        for j, (attack, key) in enumerate(attacks.items(), start=1):
            plots.show_image(upper[j], gallery[f"adversarial__{key}"][i])
            text, colour = plots.verdict(int(gallery[f"prediction__{key}"][i]), int(labels[i]))
            upper[j].set_title(text, fontsize=9, pad=3, color=colour)
            plots.line_spines(upper[j], 1.4, colour)
            plots.show_image(lower[j], 0.5 + factor * deltas[attack][i])
            l2, linf = norms[attack]
            lower[j].set_xlabel(f"L2 {l2[i]:.3g} · Linf {linf[i]:.3g}", fontsize=8, labelpad=2)
    for axis, head in zip(axes[0], ("clean", *map(attack_text, attacks)), strict=True):
        text = head.replace(", ", "\n", 1)
        axis.text(0.5, 1.12, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=9)
    mean_l2 = {attack: float(l2.mean()) for attack, (l2, _) in norms.items()}
    order = sorted(mean_l2, key=lambda a: -mean_l2[a])
    said = "; ".join(f"{attack_text(a)}: {mean_l2[a]:.3g}" for a in order)
    early = [a.partition(":")[0].upper() for a in attacks if _leaves_early(a)]
    caption = (
        f"White-box examples made on {model} (✓ still right, ✗ wrong), each above its perturbation × {factor:g} (mid-grey is 0, "
        f"the same factor throughout, clipped to the range of images) and that perturbation's norms, images in [0,1]. The first "
        f'{n} test images; these are illustrations, not a sample to conclude from. Paper, sec. 4.4, on ImageNet: "One can clearly '
        f'see that BIM attack is more visible." Mean L2 norm over the images shown here, largest first: {said}.'
    )
    if early:
        caption += f" {', '.join(dict.fromkeys(early))}: every image is left at the first step that fools the model."
    return "Figure 5: adversarial examples and their perturbations", caption, plots.png(figure)


def perturbation_norms(deltas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L2 and Linf norms, float64 [n] each, of perturbations [n,C,H,W]."""
    flat = np.asarray(deltas, dtype=np.float64).reshape(len(deltas), -1)
    return np.sqrt((flat**2).sum(1)), np.abs(flat).max(1)


def _round_factor(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is not above ``value``, at least 1."""
    if value < 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * max(step for step in (1, 2, 5) if step * power <= value)


def _parsed(attack: str) -> AttackSpec | None:
    try:
        return AttackSpec.parse(attack)
    except ConfigError:  # "none", or an attack of another version
        return None


def _leaves_early(attack: str) -> bool:
    spec = _parsed(attack)
    return spec is not None and spec.can_leave_early


# -- figure 6 --------------------------------------------------------------------------------------------------------------


def fig6(stored: Mapping[str, np.ndarray], roles: Mapping[str, str]) -> Picture | None:
    """Clean images and adversarial ones, each above its reconstruction, for every model with an auto-encoder."""
    models = [m for m in roles if f"fig6__adversarial__{m}" in stored]
    if not models:
        return None
    attack = attack_text(str(stored["fig6__attack"]))
    clean, labels = stored["fig6__clean"], stored["fig6__label"]
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = [("clean", clean, None)]
    distances = []
    for model in models:
        adversarial = stored[f"fig6__adversarial__{model}"]
        of_clean = stored[f"fig6__reconstruction_clean__{model}"]
        of_adversarial = stored[f"fig6__reconstruction_adversarial__{model}"]
        name = f"{model}: " if len(models) > 1 else ""
        rows += [
            (f"{name}clean,\nreconstructed", of_clean, None),
            (f"{name}{attack.replace(', ', ',' + chr(10), 1)}", adversarial, stored[f"fig6__prediction__{model}"]),
            (f"{name}{attack.partition(',')[0]},\nreconstructed", of_adversarial, None),
        ]
        before, after = (float(perturbation_norms(x - clean)[0].mean()) for x in (adversarial, of_adversarial))
        distances.append(f"{model}: {before:.2f} before, {after:.2f} after the auto-encoder")
    caption = (
        f"The first {len(labels)} test images, and what the auto-encoder (level 0) makes of them and of their white-box examples, "
        f"{attack}; ✓ the classifier is still right, ✗ wrong. The classifier does not see reconstructions. Paper, sec. 4.5: they "
        f'"are much cleaner than the adversarial images". Mean L2 distance from the clean image over the adversarial images '
        f"shown: {'; '.join(distances)}."
    )
    heading = "Figure 6: clean and adversarial images and their reconstructions"
    return heading, caption, plots.image_rows(rows, labels)


# -- figure 7 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Point:
    """Accuracy at one eps as fractions: mean, least and greatest over the seeds, and their outermost Wilson bounds."""

    eps: float
    mean: float
    least: float
    greatest: float
    low: float
    high: float
    seeds: int


def accuracy_over_eps(record: Mapping[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Threat model -> model as named in the recipe -> a point per eps of FGSM, rising; eps 0 are the clean images."""
    cells = by_seed(record)
    out: dict[str, dict[str, list[Point]]] = {}
    for (model, threat, attack), replicates in cells.items():
        spec = _parsed(attack)
        if spec is not None and spec.short_name == "fgsm" and spec.eps is not None:
            out.setdefault(threat, {}).setdefault(model, []).append(_point(spec.eps, list(replicates.values())))
    for models in out.values():
        for model, points in models.items():
            if (clean := cells.get((model, "clean", "none"))) is not None:
                points.append(_point(0.0, list(clean.values())))
            points.sort(key=lambda p: p.eps)
    return out


def _point(eps: float, evaluations: Sequence[Mapping[str, Any]]) -> Point:
    metrics = [e["metrics"] for e in evaluations]
    accuracies = [m["accuracy"] for m in metrics]
    return Point(
        eps=eps,
        mean=statistics.fmean(accuracies),
        least=min(accuracies),
        greatest=max(accuracies),
        low=min(m["accuracy_low"] for m in metrics),
        high=max(m["accuracy_high"] for m in metrics),
        seeds=len(metrics),
    )


def eps_at(points: Sequence[Point], accuracy: float) -> float | None:
    """The smallest eps at which the mean accuracy, between points a straight line, is down to ``accuracy``; None: nowhere."""
    for i, point in enumerate(points):
        if point.mean <= accuracy:
            if i == 0:
                return point.eps
            before = points[i - 1]
            return before.eps + (point.eps - before.eps) * (before.mean - accuracy) / (before.mean - point.mean)
    return None


def fig7(record: Mapping[str, Any], roles: Mapping[str, str]) -> Picture | None:
    """Accuracy against FGSM's eps, a panel per threat model; None where the run has no FGSM yet."""
    panels = accuracy_over_eps(record)
    if not panels:
        return None
    replicates = experiment_of(record).replicates()
    base_roles = {replicates[name][0]: role for name, role in roles.items()}
    styles = plots.styles(base_roles)
    drawn = [m for m in base_roles if any(m in models for models in panels.values())]
    figure, axes = plots.grid(len(panels), columns=min(2, len(panels)), width=5.2, height=3.7)
    seeds = max(p.seeds for models in panels.values() for points in models.values() for p in points)
    for axis, (threat, models) in zip(axes, panels.items(), strict=True):
        end = max(p.eps for points in models.values() for p in points)
        for j, model in enumerate(m for m in drawn if m in models):
            points, style = models[model], styles[model]
            # whiskers beside one another
            x = np.array([p.eps for p in points])
            shift = (j - (len(models) - 1) / 2) * 0.006 * end
            y = 100 * np.array([p.mean for p in points])
            bounds = [
                np.maximum(0, y - 100 * np.array([p.low for p in points])),
                np.maximum(0, 100 * np.array([p.high for p in points]) - y),
            ]
            if seeds > 1:
                least, greatest = (100 * np.array([getattr(p, k) for p in points]) for k in ("least", "greatest"))
                axis.fill_between(x, least, greatest, color=style["color"], alpha=0.22, linewidth=0)
            axis.errorbar(x + shift, y, bounds, fmt="none", ecolor=style["color"], elinewidth=0.9, capsize=2)
            axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, **style)
        axis.set(title=threat_title(threat), xlabel="eps of FGSM (Linf, [0,1] pixels)", ylabel="accuracy (%)")
        axis.set(ylim=(0, 103), xlim=(-0.03 * end, 1.03 * end))
        axis.xaxis.set_major_locator(MaxNLocator(11))
    handles = [
        Line2D([], [], marker="o", markersize=3.5, label=plots.legend(m, base_roles), **styles[m]) for m in drawn
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return (
        "Figure 7: accuracy against the eps of FGSM",
        _fig7_caption(record, panels, seeds),
        plots.png(figure),
    )


def _fig7_caption(record: Mapping[str, Any], panels: Mapping[str, Mapping[str, Sequence[Point]]], seeds: int) -> str:
    sizes = sorted({e["n"] for e in record["evaluations"] if e["attack"].partition(":")[0] == "fgsm"})
    counted = f"n = {sizes[0]:,}" if len(sizes) == 1 else f"n = {sizes[0]:,} to {sizes[-1]:,}"
    what = (
        f"lines: mean of up to {seeds} seeds; bands: least to greatest; whiskers: the outermost 95 % Wilson bounds of any seed"
        if seeds > 1
        else "whiskers: 95 % Wilson interval, of the choice of images only"
    )
    halves = []
    for threat, models in panels.items():
        found = {model: eps_at(points, 0.5) for model, points in models.items()}
        said = ", ".join(
            f"{model} {eps:.2f}" if eps is not None else f"{model} not within these eps" for model, eps in found.items()
        )
        halves.append(f"{threat_title(threat)}: {said}")
    return (
        f'{counted} test images; {what}; eps 0: clean images. Paper, sec. 4.5, MNIST: with Defend++ "the baseline curve is '
        'substantially shifted to the right", and the attacker "has to almost double the distortion budget". Here accuracy is '
        f"down to 50 % at an eps of (straight lines between the points): {'; '.join(halves)}. An eps of 0.5 is enough to "
        "make any image one uniform grey: from there on, accuracy says little about a defense."
    )


# -- figure 8 --------------------------------------------------------------------------------------------------------------


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
            median=float(np.median(finite)) if len(finite) >= comparison.MIN_FOR_MEDIAN else math.nan,
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
    looks = plots.styles({bases[m]: role for m, role in roles.items()})
    figure, axes = plots.grid(len(models), columns=min(3, len(models)), width=4.6, height=3.3)
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
    return "Figure 8: is the reconstruction nearer to the clean or to the attacked image?", caption, plots.png(figure)


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "none of none"
