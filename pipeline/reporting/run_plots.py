"""The plots of a run, in the order of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.config import roles
from components.config.roles import roles_of
from pipeline.reporting import cells, labels, results, sentences, verdicts
from pipeline.reporting.figures import draw
from pipeline.reporting.plots import charts, images, style
from pipeline.reporting.records import experiment_of


def draw_pictures(
    record: Mapping[str, Any],
    gallery: Mapping[str, np.ndarray],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    stored: Mapping[str, np.ndarray],
) -> dict[str, tuple[str, str, bytes]]:
    """Name -> (heading, caption, PNG) of every plot that there is data for; the paper's figures first."""
    role = roles_of(experiment_of(record))
    bases = experiment_of(record).base_names()
    looks = style.styles(role, bases)
    out = draw.draw(record, gallery, stored, role)
    if panels := _bar_panels(record):
        what, drawn, drawn_roles, drawn_looks = "whiskers: 95 % Wilson interval", panels, role, looks
        if len(role) > style.MANY_BARS and len(set(bases.values())) < len(role):
            what = "bars: mean over the seeds; whiskers: from the least to the greatest of them"
            drawn, drawn_roles = charts.over_replicates(panels, bases), {bases[name]: r for name, r in role.items()}
            drawn_looks = {bases[name]: looks[name] for name in roles.first_replicates(role, bases)}
        lacking = ""
        if any(bars.keys() < drawn_roles.keys() for groups in drawn.values() for bars in groups.values()):
            lacking = " A missing bar is 0 % where it has a whisker or a 0, and not measured where it has none."
            if len(drawn_roles) > style.MANY_BARS:
                lacking = " A dash: not measured."
        out["accuracy"] = (
            "Accuracy by threat model",
            f"{labels.counted(record)}; {what}.{lacking}",
            charts.bars(drawn, drawn_roles, drawn_looks),
        )
    for key, heading, caption, transferred in (
        (
            "curves",
            "Accuracy over the norm of the perturbation",
            "Minimal-norm attacks: what is left when only examples up to that norm count. At any norm, nothing is left of a "
            "differentiable network attacked white-box; what differs is how far that is.",
            False,
        ),
        (
            "curves-transfer",
            "Accuracy over the norm, examples of other models",
            "The same, of examples that were made on another model: where a curve stays high, they do not carry over.",
            True,
        ),
    ):
        if panels_by_norm := _curve_panels(record, transferred=transferred):
            few, note = _first_of_many([m for m in role if any(m in c for c in panels_by_norm.values())], bases)
            chosen = {t: kept for t, models in panels_by_norm.items() if (kept := _only(models, few))}
            out[key] = heading, caption + note, charts.curves(chosen, role, looks)
    if matrices := verdicts.transfer_matrices(record):
        out["transfer"] = (
            "Transfer from model to model",
            f"Accuracy in %, {labels.counted(record)}: examples made on the model of the row, judged by the one of the column. On the diagonal "
            "they are white-box.",
            charts.heat_maps(matrices),
        )
    if note := sentences.untrusted_note(record):
        for name in out.keys() & {"accuracy", "curves", "curves-transfer", "transfer"}:
            heading, caption, png = out[name]
            out[name] = heading, f"{caption} {note}", png
    if gallery:
        # of the first replicate, which gallery.npz has alone
        first = roles.first_replicates(role, bases)
        said = "" if len(first) == len(role) else " Of several seeds, the first."
        rows = _gallery_rows(record, gallery)
        for model, entries in rows.items():
            out[f"adversarial-{model}"] = (
                f"White-box examples of {model}",
                "Each with what the model takes it for; ✓ still right, ✗ wrong.",
                images.adversarial(gallery, entries),
            )
        if any(k.startswith("reconstruction_") for k in gallery):
            out["reconstructions"] = (
                "Targets and reconstructions",
                f"Clean images, the low-pass targets of each level, and what the auto-encoders make of them.{said}",
                images.reconstructions(gallery, list(role)),
            )
    trained = {name: epochs for name, epochs in histories.items() if epochs}
    few, note = _first_of_many(list(trained), bases)
    trained = _only(trained, few)
    if trained:
        out["losses"] = (
            "Training losses",
            f"Logarithmic; the phase of the schedule behind them.{note}",
            charts.losses(trained),
        )
    if any(e.get("validation", {}).get("accuracy") is not None for epochs in trained.values() for e in epochs):
        out["validation"] = (
            "Validation accuracy",
            f"Clean images held out of the training set.{note}",
            charts.validation(trained, role, looks),
        )
    return out


def _first_of_many(names: Sequence[str], bases: Mapping[str, str]) -> tuple[Sequence[str], str]:
    """The models that curves show, and what the caption says of it: of too many, the first replicate of each."""
    first = roles.first_replicates(names, bases)
    if len(names) <= style.MANY_LINES or len(first) == len(names):
        return names, ""
    return first, f" Of {len(names)} models, the first seed of each."


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _bar_panels(record: Mapping[str, Any]) -> dict[str, dict[str, dict[str, charts.Bar]]]:
    panels: dict[str, dict[str, dict[str, charts.Bar]]] = {}
    for column in results.table(record)["columns"]:
        # clean images and noise share a panel: both are without an attacker
        plain = column["threat_model"] in ("clean", "random")
        panel = panels.setdefault("no attacker" if plain else column["threat_title"], {})
        label = "clean" if column["threat_model"] == "clean" else "\n".join(cells.head(column)[1:])
        for e in record["evaluations"]:
            if (e["threat_model"], e["attack"]) == (column["threat_model"], column["attack"]):
                m = e["metrics"]
                bar = charts.Bar(accuracy=m["accuracy"], low=m["accuracy_low"], high=m["accuracy_high"])
                panel.setdefault(label, {})[e["model"]] = bar
    return panels


def _curve_panels(record: Mapping[str, Any], *, transferred: bool) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Title -> model -> curve, of what was made on other models or of the rest."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for threat in dict.fromkeys((*labels.THREATS, *(e["threat_model"] for e in record["evaluations"]))):
        if threat.startswith("transfer") != transferred:
            continue
        for e in record["evaluations"]:
            if e["threat_model"] == threat and (curve := e["metrics"].get("curve")):
                panels.setdefault(f"{labels.threat_title(threat)}:\n{labels.attack_text(e['attack'])}", {})[
                    e["model"]
                ] = curve
    return panels


def _gallery_rows(record: Mapping[str, Any], gallery: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, str]]]:
    """Model -> (label of a row, key in the gallery), in the order of the gallery."""
    out: dict[str, list[tuple[str, str]]] = {}
    specs = {e["attack"] for e in record["evaluations"]}
    titles = {**{labels.short_name(s): s for s in specs}, **{s: s for s in specs}}
    for model in sorted(roles_of(experiment_of(record)), key=len, reverse=True):  # a name may begin with another's
        prefix = f"adversarial__{model}__"
        taken = {key for entries in out.values() for _, key in entries}
        for name in gallery:
            key = name.removeprefix("adversarial__")
            if name.startswith(prefix) and key not in taken:
                title, settings = labels.attack_title(titles.get(name.removeprefix(prefix), name.removeprefix(prefix)))
                out.setdefault(model, []).append((f"white-box {title}\n{settings.replace(', ', chr(10))}".strip(), key))
    return {model: out[model] for model in roles_of(experiment_of(record)) if model in out}
