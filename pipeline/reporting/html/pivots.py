"""Tables of a run's page with a row per model: long lists of rows, turned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.records import RunRecord
from pipeline.reporting.labels import attack_title, budget_text
from pipeline.reporting.records import Row


@dataclass(frozen=True)
class Pivot:
    """Rows of models over columns that are grouped under common titles."""

    groups: Mapping[str, int]
    """Title of a group -> number of its columns, in their order."""
    heads: Sequence[Sequence[str]]
    """Lines of the head of each column."""
    rows: Mapping[str, Sequence[Row | None]]
    """Model -> a cell for each column; None if there is none."""


def _pivot(cells: Iterable[tuple[str, str, tuple[str, ...], Row]]) -> Pivot:
    """Return the pivot of (model, title of the group, head, cell)."""
    columns: dict[str, dict[tuple[str, ...], None]] = {}
    rows: dict[str, dict[tuple[str, tuple[str, ...]], Row]] = {}
    for model, group, head, cell in cells:
        columns.setdefault(group, {})[head] = None
        rows.setdefault(model, {})[group, head] = cell
    keys = [(group, head) for group, heads in columns.items() for head in heads]
    return Pivot(
        groups={group: len(heads) for group, heads in columns.items()},
        heads=[head for _, head in keys],
        rows={model: [by_key.get(key) for key in keys] for model, by_key in rows.items()},
    )


def worst_cases(rows: Sequence[Row]) -> Pivot:
    """Return the worst cases of models, or those over the seeds, with a column per budget."""
    return _pivot((row["model"], row["threat_title"], (row["budget"],), row) for row in rows)


def active_tests(record: RunRecord) -> Pivot:
    """Return the active tests of models, with a column per attack."""
    return _pivot(
        (model, "planted examples found", _attack_head(attack), dict(test))
        for model, tested in (record.reliability or {}).items()
        for attack, test in tested.active.items()
    )


def minimal_norms(table: Mapping[str, Any]) -> Pivot:
    """Return accuracies under minimal-norm attacks if only examples within a budget count."""
    cells = []
    for row in table["rows"]:
        for column in table["columns"]:
            cell = row["cells"].get(column["key"], {})
            intervals = cell.get("accuracy_at_budget_interval") or {}
            for budget, accuracy in sorted((cell.get("accuracy_at_budget") or {}).items()):
                norm, _, eps = budget.partition("<=")
                head = (column["attack_title"], budget_text(norm, float(eps)))
                low, high = intervals.get(budget) or (None, None)
                bounds = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
                cells.append((row["model"], column["threat_title"], head, {**bounds, "untrusted": cell["untrusted"]}))
    return _pivot(cells)


def discordant(pairs: Sequence[Row]) -> list[Row]:
    """Return the pairs in which at least one image tells the two models apart."""
    return [pair for pair in pairs if pair["only_model"] or pair["only_against"]]


def _attack_head(attack: str) -> tuple[str, ...]:
    title, settings = attack_title(attack)
    return title, *filter(None, settings.split(", "))
