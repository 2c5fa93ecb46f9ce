"""The pictures of a report: records in, PNG bytes out. The same records give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

UNDEFENDED = ("#6b7280", "#9ca3af", "#374151", "#b8bec8")
DEFENDED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe & Ito: told apart by colour-blind readers too. Undefended models are grey in every plot."""
RIGHT, WRONG = "#00795c", "#c2410c"
PHASE_COLOURS = {"joint": "#f2e9d8", "autoencoder": "#dcebf5", "classifier": "#ececec"}
PHASE_NAMES = {"joint": "joint", "autoencoder": "auto-encoder only", "classifier": "classifier only"}
LOSSES = {
    "loss": ("total", "#111827"),
    "loss_cls": ("classification", "#0072b2"),
    "loss_rec": ("reconstruction", "#d55e00"),
}
MAX_POINTS = 600
"""A curve has no more points than the eye can tell apart; each is the mean of the steps it stands for."""
MAX_IMAGES = 10


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An accuracy with its 95 % interval, as fractions."""

    accuracy: float
    low: float
    high: float


def colours(roles: Mapping[str, str]) -> dict[str, str]:
    """One colour per model, the same in every plot. ``roles``: model -> source, control or defended."""
    counts = {True: 0, False: 0}
    out = {}
    for model, role in roles.items():
        defended = role == "defended"
        palette = DEFENDED if defended else UNDEFENDED
        out[model] = palette[counts[defended] % len(palette)]
        counts[defended] += 1
    return out


def losses(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training losses over steps, a panel per model, the phase behind them. ``histories``: model -> epoch records."""
    figure, axes = _grid(len(histories), columns=min(3, len(histories)), width=4.3, height=3.2)
    phases: dict[str, None] = {}
    for axis, (model, epochs) in zip(axes, histories.items(), strict=False):
        steps = np.array([s["step"] for e in epochs for s in e["steps"]])
        for epoch in epochs:
            phases[epoch["phase"]] = None
            first, last = epoch["steps"][0]["step"], epoch["steps"][-1]["step"]
            axis.axvspan(first - 0.5, last + 0.5, color=PHASE_COLOURS[epoch["phase"]], linewidth=0)
        for key, (label, colour) in LOSSES.items():
            values = np.array([_number(s.get(key)) for e in epochs for s in e["steps"]])
            if key == "loss_cls" and np.array_equal(values, _total(epochs), equal_nan=True):
                continue  # no auto-encoder: the total says it already
            if np.isfinite(values).any() and np.nanmax(values) > 0:
                x, y = _thin(steps, values)
                axis.plot(x, y, color=colour, linewidth=1.2, label=label)
        axis.set(title=model, xlabel="step", ylabel="loss", yscale="log")
        axis.yaxis.set_major_formatter(_plain)
        if np.diff(np.log10(axis.get_ylim()))[0] < 1.5:  # else the powers of ten are enough
            axis.yaxis.set_minor_formatter(_plain)
        else:
            axis.yaxis.set_minor_formatter("")
        axis.margins(x=0)
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    shades = [Patch(color=PHASE_COLOURS[p], label=PHASE_NAMES[p]) for p in phases]
    figure.legend(
        [*handles.values(), *shades], [*handles, *(PHASE_NAMES[p] for p in phases)], loc="outside lower center", ncols=6
    )
    return _png(figure)


def validation(histories: Mapping[str, Sequence[Mapping[str, Any]]], roles: Mapping[str, str]) -> bytes:
    """Validation accuracy after each epoch, a line per model."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis = figure.add_subplot()
    palette = colours(roles)
    for model, epochs in histories.items():
        found = [(e["epoch"] + 1, e["validation"].get("accuracy")) for e in epochs if e.get("validation")]
        points = [(x, 100 * y) for x, y in found if y is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                color=palette[model],
                marker="o",
                markersize=3.5,
                label=_legend(model, roles),
            )
    axis.set(xlabel="epochs done", ylabel="validation accuracy (%), clean images")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _frame(axis)
    axis.legend(frameon=False)
    return _png(figure)


def bars(panels: Mapping[str, Mapping[str, Mapping[str, Bar]]], roles: Mapping[str, str]) -> bytes:
    """Accuracies with their intervals. ``panels``: title (a threat model) -> group label (an attack) -> model -> bar."""
    palette = colours(roles)
    widths = [max(1, len(groups)) for groups in panels.values()]
    per_row = 6
    rows: list[list[str]] = []
    used = per_row
    for title, width in zip(panels, widths, strict=True):
        if used + width > per_row:
            rows.append([])
            used = 0
        rows[-1].append(title)
        used += width
    figure = Figure(figsize=(11, 3.1 * len(rows) + 0.5), layout="constrained")
    sub = np.atleast_1d(np.asarray(figure.subfigures(len(rows), 1), dtype=object))
    for row, part in zip(rows, sub, strict=True):
        ratios = [max(1, len(panels[t])) for t in row]
        axes = np.atleast_1d(np.asarray(part.subplots(1, len(row), width_ratios=ratios), dtype=object))
        for title, axis in zip(row, axes, strict=True):
            _bar_panel(axis, title, panels[title], palette)
    handles = [Patch(color=palette[m], label=_legend(m, roles)) for m in roles]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def _bar_panel(axis: Axes, title: str, groups: Mapping[str, Mapping[str, Bar]], palette: Mapping[str, str]) -> None:
    width = 0.82 / max(1, len(palette))
    for i, models in enumerate(groups.values()):
        for j, model in enumerate(palette):
            if (bar := models.get(model)) is None:
                continue
            x = i + (j - (len(palette) - 1) / 2) * width
            y = 100 * bar.accuracy
            error = [[max(0.0, y - 100 * bar.low)], [max(0.0, 100 * bar.high - y)]]
            axis.bar(x, y, width * 0.92, color=palette[model])
            axis.errorbar(x, y, error, color="#111827", linewidth=0.9, capsize=2)
    axis.set(title=title, ylabel="accuracy (%)", ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_yticks(range(0, 101, 25))
    _frame(axis)
    axis.grid(axis="x", visible=False)


def curves(panels: Mapping[str, Mapping[str, Mapping[str, Any]]], roles: Mapping[str, str]) -> bytes:
    """Accuracy over the norm allowed. ``panels``: title -> model -> {norm, eps, accuracy}."""
    palette = colours(roles)
    figure, axes = _grid(len(panels), columns=min(3, len(panels)), width=4.2, height=3.3)
    for axis, (title, models) in zip(axes, panels.items(), strict=False):
        norm = next(iter(models.values()))["norm"]
        for model, curve in models.items():
            axis.plot(
                curve["eps"], 100 * np.array(curve["accuracy"]), color=palette[model], label=_legend(model, roles)
            )
        name = {"l2": "L2", "linf": "Linf"}.get(norm, norm)
        axis.set(
            title=title, xlabel=f"largest {name} norm allowed ([0,1] pixels)", ylabel="accuracy (%)", ylim=(0, 102)
        )
        # the tail, where nothing is left to break, would press the rest to the left
        ends = [
            next((e for e, a in zip(c["eps"], c["accuracy"], strict=True) if a <= 0.005), c["eps"][-1])
            for c in models.values()
        ]
        axis.set_xlim(0, 1.05 * max(ends) or 1.0)
        _frame(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def reconstructions(gallery: Mapping[str, np.ndarray], models: Sequence[str]) -> bytes:
    """Clean images, their low-pass targets and what each model reconstructs, level by level."""
    # level 0 has the image itself as its target
    levels = sorted({0, *(int(k.removeprefix("level_")) for k in gallery if k.startswith("level_"))})
    rows: list[tuple[str, np.ndarray]] = [(f"clean\n{_size(gallery['clean'])}", gallery["clean"])]
    for m in levels:
        if m > 0:
            rows.append((f"target of level {m}\n{_size(gallery[f'level_{m}'])}", gallery[f"level_{m}"]))
        for model in models:
            if (images := gallery.get(f"reconstruction_{m}__{model}")) is not None:
                rows.append((f"{model}: level {m}\n{_size(images)}", images))
    return _images([(label, images, None) for label, images in rows], gallery["label"])


def adversarial(gallery: Mapping[str, np.ndarray], rows: Sequence[tuple[str, str]]) -> bytes:
    """Clean images and the examples made of them. ``rows``: label and key after ``adversarial__``/``prediction__``."""
    out: list[tuple[str, np.ndarray, np.ndarray | None]] = [("clean", gallery["clean"], None)]
    for label, key in rows:
        predictions = gallery.get(f"prediction__{key}")
        out.append((label, gallery[f"adversarial__{key}"], predictions))
    return _images(out, gallery["label"])


def _images(rows: Sequence[tuple[str, np.ndarray, np.ndarray | None]], labels: np.ndarray) -> bytes:
    n = min(MAX_IMAGES, len(labels))
    height = 1.02 if any(predictions is not None for *_, predictions in rows) else 0.92  # room for a line of text
    figure = Figure(figsize=(1.9 + 0.88 * n, height * len(rows) + 0.25))
    axes = figure.subplots(len(rows), n, squeeze=False)
    left = 1.9 / (1.9 + 0.88 * n)
    figure.subplots_adjust(
        left=left,
        right=0.995,
        top=1 - 0.25 / (height * len(rows) + 0.25),
        bottom=0.01,
        wspace=0.08,
        hspace=height - 0.8,
    )
    for row, (title, images, predictions) in zip(axes, rows, strict=True):
        row[0].text(
            -0.12, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=8.5, linespacing=1.25
        )
        for i, axis in enumerate(row):
            image = np.clip(np.asarray(images[i], dtype=np.float32), 0, 1)
            if image.shape[0] == 1:
                axis.imshow(image[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(linewidth=0.5, color="#9ca3af")
            if predictions is not None:
                right = int(predictions[i]) == int(labels[i])
                colour = RIGHT if right else WRONG
                axis.set_title(f"{'✓' if right else '✗'} {int(predictions[i])}", fontsize=8.5, color=colour, pad=2)
                for spine in axis.spines.values():
                    spine.set(linewidth=1.4, color=colour)
            elif axis in axes[0]:
                axis.set_title(f"is {int(labels[i])}", fontsize=8.5, pad=2)
    return _png(figure)


def _grid(panels: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * max(columns, 2), height * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axis in axes:
        _frame(axis)
    return figure, axes


def _frame(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#d1d5db", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(10.5)


def _legend(model: str, roles: Mapping[str, str]) -> str:
    role = roles.get(model, model)
    return model if model == role else f"{model} ({role})"


def _size(images: np.ndarray) -> str:
    return f"{images.shape[-2]}×{images.shape[-1]}"


def _plain(value: float, _: float) -> str:
    """A tick of a logarithmic axis as people write it; only 1, 2 and 5 times a power of ten, which never touch."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _total(epochs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([_number(s.get("loss")) for e in epochs for s in e["steps"]])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return out.getvalue()
