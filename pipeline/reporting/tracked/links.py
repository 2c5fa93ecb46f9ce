"""Lines at the end of a run that lead to its pages in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.records import RunRecord
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uri import comparison_page, models_page, ui_address, ui_command

MOST_COMPARED = 10
"""Runs in the address of a comparison. With more, neither the address nor the page can be read."""


def of_run(tracker: Tracker, record: RunRecord) -> list[str]:
    """Return the command or address that opens the run, its models side by side, and all models."""
    evaluated = {e.model for e in record.evaluations}
    models = [name for name in record.first_replicates if name in evaluated or not evaluated]
    return lines(tracker, "models", [f"model/{name}" for name in models])


def lines(tracker: Tracker, what: str, aliases: Sequence[str]) -> list[str]:
    """Return the lines for a run whose children have these aliases. Only runs that exist are linked.

    Args:
        what: the word for the children.
    """
    experiment, base = tracker.experiment_id, ui_address(tracker.uri)
    text = [f"MLflow: {ui_command(tracker.uri, experiment, tracker.run_id())}"]
    if experiment is None:
        return text
    ids = [run_id for alias in aliases if (run_id := tracker.run_id(alias))]
    if len(ids) > 1:
        several = f"{what} side by side" if len(ids) <= MOST_COMPARED else f"first {MOST_COMPARED} {what} side by side"
        text.append(f"  {several}: {base}{comparison_page(experiment, ids[:MOST_COMPARED])}")
    return [*text, f"  all models: {base}{models_page(experiment)}"]
