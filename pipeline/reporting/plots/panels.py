"""What the plots of a run show, taken from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.threat_models import CLEAN, RANDOM, TRANSFER, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord
from pipeline.reporting import cells, headline, labels, over_seeds, results
from pipeline.reporting.plots import charts, confusion
from pipeline.reporting.plots.worst import Quartiles

Arrays = Mapping[str, np.ndarray]
UNLEARNED = 0.5
"""Share of the error of a uniform grey image from which on a reconstruction looks like noise."""
MAX_CONFUSIONS = 6
"""Most models whose confusions are drawn."""


def bar_panels(record: RunRecord) -> charts.Panels:
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


def curve_panels(record: RunRecord, *, transferred: bool) -> dict[str, dict[str, Mapping[str, Any]]]:
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


def gallery_rows(record: RunRecord, gallery: Arrays) -> dict[str, list[tuple[str, str]]]:
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


def zero_columns(panels: charts.Panels) -> tuple[charts.Panels, list[str]]:
    """Leave out the attacks that leave no image of any model, and return their names too."""
    zero = [
        (title, label)
        for title, groups in panels.items()
        for label, bars in groups.items()
        if len(bars) > 0 and all(bar.accuracy == 0 for bar in bars.values())
    ]
    rest = {
        title: kept
        for title, groups in panels.items()
        if (kept := {label: bars for label, bars in groups.items() if (title, label) not in zero})
    }
    return rest, [f"{title} {label.replace(chr(10), ', ')}" for title, label in zero]


def norm_panels(record: RunRecord, models: Sequence[str]) -> dict[str, tuple[str, dict[str, Quartiles]]]:
    """Return title -> (norm, model -> quartiles) of the white-box attacks that minimise a norm."""
    panels: dict[str, tuple[str, dict[str, Quartiles]]] = {}
    for e in record.evaluations:
        metrics = over_seeds.shown_metrics(e)
        norm = metrics["norm"]
        if e.threat_model == WHITE_BOX and e.model in models and norm and metrics.get(f"{norm}_median") is not None:
            low, median, high = (metrics[f"{norm}_{q}"] for q in ("q25", "median", "q75"))
            _, rows = panels.setdefault(labels.attack_text(e.attack), (norm, {}))
            rows[e.model] = Quartiles(low=low, median=median, high=high, broken=metrics["broken"])
    return panels


def worst_rows(record: RunRecord) -> tuple[str, dict[str, tuple[charts.Bar, charts.Bar | None]]]:
    """Return the title of the main budget, and model -> (worst case, clean), as named in the recipe.

    Several seeds have their mean, with the lowest and the highest. Records of early revisions have
    no worst case: their most harmful white-box attack within a budget stands for it.
    """
    budget = headline.main_budget(record)
    worst: dict[str, list[charts.Bar]] = {}
    clean: dict[str, list[charts.Bar]] = {}
    if budget is not None:
        title = f"worst case per sample at {labels.budget_text(*budget)}, examples made on the model itself"
        for w in record.worst_case or ():
            if (w.threat_model, w.norm, w.eps) == (WHITE_BOX, *budget):
                bar = charts.Bar(accuracy=w.accuracy, low=w.accuracy_low, high=w.accuracy_high)
                worst.setdefault(record.bases[w.model], []).append(bar)
    else:
        title = "the most harmful white-box attack within a budget"
        for model in record.roles:
            if (e := headline.most_harmful(record, model)) is not None:
                worst.setdefault(record.bases[model], []).append(_bar(e))
    for e in record.evaluations:
        if e.threat_model == CLEAN:
            clean.setdefault(record.bases[e.model], []).append(_bar(e))
    rows = {
        model: (charts.mean_bar(bars), charts.mean_bar(clean[model]) if model in clean else None)
        for model, bars in worst.items()
    }
    return title, rows


def _bar(evaluation: EvaluationEntry) -> charts.Bar:
    low, high = evaluation.interval
    return charts.Bar(accuracy=evaluation.accuracy, low=low, high=high)


def _confused(record: RunRecord) -> dict[str, EvaluationEntry]:
    """Return model -> its main attack, the most harmful white-box one within a budget."""
    models = sorted(record.first_replicates, key=lambda m: record.roles[m] not in ("defended", "given"))
    attacks = {model: e for model in models if (e := headline.most_harmful(record, model)) is not None}
    chosen = list(attacks)[:MAX_CONFUSIONS]
    return {model: attacks[model] for model in record.first_replicates if model in chosen}


def judged_paths(record: RunRecord) -> list[str]:
    """Return the paths of the evaluations whose predictions the plots show."""
    attacks = _confused(record).values()
    first = record.first_replicates
    shown = [*attacks, *(e for e in record.evaluations if e.threat_model == CLEAN and e.model in first)]
    return list(dict.fromkeys(e.path for e in shown if e.path))


def confusions(record: RunRecord, judged: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """Return title -> counts [true class, predicted class]: clean, then under the main attack.

    Args:
        judged: path of an evaluation -> its columns.
    """
    classes = record.experiment.data.num_classes
    tables: dict[str, np.ndarray] = {}
    for model, e in _confused(record).items():
        if (columns := judged.get(str(e.path))) is not None:
            attack = labels.attack_title(e.attack)[0]
            for shown, key in (("clean", "clean_prediction"), (attack, "adversarial_prediction")):
                tables[f"{model}, {shown}"] = confusion.counts(columns["label"], columns[key], classes)
    return tables


def clean_predictions(record: RunRecord, model: str, judged: Mapping[str, Arrays]) -> np.ndarray | None:
    """Return the classes that a model predicts for the clean test images, in their order."""
    paths = (str(e.path) for e in record.evaluations if (e.model, e.threat_model) == (model, CLEAN))
    return next((judged[path]["clean_prediction"] for path in paths if path in judged), None)


def reconstruction_note(record: RunRecord, gallery: Arrays) -> str:
    """Say which reconstructions look like noise because they were hardly learned; "" if none does."""
    notes = []
    for model in record.first_replicates:
        shares = {m: share for m, share in _error_shares(gallery, model).items() if share >= UNLEARNED}
        if not shares:
            continue
        train = record.model_config(model)
        levels = " and ".join(map(str, shares))
        errors = " and ".join(f"{100 * share:.0f} %" for share in shares.values())
        several = len(shares) > 1
        subject, they, their = (
            (f"Levels {levels} of {model} look", "they are", "their errors are")
            if several
            else (f"Level {levels} of {model} looks", "it is", "its error is")
        )
        notes.append(
            f"{subject} like noise because {they} hardly learned after {train['epochs']} epochs at lambda "
            f"{train['lam']:g}: {their} {errors} of that of a uniform grey image."
        )
    return " ".join(notes)


def _error_shares(gallery: Arrays, model: str) -> dict[int, float]:
    """Return level -> squared error of a model's reconstruction, as a share of a uniform grey image's."""
    shares = {}
    for key, reconstruction in gallery.items():
        head, _, name = key.partition("__")
        if name != model or not head.startswith("reconstruction_"):
            continue
        level = int(head.removeprefix("reconstruction_"))
        target = gallery["clean"] if level == 0 else gallery[f"level_{level}"]
        grey = float(target.var(axis=(1, 2, 3)).mean())
        shares[level] = float(((reconstruction - target) ** 2).mean()) / max(grey, 1e-12)
    return dict(sorted(shares.items()))
