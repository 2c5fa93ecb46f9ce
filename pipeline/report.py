"""The report of a run, from its records alone: tables, plots and one HTML file that opens from disk.

Rebuilt at any time from ``run.json`` and what it names (docs/records.md); the same records give the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline import comparison, figures, plots, records, tables
from pipeline.runtime.storage import Storage


def build(run: Storage, root: Storage) -> dict[str, str]:
    """Write ``report/`` of a run: report.html, table.json, table.csv, table.md and plots/*.png. A partial run gives a partial report.

    Args:
        run: the run directory. root: the storage it lies in.

    Returns:
        What was written, name -> path below the run directory; "html" is the report, "table_json", "table_csv", "table_md", and
        "plot_..." for each plot there was data for.

    Raises:
        DataError: a record is missing or corrupt; the message names it. StorageError: something could not be written.
    """
    record = records.read_run(run)
    gallery = records.read_gallery(run)
    histories = {
        name: [records.read_epoch(root, file) for file in records.history_files(root, model)]
        for name, model in record["models"].items()
    }
    data = _data(record, root)
    pictures = _pictures(record, gallery, histories, records.read_arrays(run, figures.FILE))
    paths = {
        "html": "report/report.html",
        "table_json": "report/table.json",
        "table_csv": "report/table.csv",
        "table_md": "report/table.md",
    }
    for name, (_, _, png) in pictures.items():
        paths[f"plot_{name}"] = f"report/plots/{name}.png"
        run.write_bytes(paths[f"plot_{name}"], png)
    run.write_json(paths["table_json"], data)
    run.write_bytes(paths["table_csv"], tables.to_csv(record).encode())
    run.write_bytes(paths["table_md"], f"# {record['name']}\n\n{tables.markdown(record)}\n".encode())
    html = _html(record, data, pictures, records.missing(record, gallery, histories, pictures))
    run.write_bytes(paths["html"], html.encode())  # last: its presence says that all of it is there
    return paths


def _data(record: Mapping[str, Any], root: Storage) -> dict[str, Any]:
    """Return what table.json holds: the result table, and what its evaluations say together."""
    return {
        **records.table(record),
        "worst_case": records.worst_cases(record),
        "worst_case_over_seeds": records.worst_over_seeds(record),
        "worst_case_pairs": records.worst_case_pairs(record),
        "flags": records.raised_flags(record),
        "near_chance": records.near_chance(record),
        "comparisons": records.comparisons(record, root),
        **records.across(record),
    }


def _pictures(
    record: Mapping[str, Any],
    gallery: Mapping[str, np.ndarray],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    stored: Mapping[str, np.ndarray],
) -> dict[str, tuple[str, str, bytes]]:
    """Name -> (heading, caption, PNG) of every plot that there is data for; the paper's figures first."""
    role = records.roles(record)
    bases = comparison.experiment_of(record).bases()
    looks = plots.styles(role, bases)
    out = figures.draw(record, gallery, stored, role)
    if panels := _bar_panels(record):
        what, drawn, drawn_roles, drawn_looks = "whiskers: 95 % Wilson interval", panels, role, looks
        if len(role) > plots.MANY_BARS and len(set(bases.values())) < len(role):
            what = "bars: mean over the seeds; whiskers: from the least to the greatest of them"
            drawn, drawn_roles = plots.over_replicates(panels, bases), {bases[name]: r for name, r in role.items()}
            drawn_looks = {bases[name]: looks[name] for name in plots.first_replicates(role, bases)}
        lacking = ""
        if any(bars.keys() < drawn_roles.keys() for groups in drawn.values() for bars in groups.values()):
            lacking = " A missing bar is 0 % where it has a whisker or a 0, and not measured where it has none."
            if len(drawn_roles) > plots.MANY_BARS:
                lacking = " A dash: not measured."
        out["accuracy"] = (
            "Accuracy by threat model",
            f"{records.counted(record)}; {what}.{lacking}",
            plots.bars(drawn, drawn_roles, drawn_looks),
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
            out[key] = heading, caption + note, plots.curves(chosen, role, looks)
    if matrices := records.transfer_matrices(record):
        out["transfer"] = (
            "Transfer from model to model",
            f"Accuracy in %, {records.counted(record)}: examples made on the model of the row, judged by the one of the column. On the diagonal "
            "they are white-box.",
            plots.heat_maps(matrices),
        )
    if note := records.untrusted_note(record):
        for name in out.keys() & {"accuracy", "curves", "curves-transfer", "transfer"}:
            heading, caption, png = out[name]
            out[name] = heading, f"{caption} {note}", png
    if gallery:
        # of the first replicate, which gallery.npz has alone
        first = plots.first_replicates(role, bases)
        said = "" if len(first) == len(role) else " Of several seeds, the first."
        rows = _gallery_rows(record, gallery)
        for model, entries in rows.items():
            out[f"adversarial-{model}"] = (
                f"White-box examples of {model}",
                "Each with what the model takes it for; ✓ still right, ✗ wrong.",
                plots.adversarial(gallery, entries),
            )
        if any(k.startswith("reconstruction_") for k in gallery):
            out["reconstructions"] = (
                "Targets and reconstructions",
                f"Clean images, the low-pass targets of each level, and what the auto-encoders make of them.{said}",
                plots.reconstructions(gallery, list(role)),
            )
    trained = {name: epochs for name, epochs in histories.items() if epochs}
    few, note = _first_of_many(list(trained), bases)
    trained = _only(trained, few)
    if trained:
        out["losses"] = (
            "Training losses",
            f"Logarithmic; the phase of the schedule behind them.{note}",
            plots.losses(trained),
        )
    if any(e.get("validation", {}).get("accuracy") is not None for epochs in trained.values() for e in epochs):
        out["validation"] = (
            "Validation accuracy",
            f"Clean images held out of the training set.{note}",
            plots.validation(trained, role, looks),
        )
    return out


def _first_of_many(names: Sequence[str], bases: Mapping[str, str]) -> tuple[Sequence[str], str]:
    """The models that curves show, and what the caption says of it: of too many, the first replicate of each."""
    first = plots.first_replicates(names, bases)
    if len(names) <= plots.MANY_LINES or len(first) == len(names):
        return names, ""
    return first, f" Of {len(names)} models, the first seed of each."


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _bar_panels(record: Mapping[str, Any]) -> dict[str, dict[str, dict[str, plots.Bar]]]:
    panels: dict[str, dict[str, dict[str, plots.Bar]]] = {}
    for column in records.table(record)["columns"]:
        # clean images and noise share a panel: both are without an attacker
        plain = column["threat_model"] in ("clean", "random")
        panel = panels.setdefault("no attacker" if plain else column["threat_title"], {})
        label = "clean" if column["threat_model"] == "clean" else "\n".join(tables.head(column)[1:])
        for e in record["evaluations"]:
            if (e["threat_model"], e["attack"]) == (column["threat_model"], column["attack"]):
                m = e["metrics"]
                bar = plots.Bar(accuracy=m["accuracy"], low=m["accuracy_low"], high=m["accuracy_high"])
                panel.setdefault(label, {})[e["model"]] = bar
    return panels


def _curve_panels(record: Mapping[str, Any], *, transferred: bool) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Title -> model -> curve, of what was made on other models or of the rest."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for threat in dict.fromkeys((*records.THREATS, *(e["threat_model"] for e in record["evaluations"]))):
        if threat.startswith("transfer") != transferred:
            continue
        for e in record["evaluations"]:
            if e["threat_model"] == threat and (curve := e["metrics"].get("curve")):
                panels.setdefault(f"{records.threat_title(threat)}:\n{records.attack_text(e['attack'])}", {})[
                    e["model"]
                ] = curve
    return panels


def _gallery_rows(record: Mapping[str, Any], gallery: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, str]]]:
    """Model -> (label of a row, key in the gallery), in the order of the gallery."""
    out: dict[str, list[tuple[str, str]]] = {}
    specs = {e["attack"] for e in record["evaluations"]}
    titles = {**{records.short_name(s): s for s in specs}, **{s: s for s in specs}}
    for model in sorted(records.roles(record), key=len, reverse=True):  # a name may begin with another's
        prefix = f"adversarial__{model}__"
        taken = {key for entries in out.values() for _, key in entries}
        for name in gallery:
            key = name.removeprefix("adversarial__")
            if name.startswith(prefix) and key not in taken:
                title, settings = records.attack_title(titles.get(name.removeprefix(prefix), name.removeprefix(prefix)))
                out.setdefault(model, []).append((f"white-box {title}\n{settings.replace(', ', chr(10))}".strip(), key))
    return {model: out[model] for model in records.roles(record) if model in out}


def _html(
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str, bytes]],
    lacking: Sequence[str],
) -> str:
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=records.percent, duration=records.duration, when=records.when)
    environment.globals.update(
        mean_and_sd=records.mean_and_sd,
        mark=records.mark,
        median_norm=records.median_norm,
        norms_over_seeds=records.norms_over_seeds,
        p_value=records.p_value,
    )
    groups: dict[str, int] = {}
    for column in data["columns"]:
        groups[column["threat_title"]] = groups.get(column["threat_title"], 0) + 1
    budgets = [
        (row["model"], column, {"accuracy_at_budget_interval": None, **row["cells"][column["key"]]})
        for column in data["columns"]
        for row in data["rows"]
        if row["cells"].get(column["key"], {}).get("accuracy_at_budget")
    ]
    return environment.get_template("report.html.j2").render(
        record=record,
        table=data,
        groups=groups,
        budgets=budgets,
        roles=records.role_titles(record),
        stages=records.stage_times(record),
        trained=any(role != "given" for role in records.roles(record).values()),
        source=tables.source(record),
        lacking=lacking,
        counted=records.counted(record),
        explanation=records.explanation(record),
        norms_note=records.norms_note(record),
        untrusted_note=records.untrusted_note(record),
        in_short=records.in_short(record),
        tested=any(one["active"] for one in (record.get("reliability") or {}).values()),
        reliability=records.in_order(record.get("reliability") or {}, tuple(records.roles(record))),
        pictures=[(heading, caption, base64.b64encode(png).decode()) for heading, caption, png in pictures.values()],
        config=json.dumps(record["experiment"], indent=2, sort_keys=True),
    )
