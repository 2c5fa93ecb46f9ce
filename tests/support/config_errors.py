"""Assertions about the errors of configs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.errors import ConfigError


def assert_refused(make: Callable[[], object], field: str, value: object, allowed: str) -> None:
    """Check that the error names the field, the value as Python writes it, and the allowed values."""
    with pytest.raises(ConfigError) as error:
        make()
    text = str(error.value)
    assert text.startswith(f"{field} is {value!r}; it must be "), text
    assert allowed in text.partition("; it must be ")[2], text


def assert_error_has(make: Callable[[], object], *parts: str) -> None:
    """Check that the error contains each of these parts."""
    with pytest.raises(ConfigError) as error:
        make()
    for part in parts:
        assert part in str(error.value)
