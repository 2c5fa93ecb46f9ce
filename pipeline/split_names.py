"""Which files, folders and class folders of a data set's directory are a split's, by name alone.

A name that only resembles a split's name is never taken for it: merged with the split's own images, it would be another test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Literal

from components.errors import DataError

SourceSplit = Literal["train", "test"]

WORDS: dict[SourceSplit, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""What a split's files or folder may be called, in any case. ``test`` counts before the names of a validation split."""
_PARQUET = re.compile(r"-(?P<index>\d+)-of-(?P<total>\d+)(-[0-9a-z]+)?\.parquet|\.parquet", re.IGNORECASE)
"""What follows the split's word in the name of a Parquet file: WORD.parquet, WORD-NNNNN-of-NNNNN.parquet, or the latter with a
hash at its end, as older uploads to the Hugging Face Hub have it."""


def choose_word(place: str, split: SourceSplit, words: Sequence[str]) -> str | None:
    """Return the name, as it is spelled there, by which the directory ``place`` has a split.

    Args:
        place: for the message.
        words: names in the directory that may be a split's.

    Returns:
        None if there is none.

    Raises:
        DataError: two names fit equally well: val beside validation, or Test beside test.
    """
    fitting = sorted({word for word in words if word.lower() in WORDS[split]})
    tests = [word for word in fitting if word.lower() in ("train", "test")] or fitting
    if len(tests) > 1:
        raise DataError(
            f"{place} has {' and '.join(map(repr, tests))}, and each may be the {split} split; keep the one that you mean and move "
            "the other to another directory"
        )
    return tests[0] if tests else None


def parquet_files(place: str, split: SourceSplit, names: Sequence[str]) -> list[str]:
    """Return the names of a split's Parquet files: WORD.parquet, or a complete set of WORD-NNNNN-of-NNNNN[-hash].parquet.

    Args:
        place: the directory, for messages.
        names: the files in it.

    Returns:
        The split's files, sorted.

    Raises:
        DataError: there is none, one of a numbered set is missing or there twice, or a file whose name begins like the split's is
            not one of its files (test_hard.parquet beside test.parquet).
    """
    present = [name for name in names if name.lower().endswith(".parquet")]
    beginnings = {name: match[0] for name in present if (match := re.match(r"[a-z]+", name, re.IGNORECASE))}
    word = choose_word(place, split, list(beginnings.values()))
    if word is None:
        wanted = " or ".join(f"{w}.parquet, {w}-NNNNN-of-NNNNN.parquet" for w in WORDS[split][:2])
        raise DataError(
            f"{place}: no file for the {split} split ({wanted}); "
            + ("there are only " + ", ".join(present[:5]) if present else "the directory has no .parquet file at all")
        )
    files = sorted(name for name, beginning in beginnings.items() if beginning == word)
    matches = {name: _PARQUET.fullmatch(name, len(word)) for name in files}
    if strange := [name for name, match in matches.items() if match is None]:
        raise DataError(
            f"{place}: {', '.join(strange[:5])} {'is not a file' if len(strange) == 1 else 'are not files'} of the split {word!r}, "
            f"which is {word}.parquet or {word}-NNNNN-of-NNNNN.parquet. Move the files of another split to another directory, and "
            "rename those that belong to this one"
        )
    _check_complete(place, word, {name: match for name, match in matches.items() if match is not None})
    return files


def _check_complete(place: str, word: str, matches: dict[str, re.Match[str]]) -> None:
    """Check that the files are one whole: a file lost in a download would silently be a smaller data set."""
    totals = sorted({int(match["total"]) if match["total"] else 0 for match in matches.values()})
    if len(totals) > 1 or (totals == [0] and len(matches) > 1):
        raise DataError(
            f"{place}: {', '.join(list(matches)[:5])} are not one set of files; keep the one that is the split {word!r} and move "
            "the others to another directory"
        )
    total = totals[0]
    if not total:
        return
    indices = sorted(int(match["index"]) for match in matches.values())
    if len(set(indices)) < len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        same = [name for name, match in matches.items() if int(match["index"]) == twice]
        raise DataError(
            f"{place}: {' and '.join(same)} are the same part of the split {word!r}; keep one of them and move the other to another "
            "directory"
        )
    # some writers count from 1
    if indices not in (list(range(total)), list(range(1, total + 1))):
        raise DataError(
            f"{place}: {len(matches)} of {total} {word}-*-of-*.parquet files are there ({', '.join(list(matches)[:5])}); get the "
            "missing ones"
        )


def ordered_classes(place: str, names: Sequence[str], order: Literal["", "text", "number"]) -> tuple[str, ...]:
    """Return class folders in the order of their labels.

    torchvision sorts the names as text, timm by the numbers in them. Where the two differ (2 and 10, class2 and class10), a
    network whose weights come from elsewhere may have been trained on either, and the wrong one permutes all labels.

    Args:
        place: the directory, for the message.
        names: the folders.
        order: ``data.class_order``; empty where the user did not say.

    Raises:
        DataError: the orders differ and ``order`` does not say which is meant, or the order by number does not tell two names
            apart (1 and 01).
    """
    as_text = tuple(sorted(names))
    by_number = tuple(sorted(as_text, key=_natural_key))
    if order == "number":
        for first, second in itertools.pairwise(by_number):
            if _natural_key(first) == _natural_key(second):
                raise DataError(
                    f"{place}: class folders {first!r} and {second!r} are the same number; rename one of them"
                )
        return by_number
    if not order and as_text != by_number:
        i = next(i for i, (a, b) in enumerate(zip(as_text, by_number, strict=True)) if a != b)
        raise DataError(
            f"{place}: the class folders' names have numbers, and their labels depend on how they are sorted: label {i} is "
            f"{as_text[i]!r} as text (torchvision's order) and {by_number[i]!r} by number (timm's). Set data.class_order to text or "
            "number, whichever the network's classes follow"
        )
    return as_text


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that compares the whole numbers within a name as numbers and the rest as text."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]
