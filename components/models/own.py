"""Import of a user's own networks, named MODULE:FUNCTION, with one error for whatever fails.

No torch is imported here.
"""

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
    """Tell whether ``train.arch`` is MODULE:FUNCTION, which imports the user's own code."""
    module, colon, _ = arch.partition(":")
    return bool(colon) and module not in libraries.LIBRARIES


def import_function(arch: str) -> Callable[..., object]:
    """Import the function that MODULE:FUNCTION names.

    Raises:
        ConfigError: the function does not exist, or its module cannot be imported.
    """
    module_name, _, function_name = arch.partition(":")
    with importing(arch):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        file = getattr(module, "__file__", None) or "built in"
        raise ConfigError(
            f"train.arch is {arch!r}; module {module_name!r} ({file}) has no function {function_name!r}; "
            f"it has {', '.join(functions) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def importing(arch: str) -> Iterator[None]:
    """Turn any error of the import of MODULE into one ConfigError.

    Raises:
        ConfigError: the module's own code raised an error or ended the process.
    """
    module_name = arch.partition(":")[0]
    try:
        with _as_without_arguments(module_name):
            yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"train.arch is {arch!r}; module {module_name!r} cannot be imported ({reason(e)}). "
            f"{where_found(module_name)}It must be on the Python path of every process: {_SEARCHED}"
        ) from e


@contextlib.contextmanager
def _as_without_arguments(module_name: str) -> Iterator[None]:
    """Hide this command's arguments from a user's script.

    The script may parse its own arguments when it is imported or called.
    """
    arguments, error = sys.argv, argparse.ArgumentParser.error
    sys.argv = [module_name]
    # argparse itself would print the usage of a script that the user did not call.
    argparse.ArgumentParser.error = _exit_with  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sys.argv, argparse.ArgumentParser.error = arguments, error  # type: ignore[method-assign]


def _exit_with(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SystemExit(message)


def calling(arch: str, function: Callable[..., object], sizes: dict[str, int]) -> object:
    """Return the result of FUNCTION for these sizes.

    Raises:
        ConfigError: the user's own code raised an error. The message has its line, since no
            traceback is shown.
    """
    try:
        with _as_without_arguments(arch.partition(":")[0]):
            return function(**sizes)
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        arguments = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigError(
            f"train.arch is {arch!r}; calling it with {arguments} failed ({reason(e)}; {frame.filename}:{frame.lineno})"
        ) from e


def reason(error: BaseException) -> str:
    """Return an error's type and text, or how the process was ended."""
    if isinstance(error, SystemExit):
        return f"it ends the process: {error}; let a script do so only below if __name__ == '__main__'"
    return f"{type(error).__name__}: {error}"


def where_found(module_name: str) -> str:
    """Return a sentence that says which file the first part of the name is.

    Often another package of the same name is found first.
    """
    package = module_name.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    if "." not in module_name or not file:
        return ""
    return f"{package!r} is {file} here: if that is not yours, rename your package. "
