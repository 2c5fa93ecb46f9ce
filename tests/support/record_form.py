"""The form of a record: its keys and the types of its values."""

from __future__ import annotations

import json
from typing import Any


def form(value: Any) -> Any:
    """Replace each value of a record by its type, and each list by the forms of its items."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, list):
        forms = {json.dumps(form(item), sort_keys=True) for item in value}
        return [json.loads(text) for text in sorted(forms)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__
