"""The tables of a run for people: on a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from components.config.roles import roles_of
from pipeline.reporting import labels, over_seeds, results, sentences, verdicts
from pipeline.reporting.cells import beside_title, cell, our_value, range_text, row_head, worst_value
from pipeline.reporting.records import Row, experiment_of


def markdown(record: Mapping[str, Any]) -> str:
    """Description and table for places that show Markdown, such as MLflow's page of a run."""
    data = results.table(record)
    lines = [record["experiment"].get("description", ""), ""]
    lines += [f"**{row['sentence']}**\n" for row in verdicts.near_chance(record)]
    heads = [
        " ".join(
            filter(None, (c["threat_title"], c["attack_title"] if c["threat_model"] != "clean" else "", c["settings"]))
        )
        for c in data["columns"]
    ]
    lines += markdown_table(
        ["model", *heads],
        [
            [f"{row['model']} ({row_head(row)[1]})", *(_in_one_line(cell(c, row)) for c in data["columns"])]
            for row in data["rows"]
        ],
    )
    lines += [
        "",
        f"Accuracy in % (95 % Wilson interval), {labels.counted(record)}.",
        "",
        *(f"{note}\n" for note in filter(None, [sentences.norms_note(record), sentences.untrusted_note(record)])),
        *sentences.explanation(record),
    ]
    together = _markdown_across(record)
    return "\n".join([*lines, *_markdown_verdict(record), *together, *_markdown_models(record)]).strip()


def _markdown_models(record: Mapping[str, Any]) -> list[str]:
    """What was trained, and what all of it was made with, as Markdown: a table out of its run must still say so."""
    lines: list[str] = []
    if record["models"]:
        heads = ("model", "validation accuracy", "reconstruction error (validation)", "training seconds", "images/s")
        rows = []
        for name, m in record["models"].items():
            error, seconds, speed = (m.get(k) for k in ("reconstruction_validation", "seconds", "images_per_second"))
            cells = (
                name,
                "–" if m.get("clean_validation") is None else labels.percent(m["clean_validation"]),
                "–" if error is None else f"{error:.3g}",
                f"{seconds:.0f}" if seconds else "–",  # 0: not trained here
                f"{speed:.0f}" if speed else "–",
            )
            rows.append(cells)
        lines += ["", "### Models", "", *markdown_table(heads, rows)]
        if any(m.get("reconstruction_validation") is not None for m in record["models"].values()):
            lines += ["", "Reconstruction error: mean squared error per pixel of the whole image, in (0..1)²."]
    return [*lines, *markdown_made_with(record)]


def markdown_made_with(record: Mapping[str, Any]) -> list[str]:
    """:func:`made_with` as a section in Markdown; the command as code."""
    said = {what: f"`{text}`" if what == "Command" else text for what, text in made_with(record).items()}
    return ["", "### Made with", "", *(f"- {what}: {text}" for what, text in said.items())]


def made_with(record: Mapping[str, Any]) -> dict[str, str]:
    """Command, revision, hardware, versions and seconds of run.json or sweep.json; what is not known is left out."""
    machine = record["hardware"]
    stages = results.stage_times(record) if "models" in record else record["stages"]  # sweep.json holds no models
    gpus = ", ".join(machine.get("gpus") or []) or "no GPU"
    made = {
        "Command": record["command"],
        "Source": source(record),
        "Finished": labels.when(record["finished"]),
        "Hardware": f"{machine['cpu']}, {machine['cpus']} CPUs, {gpus}" if machine else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items())),
        "Seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items()),
    }
    return {what: text for what, text in made.items() if text}


def source(record: Mapping[str, Any]) -> str:
    """Name the code that made run.json or sweep.json: its revision and its source hash, as far as they are known."""
    revision = record["git"].get("revision") or ""
    if revision and record["git"].get("dirty"):
        revision += " with uncommitted changes"
    source_hash = f"source hash {record['source']}" if record.get("source") else ""
    return ", ".join(part for part in (revision, source_hash) if part)


def _markdown_verdict(record: Mapping[str, Any]) -> list[str]:
    """Worst cases and flags as Markdown."""
    lines = []
    seeds = verdicts.worst_over_seeds(record)
    if rows := seeds or verdicts.worst_cases(record):
        what = "mean ± standard deviation over the seeds" if seeds else "accuracy"
        heads = ("model", "budget", "examples", what, "least to greatest" if seeds else "95 % interval")
        lines += ["", "### Worst case per sample over all attacks, accuracy in %", ""]
        lines += markdown_table(heads, [(w["model"], w["budget"], w["threat_title"], *worst_value(w)) for w in rows])
    # with several seeds what counts is whether a difference exceeds theirs
    if (paired := verdicts.worst_case_pairs(record)) and not seeds:
        heads = ("model", "against", "budget", "examples", "only model", "only the other", "n", "p (McNemar)")
        lines += ["", "### Worst case in pairs: images that one model withstands and the other does not", ""]
        lines += markdown_table(
            heads,
            [
                (
                    w["model"],
                    w["against"],
                    w["budget"],
                    w["threat_title"],
                    *(str(w[k]) for k in ("only_model", "only_against", "n")),
                    labels.p_value(w["p"]),
                )
                for w in paired
            ],
        )
    if said := sentences.reliability_in_short(record):
        lines += ["", said]
        lines += [
            f"- **{f['model']}: {f['name'].replace('_', ' ')}.** {f['measured']} {f['remedy']}"
            for f in verdicts.raised_flags(record)
        ]
    return lines


def _markdown_across(record: Mapping[str, Any]) -> list[str]:
    """What several evaluations say together, as Markdown tables; none where there is nothing to say."""
    together = results.across(record)
    lines: list[str] = []

    def add(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines.extend(["", f"### {title}", "", *markdown_table(heads, rows)])

    def attack(row: Row) -> str:
        return "" if row["threat_model"] == "clean" else row["attack_title"]

    if seeds := together["over_seeds"]:
        add(
            "Over the seeds: accuracy in %, mean ± standard deviation",
            ("model", "threat model", "attack", "seeds", "accuracy", "least to greatest"),
            [
                (
                    r["model"],
                    r["threat_title"],
                    attack(r),
                    str(r["seeds"]),
                    labels.mean_and_sd(r["accuracy_mean"], r["accuracy_sd"]) + labels.mark(r),
                    range_text(r["seeds"], r["accuracy_min"], r["accuracy_max"], " to "),
                )
                for r in seeds
            ],
        )
    if resolved := [d for d in together["differences"] if d["resolved"]]:
        add(
            f"Differences that exceed the seeds' noise ({len(resolved)} of {len(together['differences'])}; 95 %, paired by seed, "
            "not corrected for their number)",
            ("model", "against", "threat model", "attack", "points"),
            [
                (
                    d["model"],
                    d["reference"],
                    d["threat_title"],
                    attack(d),
                    f"{100 * d['difference']:+.1f}{labels.mark(d)} ± {100 * d['half_width']:.1f}",
                )
                for d in resolved
            ],
        )
    printed = together["paper"]
    if any(row["ours"] for row in printed):
        add(
            beside_title(record),
            ("the paper's row", "network", "attack", "paper", "ours, by threat model"),
            [
                (
                    r["title"],
                    r["arch"],
                    r["column"] + (f" made on {r['made_on']}" if r["made_on"] else ""),
                    r["paper"],
                    "; ".join(our_value(r)) or "-",
                )
                for r in printed
            ],
        )
    return lines


def _in_one_line(cell: Sequence[str]) -> str:
    """Accuracy, its interval in brackets, and what else a cell says."""
    first, *rest = cell
    return ", ".join([f"{first} ({rest[0]})", *rest[1:]]) if rest else first


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return [head, "| --- " * len(heads) + "|", *body]


def to_csv(record: Mapping[str, Any]) -> str:
    """One line per evaluation, accuracies as fractions."""
    names = ["accuracy", "accuracy_low", "accuracy_high", "accuracy_rounded", "clean_accuracy", "success_rate"]
    names += [f"{norm}_{q}" for norm in ("l2", "linf") for q in ("median", "q25", "q75")] + ["seconds"]
    role = roles_of(experiment_of(record))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "role", "threat_model", "attack", "source", "n", *names, "broken", "untrusted"])
    for e in record["evaluations"]:
        metrics = over_seeds.shown_metrics(e)
        values = [*(metrics.get(name) for name in (*names, "broken")), int(labels.is_untrusted(record, e))]
        writer.writerow(
            [e["model"], role.get(e["model"], ""), e["threat_model"], e["attack"], e.get("source"), e["n"], *values]
        )
    return out.getvalue()
