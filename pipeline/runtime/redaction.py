"""Passwords and keys in URIs: kept out of records, logs and messages."""

from __future__ import annotations

import re
from typing import Any

from components.errors import ConfigError

# A password may contain any character but whitespace: the host begins after the last "@".
_PASSWORD = re.compile(r"(\w://)[^\s/:?#]*:\S*@")
# A user without a password may be an access token, except in schemes of storages, where it is the
# name of a container or an account.
_TOKEN = re.compile(
    r"\b(?!(?:abfss?|gs|gcs|s3a?|hdfs|viewfs|webhdfs|sftp|ssh|hf)://)([a-z][\w+.-]*://)[^\s/?#]*@", re.I
)
_SECRET_OPTION = re.compile(
    r"([?&](?![^=&\s]*_(?:kind|type)=)[^=&\s]*"
    r"(?:key|secret|token|passw|passphrase|pwd|signature|credential|odbc_connect|(?<![a-z])(?:pass|auth|sig)(?![a-z]))"
    r"[^=&\s]*=)[^&\s]*[^&\s'\",;.)]",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """Replace ``user:password@`` and ``token@`` in the URIs of a text by ``***@``.

    The values of secret options are replaced by ``***``. An ambiguous text loses too much rather
    than too little: ``http://host:1/a@b`` becomes ``http://***@b``.
    """
    return _SECRET_OPTION.sub(r"\1***", _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1***@", text)))


def redacted(value: Any) -> Any:
    """Return a copy of a JSON value with :func:`without_password` applied to every string."""
    if isinstance(value, str):
        return without_password(value)
    if isinstance(value, dict):
        return {k: redacted(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(v) for v in value]
    return value


def check_no_secret(uri: str) -> None:
    """Refuse a URI with a password or key.

    Raises:
        ConfigError: the message says where the secret belongs, without repeating it.
    """
    shown = without_password(uri)
    if shown != uri:
        raise ConfigError(
            f"the URI {shown} holds a password or key, which would appear in records and reports. Give it without: "
            "object stores take theirs from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS) on every node"
        )
