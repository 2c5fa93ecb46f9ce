"""The command line: which stage, which recipe, which fields of it are different.

python pipeline/main.py run mnist-demo --train.epochs 8 --storage s3://bucket/defendpp
ray job submit --working-dir . -- python pipeline/main.py run mnist-demo --storage /shared/defendpp
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# When run as a script, Python puts pipeline/ on sys.path. The packages are in its parent directory. A user's own networks may
# be in the directory that the command is run from, which comes last so that its modules hide none of the installed ones.
sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(Path(__file__).parent))]
if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())

from pipeline.runtime import interrupts  # noqa: E402

HELP = """\
Trains Defend++ and what it is compared with, attacks all of them, and reports what the numbers mean.

  python pipeline/main.py run RECIPE [--FIELD VALUE ...]       all stages; run again, it continues
  python pipeline/main.py pyramids RECIPE [--FIELD VALUE ...]  stage 1: images to low-pass pyramids in Parquet shards
  python pipeline/main.py train RECIPE [--FIELD VALUE ...]     stage 2: train the recipe's models
  python pipeline/main.py attack RECIPE [--FIELD VALUE ...]    stage 3: attack them, then report
  python pipeline/main.py attack --model FILE [--arch ARCH] [--data SOURCE] [--FIELD VALUE ...]
                                                               a classifier that was not trained here; --help says more
  python pipeline/main.py report RECIPE [--FIELD VALUE ...]    stage 4: tables and plots from the records alone
  python pipeline/main.py sweep RECIPE --space FILE [--FIELD VALUE ...]
                                                               search settings on validation images, test the choice; --help
  python pipeline/main.py run --from FILE [--FIELD VALUE ...]  the experiment that a record holds (best.json, run.json)
  python pipeline/main.py recipes                              the recipes and what they cost
  python pipeline/main.py --version                            the version of this project

What an error message means and what to do about it: docs/errors.md

Fields of a recipe, their types and meanings: python pipeline/main.py run RECIPE --help
"""
COMMANDS = ("run", "pyramids", "train", "attack", "report", "sweep")
PACKAGES = ("components", "pipeline", "tune_spaces")
"""This project's own, which a missing dependency is never one of."""


def main(arguments: list[str]) -> int:
    """Run one command. Returns the exit status: 0, 1 (the run failed), 2 (the command line or a setting is wrong)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"defendpp {version()}")
        return 0
    from components.errors import ConfigError, UserError
    from components.fields import is_unicode
    from pipeline.cli.arguments import names_a_model
    from pipeline.runtime.console import print_error

    command, rest = arguments[0], arguments[1:]
    try:
        for argument in arguments:
            if not is_unicode(argument):
                raise ConfigError(f"{argument!r} is not UTF-8: rename the file or directory, or correct the argument")
        if command == "recipes":
            list_recipes()
            return 0
        if command not in COMMANDS:
            raise ConfigError.unknown("command", command, (*COMMANDS, "recipes"))
        if command == "sweep":
            return sweep(rest)
        experiment = parse(command, rest)
        from pipeline import run

        # An external model is not trained, but its test images and weights still have to be prepared, so run every stage.
        run.execute("run" if command == "attack" and names_a_model(rest) else command, experiment)
        return 0
    except UserError as e:
        print_error(str(e))
        return 2 if isinstance(e, ConfigError) else 1
    except (MemoryError, RuntimeError) as e:
        if not _is_shortage(e):
            raise
        print_error(
            f"this machine has too little memory ({next(iter(str(e).splitlines()), 'out of memory')}): lower --train.width, --data.image-size, "
            "--data.num-classes or --train.batch-size"
        )
        return 1
    except KeyboardInterrupt as e:
        return interrupts.exit_status(e)


def sweep(arguments: list[str]) -> int:
    """Run a sweep. Raises as :func:`parse`, and ConfigError for an option of the sweep's own."""
    from pipeline.cli.arguments import SWEEP_USAGE, parse_sweep

    if not arguments or {"-h", "--help"} & set(arguments):
        print(SWEEP_USAGE, end="")
        return 0 if arguments else 2
    options, rest = parse_sweep(arguments)
    experiment = parse("sweep", rest)
    from pipeline.sweep import run

    run.execute(experiment, options)
    return 0


def _is_shortage(error: Exception) -> bool:
    """Tell whether an array or a tensor did not fit into this machine's memory; torch has no exception of its own for that."""
    torchs = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in torchs)


def version() -> str:
    """Return the project's version: that of this checkout, or of the installed package."""
    import importlib.metadata
    import tomllib

    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return str(project["version"])
    except (OSError, KeyError, ValueError):  # an installed package has no such file beside it
        return importlib.metadata.version("defendpp")


def parse(command: str, arguments: list[str]):  # type: ignore[no-untyped-def]
    """Return the experiment of the recipe named first, with the overrides that follow.

    Raises:
        ConfigError: no or unknown recipe, or a value that the recipe's own checks refuse. tyro itself ends the process
            with status 2 for an unknown field or a value of the wrong type.
    """
    from components.errors import ConfigError
    from pipeline.cli.arguments import names_a_model
    from pipeline.recipes.registry import RECIPES

    if command == "attack" and names_a_model(arguments):
        import tyro

        from pipeline.cli import external_model

        if {"-h", "--help"} & set(arguments):
            print(external_model.USAGE)
            raise SystemExit(0)
        default, rest = external_model.parse(arguments)
        return tyro.cli(type(default), default=default, args=rest, prog="main.py attack --model ...")
    if not arguments or arguments[0] in ("-h", "--help"):
        list_recipes()
        print(f"Fields of a recipe: python pipeline/main.py {command} RECIPE --help")
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name.startswith("--from="):
        name, rest = "--from", [name.removeprefix("--from="), *rest]
    if name == "--from":
        if not rest or not rest[0]:
            raise ConfigError("--from needs a file: the best.json of a sweep, or the run.json of a run")
        default, name, rest = recorded(rest[0]), f"--from {rest[0]}", rest[1:]
    elif name in RECIPES:
        default = RECIPES[name].make()
    elif name.startswith("-"):
        raise ConfigError(f"the recipe comes before {name}: main.py {command} RECIPE {name} ...")
    else:
        raise ConfigError.unknown("recipe", name, RECIPES, "`main.py recipes`")
    import tyro

    return tyro.cli(
        type(default), default=default, args=rest, prog=f"main.py {command} {name}", description=default.description
    )


def recorded(file: str):  # type: ignore[no-untyped-def]
    """Return the experiment that a record holds: best.json of a sweep, run.json of a run.

    Raises:
        StorageError: it cannot be read. ConfigError: it holds none, or one that this version does not know.
    """
    from components.config import Experiment
    from components.errors import ConfigError
    from components.fields import from_dict
    from pipeline.runtime.storage import split_uri

    storage, name = split_uri(file)
    record = storage.read_json(name)
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), dict):
        raise ConfigError.of("--from", file, "a record with an experiment: best.json of a sweep, or run.json of a run")
    try:
        return from_dict(Experiment, record["experiment"])
    except ConfigError as e:
        raise ConfigError(f"the experiment in {file} cannot be run: {e}") from None


def list_recipes() -> None:
    """Print what each recipe shows, the scales it comes at, its models and what it costs."""
    from pipeline.recipes.paper import PAPER
    from pipeline.recipes.registry import RECIPES
    from pipeline.recipes.scales import SCALES

    lines = ["Scales of the paper's tables and figures (NAME-SCALE; NAME alone is NAME-fast):", ""]
    lines += [f"  {scale:<6} {meaning}" for scale, meaning in SCALES.items()]
    lines += ["", "Recipes:"]
    for name, recipe in RECIPES.items():
        base, _, scale = name.rpartition("-")
        if name in PAPER or (base in PAPER and scale != PAPER[base][1][0]):
            continue
        experiment = recipe.make()
        models = f"    models: {', '.join(experiment.first_replicates())}"
        if base not in PAPER:
            lines += ["", name, f"    {experiment.description}", models, f"    {recipe.cost}"]
            continue
        costs = [
            f"{s} {RECIPES[f'{base}-{s}'].cost}" for s in PAPER[base][1] if RECIPES[f"{base}-{s}"].cost != SCALES[s]
        ]
        lines += ["", f"{base}   {' | '.join(PAPER[base][1])}", f"    {PAPER[base][0].__doc__}", models]
        lines += [f"    measured: {'; '.join(costs)}"] if costs else []
    print("\n".join(lines))


def script() -> int:
    """Run the command line of this process. Returns the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a script may be run by any Python
        sys.stderr.write(f"error: this Python ({sys.executable}) is too old: {_right_python()}\n")
        return 1
    from pipeline.runtime import standard_streams

    interrupts.install()
    standard_streams.harden()
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt as e:  # while something was imported
        return interrupts.exit_status(e)
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if not missing or missing in PACKAGES:
            raise
        sys.stderr.write(f"error: this Python ({sys.executable}) lacks {missing}: {_right_python()}\n")
        return 1


def _right_python() -> str:
    python = ROOT / ".venv" / "bin" / "python"
    return f"use {python}, which `make .venv/installed` in {ROOT} sets up"


if __name__ == "__main__":
    interrupts.leave(script())
