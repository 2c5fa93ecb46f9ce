"""What a sweep found, from ``sweep.json`` alone: table, plots and one HTML file that opens from disk."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from components.evaluation.statistics import wilson_interval
from pipeline.records import Record
from pipeline.reporting import labels
from pipeline.reporting.markdown import made_with, made_with_section, markdown_table

Trial = Mapping[str, Any]


# -- numbers and words -----------------------------------------------------------------------------------------------------


def finished(record: Mapping[str, Any]) -> list[Trial]:
    """The trials that were trained to their end."""
    return [t for t in record["trials"] if t["state"] == "finished"]


def robust_of(trial: Trial) -> float:
    """Robust accuracy after the last epoch there is; -1 before the first."""
    return float(trial["epochs"][-1]["robust"]) if trial["epochs"] else -1.0


def best_so_far(trials: Sequence[Trial]) -> Trial | None:
    """The most robust of those finished."""
    return max((t for t in trials if t["state"] == "finished"), key=robust_of, default=None)


def ended_at(trial: Trial) -> float:
    """When a trial that is over ended, in unix seconds."""
    return datetime.fromisoformat(trial["started"]).timestamp() + float(trial["seconds"])


def concluded_at(record: Mapping[str, Any]) -> float:
    """When the last of the trials ended from which the choice was made, in unix seconds: the same whenever it is asked."""
    return max(ended_at(t) for t in record["trials"] if t["state"] not in ("pending", "running"))


def value_text(value: Any) -> str:
    """A parameter's value as people read it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """``lam=0.0123 shared_blocks=2``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in parameters.items())


def state_of(trial: Trial) -> str:
    """State and reason in a few words."""
    return f"{trial['state']}: {trial['reason']}" if trial["reason"] else str(trial["state"])


def trial_line(trial: Trial, total: int) -> str:
    """One line of the terminal."""
    said = f"trial {trial['number']}/{total}: {parameters_text(trial['parameters'])}: {state_of(trial)}"
    if trial["epochs"]:
        last = trial["epochs"][-1]
        said += f", clean {100 * last['clean']:.1f} %, robust {100 * last['robust']:.1f} % after epoch {last['epoch']}"
    return f"{said}, {trial['seconds']:.0f} s"


def reference_line(name: str, reference: Mapping[str, Any]) -> str:
    """One line for a model that the trials are seen beside."""
    if "robust" not in reference:
        return f"reference {name}: {reference['state']}: {reference['reason']}"
    return f"reference {name}: clean {100 * reference['clean']:.1f} %, robust {100 * reference['robust']:.1f} %"


def references(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that were measured, by the recipe's name: the means over their seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, reference in record["references"].items():
        base = re.sub(r"-s\d+$", "", name) if _seeds(record) > 1 else name
        if "robust" in reference:
            found.setdefault(base, []).append(reference)
    return {
        name: {k: statistics.fmean(r[k] for r in several) for k in ("clean", "robust")}
        for name, several in found.items()
    }


def rule(clean_tolerance: float) -> str:
    """How the choice is made."""
    points = f"{100 * clean_tolerance:g} point" + ("" if clean_tolerance == 0.01 else "s")
    return f"the most robust of those whose clean accuracy is within {points} of the best"


def interval(trial: Trial) -> tuple[float, float]:
    """95 % interval of a trial's robust accuracy, from how many images were attacked.

    More seeds do not narrow it: their models are attacked on the same images, and mostly fail on the same ones. What seeds
    tell is how far they lie apart (:func:`spread`).
    """
    last = trial["epochs"][-1]
    return wilson_interval(round(last["robust"] * last["n"]), last["n"])


def spread(trial: Trial) -> float | None:
    """Standard deviation of a trial's robust accuracy over its seeds; None where it has one."""
    each = [robust for _, robust in trial["epochs"][-1]["each"]]
    return statistics.stdev(each) if len(each) > 1 else None


def indistinct(record: Mapping[str, Any]) -> list[int]:
    """Numbers of the other finished trials whose interval of robust accuracy meets the choice's."""
    choice = record["choice"]["trial"]
    low, high = interval(record["trials"][choice - 1])
    out = []
    for trial in finished(record):
        other_low, other_high = interval(trial)
        if trial["number"] != choice and other_low <= high and other_high >= low:
            out.append(trial["number"])
    return out


def conclusion(record: Mapping[str, Any]) -> str:
    """The choice, in a sentence or two."""
    choice = record["choice"]
    last = record["trials"][choice["trial"] - 1]["epochs"][-1]
    low, high = interval(record["trials"][choice["trial"] - 1])
    same, others = len(indistinct(record)), len(finished(record)) - 1
    apart = f"{same} of {others} other trials cannot be told from it by {last['n']} images" if others else ""
    sd = spread(record["trials"][choice["trial"] - 1])
    seeds = "" if sd is None else f", sd over {len(last['each'])} seeds {100 * sd:.1f}"
    return (
        f"choice: trial {choice['trial']}: {parameters_text(choice['parameters'])} ({choice['rule']}): clean "
        f"{100 * choice['clean']:.1f} %, robust {100 * choice['robust']:.1f} % ({100 * low:.1f} to {100 * high:.1f}{seeds})"
        + (f"; {apart}" if apart else "")
    )


def earlier(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each earlier choice that the test images were used for before a later conclusion changed it."""
    said = []
    for number, one in enumerate(record.get("earlier_evaluations") or [], 1):
        when = f" on {labels.when(one['date'])}" if one.get("date") else ""
        said.append(
            f"Choice no. {number} was tested on the test images{when}, before the sweep went on: trial {one['trial']}: "
            f"{parameters_text(one['parameters'])}: {one['evaluation']}"
        )
    return said


def table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per trial: number, parameters, accuracies in %, their spread over seeds, epochs, seconds, state."""
    rows = []
    for trial in record["trials"]:
        last = trial["epochs"][-1] if trial["epochs"] else None
        sd = spread(trial) if last else None
        low, high = interval(trial) if last else (math.nan, math.nan)
        rows.append(
            {
                "trial": trial["number"],
                **{k: value_text(v) for k, v in trial["parameters"].items()},
                "clean %": f"{100 * last['clean']:.1f}" if last else "",
                "robust %": f"{100 * last['robust']:.1f}" if last else "",
                "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}" if last else "",
                **({"sd over seeds": "" if sd is None else f"{100 * sd:.1f}"} if _seeds(record) > 1 else {}),
                "epochs": last["epoch"] if last else "",
                "seconds": f"{trial['training_seconds'] + trial['objective_seconds']:.1f}",
                "state": state_of(trial) + _mark(record, trial["number"]),
            }
        )
    return rows


def _mark(record: Mapping[str, Any], number: int) -> str:
    if record["choice"] and record["choice"]["trial"] == number:
        return ", chosen"
    return ", on the front" if number in record["front"] else ""


def _seeds(record: Mapping[str, Any]) -> int:
    return int(record["experiment"]["seeds"])


def paragraphs(record: Mapping[str, Any]) -> list[str]:
    """What a sweep that has a choice did, chose, and compares with, in sentences."""
    space = record["space"]
    states = [t["state"] for t in record["trials"]]
    counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    # fewer than were asked for where the validation split has no more
    attacked = record["trials"][record["choice"]["trial"] - 1]["epochs"][-1]["n"]
    said = [
        f"{len(states)} trials ({counted}), {space['search']} search, seed {record['seed']}, of model {record['model']} of "
        f"{record['name']}. Accuracies are of validation images: clean on the whole split, robust under white-box "
        f"{space['attack']} on {attacked} of them; they choose, and are no result.",
        conclusion(record) + ".",
    ]
    if measured := references(record):
        lines = "; ".join(reference_line(name, found).removeprefix("reference ") for name, found in measured.items())
        said.append(f"For comparison, measured alike: {lines}. {record['model']} is the model as the recipe has it.")
    if record["evaluation"]:
        said.append(
            f"The choice on test images, beside undefended and control: {record['evaluation']}/report/report.html"
        )
    return said + earlier(record)


def markdown(record: Mapping[str, Any]) -> str:
    """Paragraphs and table of a sweep that has a choice, and what it was made with, for places that show Markdown."""
    rows = table(record)
    lines = [line for said in paragraphs(record) for line in (said, "")]
    lines += markdown_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows])
    return "\n".join([*lines, *made_with_section(made_with(Record.from_json(record)))]) + "\n"


def to_csv(record: Mapping[str, Any]) -> str:
    """Every trial with its full numbers: parameters, accuracies as fractions (means and spread over seeds), seconds, state."""
    out = io.StringIO()
    names = list(record["space"]["parameters"])
    heads = ["clean", "robust", "robust_sd", "n", "epochs", "training_seconds", "objective_seconds", "state", "reason"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", *names, *heads, "models"])
    for t in record["trials"]:
        last = t["epochs"][-1] if t["epochs"] else {"clean": "", "robust": "", "n": "", "epoch": 0}
        writer.writerow(
            [
                t["number"],
                *(t["parameters"][name] for name in names),
                *(last[k] for k in ("clean", "robust")),
                (spread(t) if t["epochs"] else None),  # None is an empty field
                *(last[k] for k in ("n", "epoch")),
                *(t[k] for k in ("training_seconds", "objective_seconds", "state", "reason")),
                " ".join(m["path"] for m in t["models"]),
            ]
        )
    return out.getvalue()
