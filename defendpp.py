"""The Python API of this project (docs/python.md). Nothing heavy is imported before it is used."""

from typing import Any

from pipeline import api
from pipeline.api import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return list(__all__)
