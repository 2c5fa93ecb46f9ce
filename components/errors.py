"""Errors that a user can fix; any other exception is a defect of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_VALUE = 200
"""Largest number of characters of a refused value in a message."""
FEW_NAMES = 15
"""Largest number of names that a message lists beside a suggestion."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """Return ``; did you mean a or b?`` for the names that a refused value may stand for, or ""."""
    near = difflib.get_close_matches(str(value), list(names))
    return f"; did you mean {' or '.join(near)}?" if near else ""


def one_of(value: object, choices: Iterable[str]) -> str:
    """Return ``one of a, b, c``, and which of them a refused value may stand for."""
    names = list(choices)
    shown = ", ".join(filter(None, names)) + (", or empty" if "" in names else "")
    return f"one of {shown}" + did_you_mean(value, filter(None, names))


class UserError(Exception):
    """Error in what the user provided.

    The message says what is wrong, where, and what to do; no traceback is shown.
    """


class ConfigError(UserError):
    """Impossible setting.

    The message names the field, its value and what is allowed.
    """

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> ConfigError:
        """Return the error for a refused value of a field.

        Args:
            field: the setting as the user knows it, e.g. ``train.lam`` or ``--norm``.
            value: the refused value.
            allowed: end of the sentence "it must be ...": a noun phrase or a range, then the remedy
                if that does not follow from it.
        """
        shown = repr(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE]}..."
        return cls(f"{field} is {shown}; it must be {allowed}")

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str], listed_by: str = "") -> ConfigError:
        """Return the error for an unknown name, with the nearest known names.

        Args:
            kind: kind of thing that is named, e.g. "recipe" or "field of models[defend]:".
            name: the name as the user wrote it.
            known: the names that exist.
            listed_by: the command that lists them, if they are too many for a message.
        """
        names = list(known)
        near = did_you_mean(name, names)
        message = f"unknown {kind} {name[:LONGEST_VALUE]!r}{near}"
        if listed_by:
            return cls(message if near else f"{message}; {listed_by} lists what there is")
        if near and len(names) > FEW_NAMES:
            return cls(message)
        return cls(f"{message}{'' if near else ';'} {'There' if near else 'there'} are {', '.join(names)}")


class DataError(UserError):
    """Missing, corrupt or wrongly shaped file or row.

    It belongs to a data set, shard set, checkpoint or record.
    """
