"""The names of a split's files and folders, and of class folders, in a data set's directory.

A name that only resembles a split's is never taken for it: its images would change the test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from components.errors import DataError
from pipeline.runtime.user_files import first_names, printable

SourceSplit = Literal["train", "test"]

WORDS: dict[SourceSplit, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""Names of a split's files or folder, in any case. ``test`` counts before a validation split."""
_FILE = re.compile(
    r"(?P<split>.+?)(?:-(?P<index>\d+)-of-(?P<total>\d+)(?:-[0-9a-z]+)?)?\.parquet", re.IGNORECASE | re.DOTALL
)
"""Name of a split's Parquet file: SPLIT.parquet, SPLIT-NNNNN-of-NNNNN.parquet, or the latter with a
hash at its end, as older uploads to the Hugging Face Hub have it."""


def split_words(test_split: str = "") -> set[str]:
    """Return the usual names of splits, and ``data.test_split``, in lower case."""
    return {word for words in WORDS.values() for word in words} | ({test_split.lower()} if test_split else set())


def names_split(file: str, test_split: str = "") -> bool:
    """Return whether the name of a Parquet file is, or begins as, that of a split."""
    return bool({_beginning(file).lower(), split_of(file).lower()} & split_words(test_split))


def split_of(name: str) -> str:
    """Return the split in the name of a Parquet file, or "" for another file."""
    match = _FILE.fullmatch(name)
    return match["split"] if match else ""


def _beginning(name: str) -> str:
    match = re.match(r"[a-z]+", name, re.IGNORECASE)
    return match[0] if match else ""


def choose_word(place: str, split: SourceSplit, words: Sequence[str], test_split: str = "") -> str | None:
    """Return the name of a split as the directory ``place`` spells it.

    Args:
        words: names in the directory that may be a split's.
        test_split: ``data.test_split``, the user's name for the test images, or "".

    Returns:
        The name, or None if the directory has no such split.

    Raises:
        DataError: two names fit equally well: val beside validation, or Test beside test.
    """
    if test_split and test_split in words:
        return test_split
    named = (test_split.lower(),) if test_split else WORDS[split]
    fitting = sorted({word for word in words if word.lower() in named})
    tests = [word for word in fitting if word.lower() in ("train", "test")] or fitting
    if len(tests) > 1:
        remedy = ", or name it with --data.test-split" if split == "test" else ""
        raise DataError(
            f"{printable(place)} has {' and '.join(map(repr, tests))}, and each may be the {split} split; keep the one "
            f"that you mean and move the other to another directory{remedy}"
        )
    return tests[0] if tests else None


def parquet_files(
    place: str, split: SourceSplit, names: Sequence[str], folders: Mapping[str, Sequence[str]], test_split: str = ""
) -> list[str]:
    """Return the Parquet files of a split in a directory.

    They are SPLIT.parquet, or a complete set of SPLIT-NNNNN-of-NNNNN[-hash].parquet, in the
    directory or in a folder SPLIT. The folder may also have NNNN.parquet, as the Hub writes.

    Args:
        names: the Parquet files in the directory ``place``.
        folders: name of each folder in it -> its Parquet files.
        test_split: as of :func:`choose_word`.

    Returns:
        Paths of the split's files from the directory, sorted.

    Raises:
        DataError: there is none, a numbered set is incomplete or has a part twice, or the name of
            another file begins like the split's (test_hard.parquet beside test.parquet).
    """
    # A user's name means itself alone. A guessed one must not be the beginning of others.
    word_of = {name: split_of(name) if test_split else _beginning(name) for name in names}
    word = choose_word(place, split, [*word_of.values(), *folders], test_split)
    if word is None:
        raise DataError(_no_split(place, split, names, folders, test_split))
    files = sorted(name for name, of in word_of.items() if of == word)
    if files and word in folders:
        raise DataError(
            f"{printable(place)} has the split {word!r} twice: {first_names(files)}, and the folder {word!r}; move one "
            "of them to another directory"
        )
    if not files:
        return [f"{word}/{name}" for name in _checked(f"{place}/{word}", word, sorted(folders[word]), numbered=True)]
    return _checked(place, word, files)


def _no_split(
    place: str, split: SourceSplit, names: Sequence[str], folders: Mapping[str, Sequence[str]], test_split: str
) -> str:
    words = (test_split,) if test_split else WORDS[split][:2]
    forms = " or ".join(f"{word}.parquet, {word}-NNNNN-of-NNNNN.parquet" for word in words)
    text = f"{printable(place)}: no file for the {split} split ({printable(forms)}, or these in a folder); "
    if not names and not folders:
        return (
            text + "the directory has no .parquet file at all, nor have the folders that are one or two levels below it"
        )
    there = sorted(({split_of(name) for name in names} | set(folders)) - set(WORDS["train"]))
    remedy = f". Name one of its splits by --data.test-split: {first_names(there)}" if split == "test" and there else ""
    return text + f"there are only {first_names([*names, *(f'{folder}/' for folder in folders)])}{remedy}"


def _checked(place: str, word: str, files: list[str], numbered: bool = False) -> list[str]:
    """Return the files of a split, in order, if they are a complete set."""
    if numbered and all(re.fullmatch(r"\d+\.parquet", name, re.IGNORECASE) for name in files):
        files = sorted(files, key=lambda name: int(name.partition(".")[0]))
        indices = [int(name.partition(".")[0]) for name in files]
        if indices not in (list(range(len(files))), list(range(1, len(files) + 1))):
            raise DataError(
                f"{printable(place)}: the numbers of its files have a gap ({first_names(files)}); get the missing "
                "ones, and keep each once"
            )
        return files
    if strange := [name for name in files if split_of(name) != word]:
        remedy = ""
        if word.lower() not in WORDS["train"] and not numbered:
            remedy = f", or name one with --data.test-split: {first_names(sorted({split_of(name) for name in files}))}"
        forms = f"{word}.parquet or {word}-NNNNN-of-NNNNN.parquet" + (" or NNNN.parquet" if numbered else "")
        raise DataError(
            f"{printable(place)}: {first_names(strange)} {'is not a file' if len(strange) == 1 else 'are not files'} "
            f"of the split {word!r}, which is {printable(forms)}. Move the files of another split to another "
            f"directory, and rename those that belong to this one{remedy}"
        )
    _check_complete(place, word, {name: match for name in files if (match := _FILE.fullmatch(name))})
    return files


def _check_complete(place: str, word: str, matches: dict[str, re.Match[str]]) -> None:
    """Refuse an incomplete set of files, which would silently be a smaller data set."""
    totals = sorted({int(match["total"]) if match["total"] else 0 for match in matches.values()})
    if len(totals) > 1 or (totals == [0] and len(matches) > 1):
        raise DataError(
            f"{printable(place)}: {first_names(list(matches))} are not one set of files; keep the one that is the "
            f"split {word!r} and move the others to another directory"
        )
    total = totals[0]
    if not total:
        return
    indices = sorted(int(match["index"]) for match in matches.values())
    if len(set(indices)) < len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        same = [name for name, match in matches.items() if int(match["index"]) == twice]
        raise DataError(
            f"{printable(place)}: {' and '.join(map(printable, same))} are the same part of the split {word!r}; keep "
            "one of them and move the other to another directory"
        )
    # Some writers count from 1.
    if len(matches) != total or indices not in (list(range(total)), list(range(1, total + 1))):
        raise DataError(
            f"{printable(place)}: {len(matches)} of {total} {printable(word)}-*-of-*.parquet files are there "
            f"({first_names(list(matches))}); get the missing ones"
        )


def ordered_classes(place: str, names: Sequence[str], order: Literal["", "text", "number"]) -> tuple[str, ...]:
    """Return class folders in the order of their labels.

    torchvision sorts the names as text, timm by the numbers in them. If the two orders differ (2
    and 10, class2 and class10), an external network may follow either. The other permutes labels.

    Args:
        order: ``data.class_order``, or "" if the user gave none.

    Raises:
        DataError: the orders differ and ``order`` is "", or two names are the same number (1 and
            01).
    """
    as_text = tuple(sorted(names))
    by_number = tuple(sorted(as_text, key=_natural_key))
    if order == "number":
        for first, second in itertools.pairwise(by_number):
            if _natural_key(first) == _natural_key(second):
                raise DataError(
                    f"{printable(place)}: class folders {first!r} and {second!r} are the same number; rename one of "
                    "them"
                )
        return by_number
    if not order and as_text != by_number:
        i = next(i for i, (a, b) in enumerate(zip(as_text, by_number, strict=True)) if a != b)
        raise DataError(
            f"{printable(place)}: the class folders' names have numbers, and their labels depend on how they are "
            f"sorted: label {i} is {as_text[i]!r} as text (torchvision's order) and {by_number[i]!r} by number "
            "(timm's). Set --data.class-order to text or number, whichever the network's classes follow"
        )
    return as_text


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key that compares the numbers within a name as numbers, and the rest as text."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]
