"""Passwords and keys in URIs: kept out of records, logs and messages."""

from __future__ import annotations

import re
from typing import Any

from components.errors import ConfigError

# A password may hold any character but whitespace: the host begins behind the last "@".
_PASSWORD = re.compile(r"(\w://)[^\s/:?#]*:\S*@")
# A user without a password may be an access token, but where a scheme of storages has a container or an account's name there.
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
    """Replace the ``user:password@`` or ``token@`` of every URI in a text by ``***@``, and its secret options by ``***``.

    A text whose words could be read either way loses too much rather than too little: ``http://host:1/a@b`` is shown as
    ``http://***@b``.
    """
    return _SECRET_OPTION.sub(r"\1***", _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1***@", text)))


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
    shown = without_password(uri)
    if shown != uri:
        raise ConfigError(
            f"the URI {shown} holds a password or key, which would stand in records and reports. Give it without: "
            "object stores take theirs from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS) on every node"
        )
