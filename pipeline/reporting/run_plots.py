"""The plots of a run, in the order of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from components.config import roles
from components.threat_models import CLEAN, RANDOM, TRANSFER
from pipeline.records import RunRecord
from pipeline.reporting import cells, labels, results, sentences, verdicts
from pipeline.reporting.figures.fig2 import fig2
from pipeline.reporting.figures.fig5 import fig5
from pipeline.reporting.figures.fig6 import fig6
from pipeline.reporting.figures.fig7 import fig7
from pipeline.reporting.figures.fig8 import fig8
from pipeline.reporting.plots import charts, images, style
from pipeline.reporting.plots.style import Plot

Arrays = Mapping[str, np.ndarray]
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunPlots:
    """The plots of a run. A method per plot returns None if the run has no data for it."""

    record: RunRecord
    gallery: Arrays
    """The arrays of ``gallery.npz``."""
    histories: charts.Histories
    arrays: Arrays
    """The arrays of ``figures.npz``."""

    def draw(self) -> dict[str, Plot]:
        """Return every plot that the run has data for, by name; the paper's figures come first."""
        plots: dict[str, Plot | None] = {
            **self.figures(),
            "accuracy": self.accuracy(),
            "curves": self.curves(),
            "curves-transfer": self.transferred_curves(),
            "transfer": self.transfer(),
            **self.adversarial(),
            "reconstructions": self.reconstructions(),
            "losses": self.losses(),
            "validation": self.validation(),
        }
        return {name: plot for name, plot in plots.items() if plot is not None}

    def figures(self) -> dict[str, Plot | None]:
        """Draw the figures that the recipe asks for (``Experiment.figures``), in the paper's order."""
        record, gallery, arrays = self.record, self.gallery, self.arrays
        makers: dict[str, Callable[[], Plot | None]] = {
            "fig2": lambda: fig2(arrays),
            "fig5": lambda: fig5(record, gallery),
            "fig6": lambda: fig6(arrays, record.roles),
            "fig7": lambda: fig7(record),
            "fig8": lambda: fig8(arrays, record.roles, record.bases),
        }
        return {name: make() for name, make in makers.items() if name in record.experiment.figures}

    @cached_property
    def styles(self) -> style.Styles:
        """Colours and lines of all models, the same in every plot."""
        return style.styles(self.record.roles, self.record.bases)

    def accuracy(self) -> Plot | None:
        """Draw bars of every accuracy, a panel per threat model."""
        panels = _bar_panels(self.record)
        if not panels:
            return None
        role, bases = self.record.roles, self.record.bases
        styles = self.styles
        whiskers = "Whiskers: 95 % Wilson interval."
        if len(role) > style.MANY_BARS and len(set(bases.values())) < len(role):
            whiskers = "Bars: mean over the seeds. Whiskers: lowest and highest accuracy of a seed."
            panels = charts.over_replicates(panels, bases)
            styles = {bases[name]: styles[name] for name in self.record.first_replicates}
            role = {bases[name]: r for name, r in role.items()}
        gaps = ""
        if any(bars.keys() < role.keys() for groups in panels.values() for bars in groups.values()):
            gaps = " A missing bar is 0 % if it has a whisker or a 0; else it was not measured."
            if len(role) > style.MANY_BARS:
                gaps = " A dash: not measured."
        caption = self._with_note(f"Accuracy in %, {labels.counted(self.record)}. {whiskers}{gaps}")
        return Plot("Accuracy by threat model", caption, style.png(charts.bars(panels, role, styles)))

    def curves(self) -> Plot | None:
        """Draw accuracy over the norm, for examples that were made on the model itself."""
        caption = (
            "Minimal-norm attacks: the accuracy that is left if only examples up to that norm count. A white-box "
            "attack can break every image of a differentiable network at some norm. "
            "What differs is how large that norm is."
        )
        return self._curves("Accuracy over the norm of the perturbation", caption, transferred=False)

    def transferred_curves(self) -> Plot | None:
        """Draw accuracy over the norm, for examples that were made on other models."""
        caption = (
            "Minimal-norm attacks, with examples that were made on another model. Where a curve stays high, these "
            "examples do not carry over."
        )
        return self._curves("Accuracy over the norm, examples of other models", caption, transferred=True)

    def _curves(self, heading: str, caption: str, *, transferred: bool) -> Plot | None:
        panels = _curve_panels(self.record, transferred=transferred)
        if not panels:
            return None
        drawn = [name for name in self.record.roles if any(name in curves for curves in panels.values())]
        few, note = self._first_of_many(drawn)
        chosen = {title: curves for title, models in panels.items() if (curves := _only(models, few))}
        figure = charts.curves(chosen, self.record.roles, self.styles)
        return Plot(heading, self._with_note(caption + note), style.png(figure))

    def transfer(self) -> Plot | None:
        """Draw the accuracy by source and judging model of each transferred attack."""
        matrices = verdicts.transfer_matrices(self.record)
        if not matrices:
            return None
        caption = (
            f"Accuracy in %, {labels.counted(self.record)}. The examples were made on the model of the row and judged "
            "by the model of the column. On the diagonal they are white-box."
        )
        figure = charts.heat_maps(matrices)
        return Plot("Transfer from model to model", self._with_note(caption), style.png(figure))

    def adversarial(self) -> dict[str, Plot]:
        """Draw the white-box examples of each model, a plot per model."""
        if not self.gallery:
            return {}
        caption = "Above each example: the predicted class, ✓ if it is right, ✗ if it is wrong."
        return {
            f"adversarial-{model}": Plot(
                f"White-box examples of {model}", caption, style.png(images.adversarial(self.gallery, rows))
            )
            for model, rows in _gallery_rows(self.record, self.gallery).items()
        }

    def reconstructions(self) -> Plot | None:
        """Draw targets and reconstructions of the auto-encoders."""
        if not any(key.startswith("reconstruction_") for key in self.gallery):
            return None
        # gallery.npz holds only the first replicate.
        note = "" if len(self.record.first_replicates) == len(self.record.roles) else " Of several seeds, the first."
        caption = f"Clean images, the low-pass targets of each level, and the auto-encoders' reconstructions.{note}"
        figure = images.reconstructions(self.gallery, list(self.record.roles))
        return Plot("Targets and reconstructions", caption, style.png(figure))

    def losses(self) -> Plot | None:
        """Draw the training losses of each model."""
        trained, note = self._trained()
        if not trained:
            return None
        caption = f"The vertical axis is logarithmic. The background shows the phase of the schedule.{note}"
        return Plot("Training losses", caption, style.png(charts.losses(trained)))

    def validation(self) -> Plot | None:
        """Draw the validation accuracy of each model after each epoch."""
        trained, note = self._trained()
        epochs = (epoch for model in trained.values() for epoch in model)
        if not any(epoch.get("validation", {}).get("accuracy") is not None for epoch in epochs):
            return None
        caption = f"Clean images that were held out of the training set.{note}"
        figure = charts.validation(trained, self.record.roles, self.styles)
        return Plot("Validation accuracy", caption, style.png(figure))

    def _trained(self) -> tuple[charts.Histories, str]:
        """Return the histories that curves show, and what the caption says about them."""
        trained = [name for name, epochs in self.histories.items() if epochs]
        few, note = self._first_of_many(trained)
        return _only(self.histories, few), note

    def _first_of_many(self, names: Sequence[str]) -> tuple[Sequence[str], str]:
        """Return the models that curves show, and what the caption says about them.

        If there are too many models, these are the first replicates.
        """
        first = roles.first_replicates(names, self.record.bases)
        if len(names) <= style.MANY_LINES or len(first) == len(names):
            return names, ""
        return first, f" Of {len(names)} models, the first seed of each."

    def _with_note(self, caption: str) -> str:
        """Return a caption with the footnote of untrusted attacks."""
        return " ".join(filter(None, [caption, sentences.untrusted_note(self.record)]))


def _only(values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name in names}


def _bar_panels(record: RunRecord) -> charts.Panels:
    panels: dict[str, dict[str, dict[str, charts.Bar]]] = {}
    for column in results.table(record)["columns"]:
        # Clean images and noise share a panel, because both are without an attacker.
        title = "no attacker" if column["threat_model"] in (CLEAN, RANDOM) else column["threat_title"]
        label = "clean" if column["threat_model"] == CLEAN else "\n".join(cells.head(column)[1:])
        panels.setdefault(title, {})[label] = {
            e.model: charts.Bar(accuracy=e.accuracy, low=e.interval[0], high=e.interval[1])
            for e in record.evaluations
            if (e.threat_model, e.attack) == (column["threat_model"], column["attack"])
        }
    return panels


def _curve_panels(record: RunRecord, *, transferred: bool) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return title -> model -> curve, of examples that were made on other models or of the rest."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for threat in dict.fromkeys((*labels.THREATS, *(e.threat_model for e in record.evaluations))):
        if threat.startswith(TRANSFER) != transferred:
            continue
        for e in record.evaluations:
            if e.threat_model == threat and e.curve:
                title = f"{labels.threat_title(threat)}:\n{labels.attack_text(e.attack)}"
                panels.setdefault(title, {})[e.model] = e.curve
    return panels


def _gallery_rows(record: RunRecord, gallery: Arrays) -> dict[str, list[tuple[str, str]]]:
    """Return model -> (label of a row, key in the gallery), in the order of the gallery."""
    rows: dict[str, list[tuple[str, str]]] = {}
    # Galleries of early revisions name an attack without its settings.
    specs = {labels.short_name(e.attack): e.attack for e in record.evaluations}
    examples = [name.removeprefix("adversarial__") for name in gallery if name.startswith("adversarial__")]
    for key in examples:
        # A model's name may begin with another's, so the longest one that fits is meant.
        matching = [model for model in record.roles if key.startswith(f"{model}__")]
        if matching:
            model = max(matching, key=len)
            attack = key.removeprefix(f"{model}__")
            title, settings = labels.attack_title(specs.get(attack, attack))
            label = f"white-box {title}\n{settings.replace(', ', chr(10))}".strip()
            rows.setdefault(model, []).append((label, key))
    return {model: rows[model] for model in record.roles if model in rows}
