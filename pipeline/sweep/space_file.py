"""Search space of a ``--space`` file."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.errors import ConfigError, UserError, one_of
from components.fields import check_name
from components.search_space import Space
from pipeline.runtime import provenance
from pipeline.sweep.options import SweepOptions


def load_space(options: SweepOptions) -> tuple[str, Space]:
    """Load a search space and apply the options that change it. Return its name and the space.

    Raises:
        ConfigError: there is no such file, it is not Python, or its SPACE is missing or impossible.
    """
    path = Path(options.space).expanduser()
    ours = provenance.ROOT / "tune_spaces" / f"{path.name.removesuffix('.py')}.py"
    if not path.is_file() and path.parent == Path() and ours.is_file():
        path = ours
    if not path.is_file():
        names = sorted(p.stem for p in ours.parent.glob("*.py") if p.stem != "__init__")
        allowed = f"a file that exists (in a job: in its working directory), or {one_of(ours.stem, names)}"
        raise ConfigError.of("--space", options.space, allowed)
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError.of("--space", options.space, "a file whose name ends in .py")
    check_name("name of the --space file", path.stem)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise ConfigError(f"{path}: {e}") from None
    except Exception as e:  # The user's file may raise anything.
        moved = isinstance(e, ModuleNotFoundError) and e.name == "components.search"
        remedy = "import from components.search_space" if moved else "mend the file, or copy one of tune_spaces/"
        raise ConfigError(f"{path} is not a search space: {type(e).__name__}: {e}; {remedy}") from e
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise ConfigError(f"{path} has no SPACE = Space(...); copy a file of tune_spaces/ (docs/sweeps.md)")
    changes: dict[str, Any] = {"trials": options.trials, "search": options.search}
    return path.stem, replace(space, **{k: v for k, v in changes.items() if v is not None})
