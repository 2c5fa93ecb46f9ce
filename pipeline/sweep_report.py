"""What a sweep found, from ``sweep.json`` alone: table, plots and one HTML file that opens from disk."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import numpy as np

from components.evaluation.statistics import wilson_interval
from pipeline.reporting import labels
from pipeline.reporting.markdown import made_with, markdown_made_with, markdown_table
from pipeline.reporting.plots import style
from pipeline.runtime.storage import Storage

Trial = Mapping[str, Any]
NEUTRAL, FRONT, CHOICE = "#9ca3af", "#0072b2", "#d55e00"
BINS_PER_DECADE = 1
MAX_BINS = 8
MAX_CELLS = 12
"""A heat map has no more values along an axis."""
PLOTS = {
    "pareto": "Clean against robust accuracy on validation images; the line joins what no other trial exceeds in both",
    "parallel": "Every finished trial as a line over its parameters and results",
    "heat-map": "Robust accuracy over two parameters: the mean of the trials in a cell, and how many they are",
}


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
    return "\n".join([*lines, *markdown_made_with(record)]) + "\n"


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


# -- plots -----------------------------------------------------------------------------------------------------------------


def pareto(record: Mapping[str, Any]) -> bytes:
    """Robust over clean accuracy with 95 % intervals of the former; front and choice marked."""
    figure, (axis,) = style.grid(1, columns=1, width=3.6, height=4.4)
    trials = finished(record)
    choice = record["choice"]["trial"]
    for trial in trials:
        last, (low, high) = trial["epochs"][-1], interval(trial)
        number = trial["number"]
        colour = CHOICE if number == choice else FRONT if number in record["front"] else NEUTRAL
        x, y = 100 * last["clean"], 100 * last["robust"]
        axis.errorbar(x, y, yerr=[[y - 100 * low], [100 * high - y]], color=colour, linewidth=0.7, alpha=0.5, zorder=2)
        axis.plot(
            x, y, "o" if number != choice else "*", color=colour, markersize=5 if number != choice else 12, zorder=3
        )
        if colour != NEUTRAL:
            axis.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    front = sorted((t for t in trials if t["number"] in record["front"]), key=lambda t: t["epochs"][-1]["clean"])
    axis.plot(
        [100 * t["epochs"][-1]["clean"] for t in front],
        [100 * t["epochs"][-1]["robust"] for t in front],
        color=FRONT,
        linewidth=1,
    )
    for name, found in references(record).items():
        x, y = 100 * found["clean"], 100 * found["robust"]
        axis.plot(x, y, "D", color="#111827", markersize=5, zorder=3)
        axis.annotate(name, (x, y), xytext=(6, -9), textcoords="offset points", fontsize=8)
    axis.set_xlabel("clean accuracy, validation (%)")
    axis.set_ylabel(f"accuracy under {record['space']['attack']} (%)")
    axis.set_title("front (line), choice (star), references (diamonds)")
    return style.png(figure)


def parallel(record: Mapping[str, Any]) -> bytes:
    """Parallel coordinates: a line per finished trial, darker where it is more robust."""
    from matplotlib import colormaps

    trials = sorted(finished(record), key=robust_of)
    names = list(record["space"]["parameters"])
    axes: dict[str, list[float]] = {}
    ticks: dict[str, list[tuple[float, str]]] = {}
    for name in names:
        axes[name], ticks[name] = _scaled(record["space"]["parameters"][name], [t["parameters"][name] for t in trials])
    for name, key in (("clean %", "clean"), ("robust %", "robust")):
        values = [100 * t["epochs"][-1][key] for t in trials]
        low, high = math.floor(min(values)), math.ceil(max(values))
        span = max(high - low, 1)
        axes[name] = [(v - low) / span for v in values]
        ticks[name] = [(i / 4, f"{low + span * i / 4:g}") for i in range(5)]
    figure, (axis,) = style.grid(1, columns=1, width=max(3.2, 0.9 * len(axes)), height=4.0)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    shade = colormaps["viridis_r"]
    for i, trial in enumerate(trials):
        chosen = trial["number"] == record["choice"]["trial"]
        axis.plot(
            range(len(axes)),
            [values[i] for values in axes.values()],
            color=CHOICE if chosen else shade(i / max(1, len(trials) - 1)),
            linewidth=2.2 if chosen else 1.0,
            alpha=1.0 if chosen else 0.8,
        )
    for x, name in enumerate(axes):
        axis.axvline(x, color="#374151", linewidth=0.8)
        for y, text in ticks[name]:
            axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=7.5, va="center")
    axis.set_xticks(range(len(axes)), list(axes))
    axis.set_yticks([])
    axis.margins(x=0.08)
    axis.set_title("darker: more robust; orange: the choice")
    return style.png(figure)


def _scaled(domain: Mapping[str, Any], values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Values of one parameter on an axis from 0 to 1, and its ticks."""
    kind = domain["domain"]
    if kind == "Choice":
        allowed = domain["values"]
        places = {value: i / max(1, len(allowed) - 1) for i, value in enumerate(allowed)}
        return [places[v] for v in values], [(y, value_text(v)) for v, y in places.items()]
    low, high = domain["low"], domain["high"]
    if kind == "LogUniform":
        span = math.log(high / low)
        exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [math.log(v / low) / span for v in values], [
            (math.log(10**e / low) / span, f"{10.0**e:g}") for e in exponents
        ]
    whole = kind == "IntRange" and high - low < MAX_CELLS
    marks = range(low, high + 1) if whole else [low + (high - low) * i / 4 for i in range(5)]
    return [(v - low) / (high - low) for v in values], [((m - low) / (high - low), f"{m:g}") for m in marks]


def mapped(record: Mapping[str, Any]) -> list[str]:
    """The parameters along the axes of the heat map; what the paper has a claim of comes first."""
    names = list(record["space"]["parameters"])
    return ["lam", "shared_blocks"] if {"lam", "shared_blocks"} <= set(names) else names[:2]


def heat_map(record: Mapping[str, Any]) -> bytes | None:
    """Mean robust accuracy over lambda and shared blocks, where the space has both, else over its first two parameters; ranges of
    real numbers in bins. None: there is one parameter."""
    names = mapped(record)
    if len(names) < 2:
        return None
    trials = finished(record)
    places, labels = [], []
    for name in names:
        where, text = _cells(record["space"]["parameters"][name], [t["parameters"][name] for t in trials])
        places.append(where)
        labels.append(text)
    sums = np.zeros((len(labels[1]), len(labels[0])))
    counts = np.zeros_like(sums)
    for trial, x, y in zip(trials, *places, strict=True):
        sums[y, x] += 100 * robust_of(trial)
        counts[y, x] += 1
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    width, height = 0.85 * len(labels[0]) + 1.5, 0.6 * len(labels[1]) + 1.4
    figure, (axis,) = style.grid(1, columns=1, width=width / 2, height=height)
    axis.grid(False)
    image = axis.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = float(np.nanmean(means))
    for (y, x), count in np.ndenumerate(counts):
        if count:
            colour = "white" if means[y, x] < middle else "black"
            axis.text(x, y, f"{means[y, x]:.1f}\n({count:.0f})", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(labels[0])), labels[0], fontsize=8)
    axis.set_yticks(range(len(labels[1])), labels[1], fontsize=8)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.set_title("robust accuracy in %: mean (trials)")
    figure.colorbar(image, ax=axis)
    return style.png(figure)


def _cells(domain: Mapping[str, Any], values: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Cell of each value along an axis, and the cells' labels."""
    kind = domain["domain"]
    if kind == "Choice":
        allowed = list(domain["values"])
        return [allowed.index(v) for v in values], [value_text(v) for v in allowed]
    low, high = domain["low"], domain["high"]
    if kind == "IntRange" and high - low < MAX_CELLS:
        return [v - low for v in values], [str(v) for v in range(low, high + 1)]
    log = kind == "LogUniform"
    begin, end = (math.log10(low), math.log10(high)) if log else (low, high)
    count = min(MAX_BINS, max(2, round((end - begin) * BINS_PER_DECADE))) if log else MAX_BINS // 2
    edges = [begin + (end - begin) * i / count for i in range(count + 1)]
    told = [10**e if log else e for e in edges]
    found = [min(count - 1, int((((math.log10(v) if log else v) - begin) / (end - begin)) * count)) for v in values]
    return found, [f"{told[i]:.2g} to\n{told[i + 1]:.2g}" for i in range(count)]


# -- files -----------------------------------------------------------------------------------------------------------------

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#111827}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #e5e7eb}
td:last-child,th:last-child{text-align:left}img{max-width:100%}figcaption{color:#4b5563}pre{background:#f3f4f6;padding:.7rem;overflow:auto}</style>
<h1>{{ title }}</h1>{% for p in paragraphs %}<p>{{ p }}</p>{% endfor %}
<pre>{{ again }}</pre>
{% for name, caption, data in pictures %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
<table><tr>{% for head in rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<h2>Made with</h2><dl>{% for what, text in made_with.items() %}<dt>{{ what }}</dt><dd>{{ text }}</dd>{% endfor %}</dl></html>
"""


def build(record: Mapping[str, Any], storage: Storage) -> list[str]:
    """Write ``report/`` of a sweep that has a choice: report.html, table.md, trials.csv, plots. Returns the names."""
    pictures = {"pareto": pareto(record), "parallel": parallel(record)}
    if (map_ := heat_map(record)) is not None:
        pictures["heat-map"] = map_
    for name, data in pictures.items():
        storage.write_bytes(f"report/{name}.png", data)
    storage.write_bytes("report/trials.csv", to_csv(record).encode())
    storage.write_bytes("report/table.md", markdown(record).encode())
    html = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    text = html.render(
        title=f"Sweep {record['name']}: {record['space_name']}",
        paragraphs=paragraphs(record),
        made_with=made_with(record),
        again=f"python pipeline/main.py run --from {storage.uri}/best.json",
        pictures=[(n, PLOTS[n], base64.b64encode(d).decode()) for n, d in pictures.items()],
        rows=table(record),
    )
    storage.write_bytes("report/report.html", text.encode())
    return [*(f"{name}.png" for name in pictures), "trials.csv", "table.md", "report.html"]
