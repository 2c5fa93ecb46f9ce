"""Results of a sweep in words and tables, from ``sweep.json`` alone."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluation.statistics import wilson_interval
from pipeline.records import Record
from pipeline.reporting import labels
from pipeline.reporting.markdown import made_with, made_with_section, markdown_table
from pipeline.sweep.trials.entry import TrialEntry, trials_of
from pipeline.sweep.trials.states import FINISHED, PENDING


def finished(record: Mapping[str, Any]) -> list[TrialEntry]:
    """Return the trials that were trained to their end."""
    return [trial for trial in trials_of(record) if trial.state == FINISHED]


def chosen(record: Mapping[str, Any]) -> TrialEntry:
    """Return the chosen trial of a record that has a choice."""
    return TrialEntry.from_json(record["trials"][record["choice"]["trial"] - 1])


def robust_of(trial: TrialEntry) -> float:
    """Return the robust accuracy after the last epoch; -1 before the first."""
    return trial.last.robust if trial.epochs else -1.0


def best_so_far(trials: Sequence[TrialEntry]) -> TrialEntry | None:
    """Return the most robust finished trial."""
    return max((t for t in trials if t.state == FINISHED), key=robust_of, default=None)


def concluded_at(record: Mapping[str, Any]) -> float:
    """Return when the last trial ended from which the choice was made, in unix seconds."""
    return max(trial.ended_at for trial in trials_of(record) if trial.is_over)


def value_text(value: Any) -> str:
    """Return a parameter's value for display."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Return a point for display, such as ``lam=0.0123 shared_blocks=2``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in parameters.items())


def state_of(trial: TrialEntry) -> str:
    """Return state and reason of a trial."""
    return f"{trial.state}: {trial.reason}" if trial.reason else trial.state


def trial_line(trial: TrialEntry, total: int) -> str:
    """Return a trial in one line of the terminal."""
    text = f"trial {trial.number}/{total}: {parameters_text(trial.parameters)}: {state_of(trial)}"
    if trial.epochs:
        last = trial.last
        text += f", clean {100 * last.clean:.1f} %, robust {100 * last.robust:.1f} % after epoch {last.epoch}"
    return f"{text}, {trial.seconds:.0f} s"


def reference_line(name: str, reference: Mapping[str, Any]) -> str:
    """Return a reference in one line."""
    if "robust" not in reference:
        return f"reference {name}: {reference['state']}: {reference['reason']}"
    return f"reference {name}: clean {100 * reference['clean']:.1f} %, robust {100 * reference['robust']:.1f} %"


def references(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return clean and robust accuracy of the measured references, as means over their seeds."""
    replicates: dict[str, list[Mapping[str, Any]]] = {}
    for name, reference in record["references"].items():
        base = re.sub(r"-s\d+$", "", name) if _seeds(record) > 1 else name
        if "robust" in reference:
            replicates.setdefault(base, []).append(reference)
    return {
        name: {k: statistics.fmean(r[k] for r in several) for k in ("clean", "robust")}
        for name, several in replicates.items()
    }


def rule(clean_tolerance: float) -> str:
    """Return the rule of the choice in words."""
    points = f"{100 * clean_tolerance:g} point" + ("" if clean_tolerance == 0.01 else "s")
    return f"the most robust of those whose clean accuracy is within {points} of the best"


def interval(trial: TrialEntry) -> tuple[float, float]:
    """Return the 95 % interval of a trial's robust accuracy, from the number of attacked images.

    More seeds do not narrow it: their models are attacked on the same images, and mostly fail on
    the same ones. Their spread is :func:`seed_deviation`.
    """
    return wilson_interval(round(trial.last.robust * trial.last.n), trial.last.n)


def seed_deviation(trial: TrialEntry) -> float | None:
    """Return the standard deviation of robust accuracy over a trial's seeds; None with one seed."""
    each = [robust for _, robust in trial.last.each]
    return statistics.stdev(each) if len(each) > 1 else None


def indistinct(record: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the finished trials whose interval meets the choice's."""
    choice = chosen(record)
    low, high = interval(choice)
    intervals = {trial.number: interval(trial) for trial in finished(record) if trial.number != choice.number}
    return [number for number, (begin, end) in intervals.items() if begin <= high and end >= low]


def ties(record: Mapping[str, Any]) -> str:
    """Say that all finished trials have the same robust accuracy; "" if they differ or are alone."""
    values = [trial.last.robust for trial in finished(record)]
    if len(values) < 2 or len(set(values)) > 1:
        return ""
    return f"all {len(values)} trials tie at {100 * values[0]:.1f} % robust accuracy"


def conclusion(record: Mapping[str, Any]) -> str:
    """Return the choice in a sentence or two."""
    choice, trial = record["choice"], chosen(record)
    low, high = interval(trial)
    same, others = len(indistinct(record)), len(finished(record)) - 1
    apart = f"; {same} of {others} other trials cannot be told from it by {trial.last.n} images" if others else ""
    if tied := ties(record):
        apart = f"; {tied}: there was nothing to choose by but clean accuracy"
    deviation = seed_deviation(trial)
    seeds = "" if deviation is None else f", sd over {len(trial.last.each)} seeds {100 * deviation:.1f}"
    return (
        f"choice: trial {trial.number}: {parameters_text(choice['parameters'])} ({choice['rule']}): clean "
        f"{100 * choice['clean']:.1f} %, robust {100 * choice['robust']:.1f} % "
        f"({100 * low:.1f} to {100 * high:.1f}{seeds}){apart}"
    )


def earlier_choices(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each earlier choice that was tested before the sweep went on."""
    sentences = []
    for number, choice in enumerate(record.get("earlier_evaluations") or [], 1):
        when = f" on {labels.when(choice['date'])}" if choice.get("date") else ""
        sentences.append(
            f"Choice no. {number} was tested on the test images{when}, before the sweep went on: "
            f"trial {choice['trial']}: {parameters_text(choice['parameters'])}: {choice['evaluation']}"
        )
    return sentences


def table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per trial: parameters, accuracies in %, epochs, seconds, state."""
    return [_row(record, trial) for trial in trials_of(record)]


def _row(record: Mapping[str, Any], trial: TrialEntry) -> dict[str, Any]:
    last = trial.last if trial.epochs else None
    deviation = seed_deviation(trial) if last else None
    low, high = interval(trial) if last else (math.nan, math.nan)
    seeds = {"sd over seeds": "" if deviation is None else f"{100 * deviation:.1f}"} if _seeds(record) > 1 else {}
    return {
        "trial": trial.number,
        **{k: value_text(v) for k, v in trial.parameters.items()},
        "clean %": f"{100 * last.clean:.1f}" if last else "",
        "robust %": f"{100 * last.robust:.1f}" if last else "",
        "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}" if last else "",
        **seeds,
        "epochs": last.epoch if last else "",
        "seconds": "" if trial.state == PENDING else f"{trial.training_seconds + trial.objective_seconds:.1f}",
        "state": state_of(trial) + _mark(record, trial.number),
    }


def _mark(record: Mapping[str, Any], number: int) -> str:
    if record["choice"] and record["choice"]["trial"] == number:
        return ", chosen"
    return ", on the front" if number in record["front"] else ""


def _seeds(record: Mapping[str, Any]) -> int:
    return int(record["experiment"]["seeds"])


def overview(record: Mapping[str, Any]) -> str:
    """Return what a sweep that has a choice did."""
    space = record["space"]
    states = [trial.state for trial in trials_of(record)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    attacked = chosen(record).last.n  # The validation split may have fewer images than the space asks for.
    rows = ((record.get("data") or {}).get("rows") or {}).get("validation")
    images = f"{attacked:,} of {rows:,}" if rows else f"{attacked:,}"
    return (
        f"{len(states)} trials ({counts}), {space['search']} search, seed {record['seed']}, of model {record['model']} "
        f"of {record['name']}. Accuracies are of validation images: clean on the whole split, robust on {images} "
        f"under white-box {labels.attack_text(space['attack'])}. They choose, and are no result."
    )


def _more_robust_references(record: Mapping[str, Any]) -> list[str]:
    """Return the undefended references whose interval lies above that of the choice."""
    _, high = interval(chosen(record))
    n = chosen(record).last.n  # References are attacked on the images that trials are attacked on.
    scores = {name: s for name, s in references(record).items() if name != record["model"]}
    return [name for name, s in scores.items() if wilson_interval(round(s["robust"] * n), n)[0] > high]


def paragraphs(record: Mapping[str, Any]) -> list[str]:
    """Return what a sweep that has a choice compares with, and where the choice was tested."""
    text = []
    if measured := references(record):
        lines = "; ".join(reference_line(name, scores).removeprefix("reference ") for name, scores in measured.items())
        text.append(f"For comparison, measured alike: {lines}. {record['model']} is the model as the recipe has it.")
    if above := _more_robust_references(record):
        text.append(
            f"{' and '.join(above)}, without a defense, {'is' if len(above) == 1 else 'are'} more robust than the "
            "choice. The 95 % intervals do not overlap."
        )
    if record["evaluation"]:
        report = f"{record['evaluation']}/report/report.html"
        text.append(f"The choice on test images, beside undefended and control: {report}")
    return text + earlier_choices(record)


def markdown(record: Mapping[str, Any]) -> str:
    """Return paragraphs, table and origin of a sweep that has a choice, as Markdown."""
    rows = table(record)
    texts = [overview(record), f"{conclusion(record)}.", *paragraphs(record)]
    lines = [line for text in texts for line in (text, "")]
    lines += markdown_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows])
    return "\n".join([*lines, *made_with_section(made_with(Record.from_json(record)))]) + "\n"


def to_csv(record: Mapping[str, Any]) -> str:
    """Return every trial as CSV. Accuracies are unrounded fractions, means over the seeds."""
    file = io.StringIO()
    names = list(record["space"]["parameters"])
    scores = ["clean", "robust", "robust_sd", "n", "epochs"]
    rest = ["training_seconds", "objective_seconds", "state", "reason"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *names, *scores, *rest, "models"])
    for trial in trials_of(record):
        values: list[Any] = ["", "", None, "", 0]  # None is an empty field.
        if trial.epochs:
            last = trial.last
            values = [last.clean, last.robust, seed_deviation(trial), last.n, last.epoch]
        writer.writerow(
            [
                trial.number,
                *(trial.parameters[name] for name in names),
                *values,
                *(getattr(trial, name) for name in rest),
                " ".join(model.path for model in trial.models),
            ]
        )
    return file.getvalue()
