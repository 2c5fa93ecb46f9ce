"""The plots of a run, in the order of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeVar

from components.config import roles
from pipeline.records import RunRecord
from pipeline.reporting import labels, sentences, verdicts
from pipeline.reporting.figures.fig2 import fig2
from pipeline.reporting.figures.fig5 import fig5
from pipeline.reporting.figures.fig6 import fig6
from pipeline.reporting.figures.fig7 import fig7
from pipeline.reporting.figures.fig8 import fig8
from pipeline.reporting.plots import budgets, charts, confusion, images, panels, style, worst
from pipeline.reporting.plots.panels import Arrays
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.plots.svg import settings

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunPlots:
    """The plots of a run. A method per plot returns None if the run has no data for it."""

    HEADLINE: ClassVar[str] = "worst-case"
    """Name of the plot beside the verdict."""
    record: RunRecord
    gallery: Arrays
    """The arrays of ``gallery.npz``."""
    histories: charts.Histories
    arrays: Arrays
    """The arrays of ``figures.npz``."""
    judged: Mapping[str, Arrays] = field(default_factory=dict)
    """Path of an evaluation -> its columns, as far as its files are there."""

    def draw(self) -> dict[str, Plot]:
        """Return every plot that the run has data for, by name; the paper's figures come first."""
        with settings():
            plots: dict[str, Plot | None] = {
                self.HEADLINE: self.worst_case(),
                **self.figures(),
                "accuracy": self.accuracy(),
                "norms": self.norms(),
                "budgets": self.budgets(),
                "curves": self.curves(),
                "curves-transfer": self.transferred_curves(),
                "transfer": self.transfer(),
                "confusion": self.confusion(),
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

    @cached_property
    def base_styles(self) -> style.Styles:
        """Colours and lines of the models as named in the recipe: those of their first replicates."""
        return {self.record.bases[name]: self.styles[name] for name in self.record.first_replicates}

    @cached_property
    def base_roles(self) -> dict[str, str]:
        """Role of the models as named in the recipe."""
        return {self.record.bases[name]: role for name, role in self.record.roles.items()}

    def worst_case(self) -> Plot | None:
        """Draw what the worst case leaves of each model, beside its accuracy on clean images."""
        title, rows = panels.worst_rows(self.record)
        if not rows:
            return None
        seeds = self.record.experiment.seeds
        mean = f" Mean of {seeds} seeds, lowest to highest." if seeds > 1 else ""
        caption = f"Accuracy in %, {labels.counted(self.record)}: {title}.{mean}"
        whiskers = "lowest to highest seed" if seeds > 1 else "95 % interval"
        return Plot("What an attack leaves", caption, worst.worst_case(rows, self.base_styles, whiskers))

    def accuracy(self) -> Plot | None:
        """Draw bars of every accuracy, a panel per threat model."""
        bars, zero = panels.zero_columns(panels.bar_panels(self.record))
        if not bars:
            return None
        role, styles = self.record.roles, self.styles
        whiskers = "Whiskers: 95 % Wilson interval."
        if len(role) > style.MANY_BARS and len(self.base_roles) < len(role):
            whiskers = "Bars: mean over the seeds. Whiskers: lowest and highest accuracy of a seed."
            bars = charts.over_replicates(bars, self.record.bases)
            role, styles = self.base_roles, self.base_styles
        gaps = ""
        if any(models.keys() < role.keys() for groups in bars.values() for models in groups.values()):
            gaps = " A missing bar is 0 % if it has a whisker or a 0; else it was not measured."
            if len(role) > style.MANY_BARS:
                gaps = " A dash: not measured."
        none = f" Not drawn, because they leave no image: {'; '.join(zero)}." if zero else ""
        caption = self._with_note(f"Accuracy in %, {labels.counted(self.record)}. {whiskers}{gaps}{none}")
        return Plot("Accuracy by threat model", caption, charts.bars(bars, role, styles))

    def norms(self) -> Plot | None:
        """Draw the median norms of the white-box attacks that minimise a norm."""
        few, note = self._first_of_many(list(self.record.roles))
        medians = panels.norm_panels(self.record, few)
        if not medians:
            return None
        caption = (
            "Minimal-norm attacks break nearly every image, so the size of the perturbation tells models apart: the "
            "median over the broken images, how many they are, and a line from the lower to the upper quartile. "
            f"A larger norm is a more robust model.{note}"
        )
        return Plot("How large a perturbation must be", caption, worst.norms(medians, self.styles))

    def budgets(self) -> Plot | None:
        """Draw accuracy over eps, where an attack was measured at two budgets or more."""
        measured = budgets.over_budgets(self.record)
        if not measured:
            return None
        whiskers = "95 % Wilson intervals"
        if self.record.experiment.seeds > 1:
            whiskers = "the outermost 95 % Wilson bounds of any seed, in the worst case lowest to highest"
        caption = (
            f"Each mark is a measured budget; the lines only join them. At eps 0: clean images. Whiskers: {whiskers}."
        )
        figure = budgets.draw(measured, self.base_roles, self.base_styles)
        return Plot("Accuracy over the budget", self._with_note(caption), figure)

    def confusion(self) -> Plot | None:
        """Draw which class becomes which, clean and under the main attack."""
        tables = panels.confusions(self.record, self.judged)
        if not tables or self.record.experiment.data.num_classes > confusion.MAX_CLASSES:
            return None
        errors = [
            f"{title}: {error[0]} becomes {error[1]} ({error[2]} of {table.sum()})"
            for title, table in tables.items()
            if (error := confusion.most_frequent(table)) is not None
        ]
        caption = (
            "Number of test images by true class (rows) and predicted class (columns); the shade is the share of the "
            f"true class. The diagonal is right. Most frequent errors: {'; '.join(errors) or 'none'}."
        )
        return Plot(
            "Which class becomes which", self._with_note(caption), confusion.draw(tables, columns=min(4, len(tables)))
        )

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
        curves = panels.curve_panels(self.record, transferred=transferred)
        if not curves:
            return None
        drawn = [name for name in self.record.roles if any(name in models for models in curves.values())]
        few, note = self._first_of_many(drawn)
        chosen = {title: kept for title, models in curves.items() if (kept := _only(models, few))}
        figure = charts.curves(chosen, self.record.roles, self.styles)
        return Plot(heading, self._with_note(caption + note), figure)

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
        return Plot("Transfer from model to model", self._with_note(caption), figure)

    def adversarial(self) -> dict[str, Plot]:
        """Draw the white-box examples of each model, a plot per model."""
        if not self.gallery:
            return {}
        plots = {}
        for model, rows in panels.gallery_rows(self.record, self.gallery).items():
            clean = panels.clean_predictions(self.record, model, self.judged)
            figure, factor = images.adversarial(self.gallery, rows, clean)
            caption = (
                "Above each image: the predicted class, ✓ if it is right, ✗ if it is wrong. Below each example: its "
                f"difference from the clean image, × {factor:g} (mid-grey is 0), and the norms of the difference."
            )
            plots[f"adversarial-{model}"] = Plot(f"White-box examples of {model}", caption, figure)
        return plots

    def reconstructions(self) -> Plot | None:
        """Draw targets and reconstructions of the auto-encoders."""
        if not any(key.startswith("reconstruction_") for key in self.gallery):
            return None
        # gallery.npz holds only the first replicate.
        note = "" if len(self.record.first_replicates) == len(self.record.roles) else " Of several seeds, the first."
        caption = f"Clean images, the low-pass targets of each level, and the auto-encoders' reconstructions.{note}"
        if unlearned := panels.reconstruction_note(self.record, self.gallery):
            caption += f" {unlearned}"
        figure = images.reconstructions(self.gallery, list(self.record.roles))
        return Plot("Targets and reconstructions", caption, figure)

    def losses(self) -> Plot | None:
        """Draw the training losses of each model."""
        trained, note = self._trained()
        if not trained:
            return None
        caption = (
            "Thin: each step. Thick: the mean of its neighbourhood. The vertical axis is logarithmic. The background "
            f"shows the phase of the schedule.{note}"
        )
        return Plot("Training losses", caption, charts.losses(trained))

    def validation(self) -> Plot | None:
        """Draw the validation accuracy of each model after each epoch."""
        trained, note = self._trained()
        epochs = (epoch for model in trained.values() for epoch in model)
        if not any(epoch.get("validation", {}).get("accuracy") is not None for epoch in epochs):
            return None
        caption = f"Clean images that were held out of the training set.{note}"
        figure = charts.validation(trained, self.record.roles, self.styles)
        return Plot("Validation accuracy", caption, figure)

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
