"""Passwords and keys in URIs: kept out of records, logs and messages."""

from __future__ import annotations

import re
from typing import Any

from components.errors import ConfigError

_USER_INFO = re.compile(r"(\w://)[^/\s'\"]*@")
_PASSWORD = re.compile(r"\w://[^/\s'\"@]*:[^/\s'\"]+@")
_SECRET_OPTION = re.compile(
    r"([?&][^=&\s'\"]*(?:key|secret|token|password|passwd|pwd|signature|credential|\bsig\b)[^=&\s'\"]*=)[^&\s'\"]+",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """Replace the ``user:password@`` of every URI in a text by ``***@``, and values of its secret options by ``***``."""
    return _SECRET_OPTION.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def redacted(value: Any) -> Any:
    """Return a copy of plain JSON types with :func:`without_password` applied to every string in it."""
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, dict):
        return {k: redacted(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(v) for v in value]
    return value


def check_no_secret(uri: str) -> None:
    """Refuse a URI that holds a password or key.

    Raises:
        ConfigError: says where the secret belongs instead; does not repeat it.
    """
    if _PASSWORD.search(uri) or _SECRET_OPTION.search(uri):
        raise ConfigError(
            f"the URI {without_password(uri)} holds a password or key, which would stand in records and reports. Give it without: "
            "object stores take theirs from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS) on every node"
        )
