"""The errors a user can mend. Everything else that escapes is a defect of ours and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong. The message names what, where and what to do; no traceback is shown."""


class ConfigError(UserError):
    """A setting is impossible. The message names the field, its value and what is allowed."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> ConfigError:
        return cls(f"{field}={value!r} is not possible: {allowed}")


class DataError(UserError):
    """A file or a row of a data set, shard set, checkpoint or record is missing, corrupt or of the wrong shape."""
