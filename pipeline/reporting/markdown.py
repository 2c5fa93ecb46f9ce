"""The tables of a run as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from pipeline.records import Record, RunRecord
from pipeline.reporting import labels, over_seeds, results, sentences, verdicts
from pipeline.reporting.cells import attack_name, beside_title, cell, our_value, range_text, row_head, worst_value


def markdown(record: RunRecord) -> str:
    """Return the description and the tables, also for MLflow's page of a run."""
    data = results.table(record)
    heads = [" ".join(filter(None, (c["threat_title"], attack_name(c), c["settings"]))) for c in data["columns"]]
    rows = [
        [f"{row['model']} ({row_head(row)[1]})", *(_in_one_line(cell(c, row)) for c in data["columns"])]
        for row in data["rows"]
    ]
    notes = filter(None, [sentences.norms_note(record), sentences.untrusted_note(record)])
    lines = [
        record.experiment.description,
        "",
        *(f"**{row['sentence']}**\n" for row in verdicts.near_chance(record)),
        *markdown_table(["model", *heads], rows),
        "",
        f"Accuracy in % (95 % Wilson interval), {labels.counted(record)}.",
        "",
        *(f"{note}\n" for note in notes),
        *sentences.explanation(record),
        *_worst_cases(record),
        *_reliability(record),
        *_across(record),
        *_models(record),
        *made_with_section(made_with(record, results.stage_times(record))),
    ]
    return "\n".join(lines).strip()


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"### {title}", "", *markdown_table(heads, rows)]


def _models(record: RunRecord) -> list[str]:
    if not record.models:
        return []
    heads = ("model", "validation accuracy", "reconstruction error (validation)", "training seconds", "images/s")
    rows = [
        (
            name,
            "–" if model.clean_validation is None else labels.percent(model.clean_validation),
            "–" if model.reconstruction_validation is None else f"{model.reconstruction_validation:.3g}",
            f"{model.seconds:.0f}" if model.seconds else "–",
            f"{model.images_per_second:.0f}" if model.images_per_second else "–",
        )
        for name, model in record.models.items()
    ]
    lines = _section("Models", heads, rows)
    if any(model.reconstruction_validation is not None for model in record.models.values()):
        lines += ["", "Reconstruction error: mean squared error per pixel of the whole image, in (0..1)²."]
    return lines


def made_with_section(made: Mapping[str, str]) -> list[str]:
    """Return :func:`made_with` as a section, so that a table without its run still says it."""
    lines = (f"- {key}: `{text}`" if key == "Command" else f"- {key}: {text}" for key, text in made.items())
    return ["", "### Made with", "", *lines]


def made_with(record: Record, stages: Mapping[str, float] | None = None) -> dict[str, str]:
    """Return command, code, hardware, versions and seconds, as far as they are known.

    Args:
        stages: title of each stage -> seconds; default: the stages of the record.
    """
    machine = record.hardware
    gpus = ", ".join(machine.get("gpus") or []) or "no GPU"
    seconds = record.stages if stages is None else stages
    made = {
        "Command": record.command,
        "Source": source(record),
        "Finished": labels.when(record.finished),
        "Hardware": f"{machine['cpu']}, {machine['cpus']} CPUs, {gpus}" if machine else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())),
        "Seconds": ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()),
    }
    return {key: text for key, text in made.items() if text}


def source(record: Record) -> str:
    """Return the revision and the source hash of the code, as far as they are known."""
    revision = record.git.get("revision") or ""
    if revision and record.git.get("dirty"):
        revision += " with uncommitted changes"
    return ", ".join(filter(None, (revision, f"source hash {record.source}" if record.source else "")))


def _worst_cases(record: RunRecord) -> list[str]:
    """Return the tables of the worst cases, over the seeds if there are several."""
    seeds = verdicts.worst_over_seeds(record)
    rows = seeds or verdicts.worst_cases(record)
    if not rows:
        return []
    value = "mean ± standard deviation over the seeds" if seeds else "accuracy"
    lines = _section(
        "Worst case per sample over all attacks, accuracy in %",
        ("model", "budget", "examples", value, "lowest to highest" if seeds else "95 % interval"),
        [(w["model"], w["budget"], w["threat_title"], *worst_value(w)) for w in rows],
    )
    # With several seeds, the question is whether a difference exceeds their spread.
    if (pairs := verdicts.worst_case_pairs(record)) and not seeds:
        keys = ("model", "against", "budget", "threat_title", "only_model", "only_against", "n")
        lines += _section(
            "Worst case in pairs: images that only one of two models withstands",
            ("model", "against", "budget", "examples", "only model", "only the other", "n", "p (McNemar)"),
            [
                (*(str(w[key]) for key in keys), labels.p_value(w["p"], w["only_model"], w["only_against"]))
                for w in pairs
            ],
        )
    return lines


def _reliability(record: RunRecord) -> list[str]:
    if not (summary := sentences.reliability_in_short(record)):
        return []
    flags = (verdicts.flag_text(flag) for flag in verdicts.raised_flags(record))
    return ["", summary, *(f"- **{title}** {text}" for title, text in flags)]


def _across(record: RunRecord) -> list[str]:
    """Return the tables over several evaluations: seeds, differences, and the paper's values."""
    together = results.across(record)
    lines: list[str] = []
    if seeds := together["over_seeds"]:
        lines += _section(
            "Over the seeds: accuracy in %, mean ± standard deviation",
            ("model", "threat model", "attack", "seeds", "accuracy", "lowest to highest"),
            [
                (
                    row["model"],
                    row["threat_title"],
                    attack_name(row),
                    str(row["seeds"]),
                    labels.mean_and_sd(row["accuracy_mean"], row["accuracy_sd"]) + labels.mark(row),
                    range_text(row["seeds"], row["accuracy_min"], row["accuracy_max"], " to "),
                )
                for row in seeds
            ],
        )
    if resolved := [row for row in together["differences"] if row["resolved"]]:
        lines += _section(
            f"Differences that exceed the noise of the seeds ({len(resolved)} of {len(together['differences'])}; 95 %, "
            "paired by seed, not corrected for the number of comparisons)",
            ("model", "against", "threat model", "attack", "points"),
            [
                (
                    row["model"],
                    row["reference"],
                    row["threat_title"],
                    attack_name(row),
                    f"{100 * row['difference']:+.1f}{labels.mark(row)} ± {100 * row['half_width']:.1f}",
                )
                for row in resolved
            ],
        )
    if any(row["ours"] for row in together["paper"]):
        lines += _section(
            beside_title(record),
            ("the paper's row", "network", "attack", "paper", "ours, by threat model"),
            [
                (
                    row["title"],
                    row["arch"],
                    row["column"] + (f" made on {row['made_on']}" if row["made_on"] else ""),
                    row["paper"],
                    "; ".join(our_value(row)) or "-",
                )
                for row in together["paper"]
            ],
        )
    return lines


def _in_one_line(cell: Sequence[str]) -> str:
    """Return the accuracy, its interval in brackets, and the other lines of a cell."""
    first, *rest = cell
    return ", ".join([f"{first} ({rest[0]})", *rest[1:]]) if rest else first


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return [head, "| --- " * len(heads) + "|", *body]


def to_csv(record: RunRecord, *, with_paths: bool = False) -> str:
    """Return one line per evaluation as CSV, with accuracies as fractions.

    Args:
        with_paths: add a column with the address of the evaluation's records.
    """
    names = ["accuracy", "accuracy_low", "accuracy_high", "accuracy_rounded", "clean_accuracy", "success_rate"]
    names += [f"{norm}_{q}" for norm in ("l2", "linf") for q in ("median", "q25", "q75")] + ["seconds", "broken"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "role",
            "threat_model",
            "attack",
            "source",
            "n",
            *names,
            "untrusted",
            *(["records"] if with_paths else []),
        ]
    )
    for e in record.evaluations:
        metrics = over_seeds.shown_metrics(e)
        settings = [e.model, record.roles.get(e.model, ""), e.threat_model, e.attack, e.source, e.n]
        values = [*(metrics.get(name) for name in names), int(labels.is_untrusted(record, e))]
        writer.writerow([*settings, *values, *([e.path] if with_paths else [])])
    return out.getvalue()
