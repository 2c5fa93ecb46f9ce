"""The search space of a ``--space`` file."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.errors import ConfigError, UserError
from components.fields import check_name
from components.search_space import Space
from pipeline.runtime import provenance
from pipeline.sweep.options import SweepOptions


def load_space(options: SweepOptions) -> tuple[str, Space]:
    """The space of a file, with what the command line changes of it, and its name: the file's.

    Raises:
        ConfigError: no such file, one that is not Python, has no SPACE, or whose SPACE is not possible.
    """
    path = Path(options.space).expanduser()
    beside = provenance.ROOT / "tune_spaces" / f"{path.name.removesuffix('.py')}.py"
    if not path.is_file() and path.parent == Path() and beside.is_file():
        path = beside
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in beside.parent.glob("*.py") if p.stem != "__init__"))
        raise ConfigError.of(
            "--space", options.space, f"a file that exists (in a job: in its working directory), or one of {there}"
        )
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError.of("--space", options.space, "a file whose name ends in .py")
    check_name("name of the --space file", path.stem)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise ConfigError(f"{path}: {e}") from None
    except Exception as e:  # whatever the user's file does
        raise ConfigError(
            f"{path} is not a search space: {type(e).__name__}: {e}; mend the file, or copy one of tune_spaces/"
        ) from e
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise ConfigError(f"{path} has no SPACE = Space(...); copy a file of tune_spaces/ (docs/sweeps.md)")
    changed: dict[str, Any] = {"trials": options.trials, "search": options.search}
    return path.stem, replace(space, **{k: v for k, v in changed.items() if v is not None})
