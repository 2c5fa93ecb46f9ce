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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.attacks.spec import AttackSpec
from components.config import PRINTED_IN
from components.errors import ConfigError, DataError
from pipeline.reporting.over_seeds import Row, by_seed, spread
from pipeline.reporting.records import experiment_of

PATH = Path(__file__).resolve().parent / "paper.csv"
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


def printed_value(where: str) -> list[Printed]:
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
        for p in printed_value(where)
        if (p.row, p.column, p.made_on) == (row, column, made_on)
        and arch in ("", p.arch)
        and dataset in ("", p.dataset)
    ]
    if len(found) > 1:
        choices = ", ".join(f"{p.dataset} {p.arch}" for p in found)
        raise ConfigError(f"{where} prints {row} {column} {len(found)} times: say which dataset and arch ({choices})")
    return found[0] if found else None


def beside_paper(record: Mapping[str, Any]) -> list[Row]:
    """Each cell of the paper's table with all that this run has for it.

    A recipe's model is named as the paper's row (``pipeline/reporting/paper.py``), with ``-ARCH`` behind it where a table has several.
    The paper says "white-box" of all its columns; some can only be transfer (docs/evaluation.md), so both stand here.

    Returns:
        One entry per printed number: where, row, column, arch, made_on, paper (text as printed), note, ours: a list of
        {model, arch (as built), threat_model, attack, n, low, high, seeds, mean, sd, min, max}; ``ours`` is empty where the
        run has nothing.
    """
    experiment = experiment_of(record)
    if not experiment.paper:
        return []
    built = {base: config.arch for base, config in experiment.first_replicates().items()}
    archs = {base: arch.removesuffix("_bn") for base, arch in built.items()}
    cells = by_seed(record)
    out = []
    for printed in printed_value(experiment.paper):
        entry: Row = {
            "where": printed.where,
            "row": printed.row,
            "title": printed.printed_row,
            "column": printed.column,
            "arch": printed.arch,
            "made_on": printed.made_on,
            "paper": printed.text,
            "note": printed.note,
            "ours": [],
        }
        for (base, threat, attack), found in cells.items():
            if not _is_row(printed.row, base.partition("-")[0], threat):
                continue
            if archs[base] != printed.arch or _column(threat, attack) != printed.column:
                continue
            if printed.made_on and not _made_on(threat, printed.made_on, archs, base):
                continue
            if not printed.made_on and ":" in threat:
                continue
            ours = list(found.values())
            metrics = [e["metrics"] for e in ours]
            entry["ours"].append(
                {
                    "model": base,
                    "arch": built[base],
                    "threat_model": threat,
                    "attack": attack,
                    "n": ours[0]["n"],
                    "low": min(m["accuracy_low"] for m in metrics),
                    "high": max(m["accuracy_high"] for m in metrics),
                    **spread([m["accuracy"] for m in metrics]),
                }
            )
        out.append(entry)
    return out


def _is_row(printed_row: str, row: str, threat: str) -> bool:
    """Whether evaluations of a model named ``row`` under a threat model belong to a row of the paper."""
    if printed_row == "comdefend":  # grey-box; the white-box one has a row of its own
        return row == "comdefend" and threat != "white_box"
    if printed_row == "comdefend_wb":
        return row == "comdefend" and threat in ("clean", "white_box")
    if printed_row == "shared4":  # "ours is equivalent to 4 shared blocks"
        return row == "defend"
    return row == printed_row


def _column(threat: str, attack: str) -> str:
    """The attack by the name that a column of the paper would have; empty where it could have none."""
    if threat == "clean":
        return "clean"
    if threat == "random":
        return ""
    try:
        spec = AttackSpec.parse(attack)
    except ConfigError:  # an attack of another version
        return ""
    return spec.short_name  # with another norm or a target it is no column of the paper's


def _made_on(threat: str, arch: str, archs: Mapping[str, str], base: str) -> bool:
    """Whether examples of this threat model are made on a network of that architecture (tables 7 and 8)."""
    if threat == "clean":
        return True
    if threat in ("white_box", "transfer"):
        return archs[base] == arch
    named = threat.partition(":")[2]
    return bool(named) and named != base and archs.get(named) == arch
