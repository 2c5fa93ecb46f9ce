"""The numbers that the Defend++ paper prints, and ours beside them.

``paper.csv`` holds tables 1 to 8 and the results in the text of sec. 4.2, 4.3 and 4.5, typed by
hand, one number per line. ``arch`` is the classifier under attack. ``made_on`` is the network that
the examples were made on, where the paper names it (tables 7 and 8, the end of sec. 4.5). ``note``
says where the paper contradicts itself or leaves something open. Nothing in the file is corrected.
All 194 cells of the tables and the 45 numbers of the text were compared with the paper a second
time on 2026-11-23, without a difference.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.config import PRINTED_IN
from components.errors import ConfigError, DataError
from components.threat_models import CLEAN, RANDOM, TRANSFER, WHITE_BOX
from pipeline.records import EvaluationEntry, RunRecord
from pipeline.reporting.labels import parsed_attack
from pipeline.reporting.over_seeds import accuracy_spread, by_seed
from pipeline.reporting.records import Row

PATH = Path(__file__).resolve().parent / "paper.csv"
FIELDS = ("where", "dataset", "arch", "made_on", "row", "column", "value", "printed_row", "note")
DATASETS = ("mnist", "cifar10", "imagenet")
ARCHS = ("resnet18", "resnet50", "vgg16")
COLUMNS = ("fgsm", "bim", "cw", "ddn", "pgd", "clean")
ROWS = {
    "no_defense": "No defense",
    "adv_fgsm": "Adv. FGSM",
    "adv_ddn": "Adv. DDN",
    "adv_pgd": "Adv. PGD",
    "comdefend": "ComDefend",
    "comdefend_wb": "ComDefend-wb",
    "defend": "ours",
    "defend_gn": "ours + GN",
    "defend_gn_gain": "ours + GN less ours",
    "shared1": "1 shared block",
    "shared2": "2 shared blocks",
    "shared3": "3 shared blocks",
    "shared4": "4 shared blocks",
    "without_lowpass": "ours w/o MS-LP",
    "linear": "ours w/ MS-LI",
    "hourglass": "Hourglass",
    "hourglass_concat": "Hourglass+SC",
    "hourglass_add": "Hourglass+SA",
}
"""Name of a row in ``paper.csv`` -> name in the paper.

``comdefend`` is grey-box. ``defend_gn_gain`` is a difference in points, not an accuracy.
"""
_ALLOWED: Mapping[str, Iterable[str]] = {
    "where": PRINTED_IN,
    "dataset": DATASETS,
    "arch": ARCHS,
    "made_on": ("", *ARCHS),
    "row": ROWS,
    "column": COLUMNS,
}
"""The values that a field of ``paper.csv`` may have."""


@dataclass(frozen=True)
class Printed:
    """One number of the paper, in percent."""

    where: str
    dataset: str
    arch: str
    made_on: str
    row: str
    column: str
    value: float
    text: str
    """The value as printed, e.g. "99.6" or "+1.13"."""
    printed_row: str
    """The name of the row at this place of the paper."""
    note: str

    @property
    def key(self) -> tuple[str, str, str, str, str, str]:
        """What tells a number from all others."""
        return (self.where, self.dataset, self.arch, self.made_on, self.row, self.column)


def load(path: Path = PATH) -> tuple[Printed, ...]:
    """Read every number of the file, in its order.

    Raises:
        DataError: the file cannot be read or is malformed; the message names the line.
    """
    numbers: dict[tuple[str, ...], Printed] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            if tuple(next(reader, ())) != FIELDS:
                raise DataError(f"{path}: the first line must be {','.join(FIELDS)}")
            for cells in reader:
                place = f"{path}, line {reader.line_num}"
                printed = _parsed(cells, place)
                if printed.key in numbers:
                    raise DataError(f"{place}: {' '.join(filter(None, printed.key))} is in the file twice")
                numbers[printed.key] = printed
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
    if not numbers:
        raise DataError(f"{path} holds no number")
    return tuple(numbers.values())


def _parsed(cells: list[str], place: str) -> Printed:
    if len(cells) != len(FIELDS):
        raise DataError(f"{place}: {len(cells)} cells, {len(FIELDS)} are expected")
    line = dict(zip(FIELDS, cells, strict=True))
    for name, allowed in _ALLOWED.items():
        if line[name] not in allowed:
            raise DataError(f"{place}: {name}={line[name]!r} must be one of {', '.join(filter(None, allowed))}")
    text = line.pop("value")
    return Printed(value=_percent(text, place), text=text, **line)


def _percent(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise DataError(f"{place}: value={text!r} must be a number from 0 to 100")
    return value


_numbers = functools.cache(load)


def printed_values(where: str) -> list[Printed]:
    """Return every number printed at ``where``, in the paper's order."""
    if where not in PRINTED_IN:
        raise ConfigError.of("where", where, f"one of {', '.join(PRINTED_IN)}")
    return [p for p in _numbers() if p.where == where]


def beside_paper(record: RunRecord, where: str = "") -> list[Row]:
    """Return each number of the paper's table with all values that this run has for it.

    A recipe names a model as the paper's row (see ROWS), with ``-ARCH`` behind it if a table has
    several. The paper says "white-box" of all its columns, but some can only be transfer
    (docs/evaluation.md). So the values of both are listed.

    Args:
        where: another place of the paper, instead of the experiment's own. In any case only numbers for
            images of the run's kind are answered (grey, colour, colour from 64 pixels on).

    Returns:
        One entry per printed number: where, dataset, row, column, arch, made_on, paper (text as printed),
        note, and ours. ``ours`` is a list of {model, arch (as built), threat_model, attack, n, low,
        high, seeds, mean, sd, min, max}. It is empty if the run has no value.
    """
    experiment = record.experiment
    if not experiment.paper:
        return []
    data = experiment.data
    dataset = "mnist" if data.channels == 1 else "cifar10" if data.image_size < 64 else "imagenet"
    built = {base: config.arch for base, config in experiment.first_replicates().items()}
    groups = by_seed(record)
    return [
        {
            "where": printed.where,
            "dataset": printed.dataset,
            "row": printed.row,
            "title": printed.printed_row,
            "column": printed.column,
            "arch": printed.arch,
            "made_on": printed.made_on,
            "paper": printed.text,
            "note": printed.note,
            "ours": [
                _our_value(key, built[key[0]], list(replicates.values()))
                for key, replicates in groups.items()
                if _belongs(key, printed, built)
            ],
        }
        for printed in printed_values(where or experiment.paper)
        if printed.dataset == dataset
    ]


def _our_value(key: tuple[str, str, str], arch: str, evaluations: list[EvaluationEntry]) -> Row:
    model, threat, attack = key
    return {
        "model": model,
        "arch": arch,
        "threat_model": threat,
        "attack": attack,
        "n": evaluations[0].n,
        **accuracy_spread(evaluations),
    }


def _belongs(key: tuple[str, str, str], printed: Printed, built: Mapping[str, str]) -> bool:
    """Tell whether evaluations of a (model, threat model, attack) belong beside a number of the paper."""
    base, threat, attack = key
    archs = {name: arch.removesuffix("_bn") for name, arch in built.items()}
    if not _is_row(printed.row, base.partition("-")[0], threat):
        return False
    if archs[base] != printed.arch or _column(threat, attack) != printed.column:
        return False
    if printed.made_on:
        return _is_made_on(threat, printed.made_on, archs, base)
    return ":" not in threat


def _is_row(printed_row: str, row: str, threat: str) -> bool:
    """Tell whether evaluations of a model named ``row`` belong to a row of the paper."""
    if printed_row == "comdefend":  # This row is grey-box. White-box has a row of its own.
        return row == "comdefend" and threat != WHITE_BOX
    if printed_row == "comdefend_wb":
        return row == "comdefend" and threat in (CLEAN, WHITE_BOX)
    if printed_row == "shared4":  # The paper: "ours is equivalent to 4 shared blocks".
        return row == "defend"
    return row == printed_row


def _column(threat: str, attack: str) -> str:
    """Return the paper's column for an attack; "" if the paper has none.

    An attack with another norm or a target has another short name than any column.
    """
    if threat == CLEAN:
        return "clean"
    spec = parsed_attack(attack)
    return "" if threat == RANDOM or spec is None else spec.short_name


def _is_made_on(threat: str, arch: str, archs: Mapping[str, str], base: str) -> bool:
    """Tell whether examples of a threat model are made on a network ``arch`` (tables 7 and 8)."""
    if threat == CLEAN:
        return True
    if threat in (WHITE_BOX, TRANSFER):
        return archs[base] == arch
    source = threat.partition(":")[2]
    return bool(source) and source != base and archs.get(source) == arch
