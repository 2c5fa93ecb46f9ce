"""The errors a user can mend. Everything else that escapes is a defect of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_VALUE = 200
"""Characters of a refused value that a message shows."""
FEW_NAMES = 15
"""A message lists so many names beside the one that it suggests."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class UserError(Exception):
    """Something the user gave is wrong. The message names what, where and what to do; no traceback is shown."""


class ConfigError(UserError):
    """A setting is impossible. The message names the field, its value and what is allowed."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> ConfigError:
        """Return the error for a value of a field.

        Args:
            field: the setting as the user knows it, e.g. ``train.lam`` or ``--norm``.
            value: the refused value.
            allowed: what completes the sentence "it must be ...": a noun phrase or a range, then the remedy if that does
                not follow from it.
        """
        shown = repr(value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[:LONGEST_VALUE]}..."
        return cls(f"{field} is {shown}; it must be {allowed}")

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str], listed_by: str = "") -> ConfigError:
        """Return the error for a name that is none of the known ones: it suggests the nearest of them.

        Args:
            kind: what is named, e.g. "recipe" or "field of models[defend]:".
            name: the name as the user wrote it.
            known: the names there are.
            listed_by: the command that lists them, where they are too many for a message.
        """
        names = list(known)
        near = difflib.get_close_matches(name, names)
        told = f"unknown {kind} {name[:LONGEST_VALUE]!r}"
        if near:
            told += f"; did you mean {' or '.join(near)}?"
        if listed_by:
            return cls(told if near else f"{told}; {listed_by} lists what there is")
        if near and len(names) > FEW_NAMES:
            return cls(told)
        return cls(f"{told}{'' if near else ';'} {'There' if near else 'there'} are {', '.join(names)}")


class DataError(UserError):
    """A file or a row of a data set, shard set, checkpoint or record is missing, corrupt or of the wrong shape."""
