"""The numbers the Defend++ paper prints, typed by hand: tables 1 to 8 and the results in the text of sec. 4.2, 4.3 and 4.5.

``data/paper.csv`` has one line a number. ``arch`` is the classifier under attack. ``made_on`` is the network the attack was
made on, given where the paper gives it (tables 7 and 8, the end of sec. 4.5) and empty otherwise. ``note`` says where the paper
contradicts itself or leaves something open. Nothing in the file is corrected. Read a second time against the paper's text on
2026-11-23: all 194 cells of the tables and the 45 numbers of the text, no difference.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

from components.config import PRINTED_IN
from components.errors import ConfigError, DataError

PATH = Path(__file__).resolve().parent / "data" / "paper.csv"
FIELDS = ("where", "dataset", "arch", "made_on", "row", "column", "value", "printed_row", "note")
WHERE = PRINTED_IN
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
"""Slug -> the paper's name. ``comdefend`` is the grey-box one; ``defend_gn_gain`` is a difference in points, not an accuracy."""


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
    """The name the number goes by at this place."""
    note: str

    @property
    def key(self) -> tuple[str, str, str, str, str, str]:
        return (self.where, self.dataset, self.arch, self.made_on, self.row, self.column)


def load(path: Path = PATH) -> tuple[Printed, ...]:
    """Every number of the file, in its order. A malformed file is a DataError that names the line."""
    known = {
        "where": WHERE,
        "dataset": DATASETS,
        "arch": ARCHS,
        "made_on": ("", *ARCHS),
        "row": ROWS,
        "column": COLUMNS,
    }
    found: dict[tuple[str, ...], Printed] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            if tuple(next(reader, ())) != FIELDS:
                raise DataError(f"{path}: the first line must be {','.join(FIELDS)}")
            for cells in reader:
                place = f"{path}, line {reader.line_num}"
                if len(cells) != len(FIELDS):
                    raise DataError(f"{place}: {len(cells)} cells, {len(FIELDS)} are expected")
                line = dict(zip(FIELDS, cells, strict=True))
                for field, allowed in known.items():
                    if line[field] not in allowed:
                        raise DataError(
                            f"{place}: {field}={line[field]!r} is none of {', '.join(filter(None, allowed))}"
                        )
                text = line.pop("value")
                printed = Printed(value=_percent(text, place), text=text, **line)
                if printed.key in found:
                    raise DataError(f"{place}: {' '.join(filter(None, printed.key))} stands there twice")
                found[printed.key] = printed
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
    if not found:
        raise DataError(f"{path} holds no number")
    return tuple(found.values())


def _percent(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise DataError(f"{place}: value={text!r} is no number from 0 to 100")
    return value


_numbers = functools.cache(load)


def printed(where: str) -> list[Printed]:
    """Every number printed at ``where``, in the paper's order."""
    if where not in WHERE:
        raise ConfigError.of("where", where, f"one of {', '.join(WHERE)}")
    return [p for p in _numbers() if p.where == where]


def lookup(where: str, row: str, column: str, made_on: str = "", arch: str = "", dataset: str = "") -> Printed | None:
    """The number at one place, None if the paper prints none there.

    ``made_on`` counts as it is: tables 7 and 8 need it. An empty ``arch`` or ``dataset`` stands for the only one there is.
    """
    found = [
        p
        for p in printed(where)
        if (p.row, p.column, p.made_on) == (row, column, made_on)
        and arch in ("", p.arch)
        and dataset in ("", p.dataset)
    ]
    if len(found) > 1:
        choices = ", ".join(f"{p.dataset} {p.arch}" for p in found)
        raise ConfigError(f"{where} prints {row} {column} {len(found)} times: say which dataset and arch ({choices})")
    return found[0] if found else None
