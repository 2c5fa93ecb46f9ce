"""Networks of a user's own: how MODULE:FUNCTION is imported, and what is said where that fails. Knows no torch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from components.errors import ConfigError
from components.models import libraries

_SEARCHED = "in the directory that the command is run from, installed, or on PYTHONPATH"


def is_own(arch: str) -> bool:
    """Tell whether ``train.arch`` is MODULE:FUNCTION, which imports code of the user's."""
    module, colon, _ = arch.partition(":")
    return bool(colon) and module not in libraries.LIBRARIES


def import_function(arch: str) -> Callable[..., object]:
    """Import the function that MODULE:FUNCTION names.

    Raises:
        ConfigError: there is none, or its module cannot be imported.
    """
    module_name, _, function_name = arch.partition(":")
    with importing(arch):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        there = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ConfigError(
            f"train.arch is {arch!r}; module {module_name!r} ({getattr(module, '__file__', None) or 'built in'}) has no function {function_name!r}; "
            f"it has {', '.join(there) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def importing(arch: str) -> Iterator[None]:
    """Turn whatever the import of the module of MODULE:FUNCTION raises into one error.

    Raises:
        ConfigError: whatever the module's own code raised, the end of the process included.
    """
    module_name = arch.partition(":")[0]
    try:
        with _as_without_arguments(module_name):
            yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"train.arch is {arch!r}; module {module_name!r} cannot be imported ({reason(e)}). {where_found(module_name)}It must "
            f"be on the Python path of every process: {_SEARCHED}"
        ) from e


@contextlib.contextmanager
def _as_without_arguments(module_name: str) -> Iterator[None]:
    """Hide this command's arguments from a script that parses its own when it is imported, or called."""
    arguments, error = sys.argv, argparse.ArgumentParser.error
    sys.argv = [module_name]
    # argparse itself would print the usage of a script that the user did not call
    argparse.ArgumentParser.error = _exit_with  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sys.argv, argparse.ArgumentParser.error = arguments, error  # type: ignore[method-assign]


def _exit_with(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SystemExit(message)


def calling(arch: str, function: Callable[..., object], sizes: dict[str, int]) -> object:
    """Return what FUNCTION returns for these sizes.

    Raises:
        ConfigError: whatever the user's own code raised, with the line, since no traceback is shown.
    """
    try:
        with _as_without_arguments(arch.partition(":")[0]):
            return function(**sizes)
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigError(
            f"train.arch is {arch!r}; calling it with {given} failed ({reason(e)}; {frame.filename}:{frame.lineno})"
        ) from e


def reason(error: BaseException) -> str:
    """Return an error's type and text; of the end of a process, what it was ended with."""
    if isinstance(error, SystemExit):
        return f"it ends the process: {error}; let a script do so only below if __name__ == '__main__'"
    return f"{type(error).__name__}: {error}"


def where_found(module_name: str) -> str:
    """Say which file the name's first part stands for: often another package of that name is found first."""
    package = module_name.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    if "." not in module_name or not file:
        return ""
    return f"{package!r} is {file} here: if that is not yours, rename your package. "
