"""The command line: a stage, a recipe, and the fields of it to override.

python pipeline/main.py run mnist-demo --train.epochs 8 --storage s3://bucket/defendpp
ray job submit --working-dir . -- python pipeline/main.py run mnist-demo --storage /shared/defendpp
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# When run as a script, Python puts pipeline/ on sys.path. The packages are in its parent directory.
# A user's networks may be in the working directory. It comes last: it must not hide packages.
sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(Path(__file__).parent))]
if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())

from pipeline.runtime import interrupts  # noqa: E402

HELP = """\
Trains Defend++ and the models that it is compared with, attacks all of them, and reports what the numbers mean.

  python pipeline/main.py run RECIPE [--FIELD VALUE ...]       all stages; the same command again continues
  python pipeline/main.py pyramids RECIPE [--FIELD VALUE ...]  stage 1: images to low-pass pyramids in Parquet shards
  python pipeline/main.py train RECIPE [--FIELD VALUE ...]     stage 2: train the recipe's models
  python pipeline/main.py attack RECIPE [--FIELD VALUE ...]    stage 3: attack them, then report
  python pipeline/main.py attack --model FILE [--arch ARCH] [--data SOURCE] [--FIELD VALUE ...]
                                                               stage 3 on a classifier that was not trained here; --help
  python pipeline/main.py report RECIPE [--FIELD VALUE ...]    stage 4: tables and plots from the records alone
  python pipeline/main.py report --republish DIR [DIR ...]     publish finished records in MLflow anew; --help
  python pipeline/main.py sweep RECIPE --space FILE [--FIELD VALUE ...]
                                                               search settings, test the choice; --help
  python pipeline/main.py export MODEL_DIR --out FILE          a trained classifier for other programs; --help
  python pipeline/main.py run --from FILE [--FIELD VALUE ...]  the experiment that a record holds (best.json, run.json)
  python pipeline/main.py recipes                              the recipes and what they cost
  python pipeline/main.py --version                            the version of this project

What an error message means and what to do about it: docs/errors.md

Fields of a recipe, their types and meanings: python pipeline/main.py run RECIPE --help
"""
COMMANDS = ("run", "pyramids", "train", "attack", "report", "sweep")
PACKAGES = ("components", "pipeline", "tune_spaces")
"""Packages of this project, which are no dependencies."""


def main(arguments: list[str]) -> int:
    """Run one command. Return 0, 1 (the run failed) or 2 (the command line or a setting is wrong)."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"defendpp {version()}")
        return 0
    from components.errors import ConfigError, UserError
    from pipeline.runtime.console import print_error

    try:
        return _run_command(arguments[0], arguments[1:])
    except UserError as e:
        print_error(str(e))
        return 2 if isinstance(e, ConfigError) else 1
    except (MemoryError, RuntimeError) as e:
        if not is_memory_shortage(e):
            raise
        reason = next(iter(str(e).splitlines()), "out of memory")
        print_error(
            f"this machine has too little memory ({reason}): lower --train.width, --data.image-size, "
            "--data.num-classes or --train.batch-size"
        )
        return 1
    except KeyboardInterrupt as e:
        return interrupts.exit_status(e)


def _run_command(command: str, arguments: list[str]) -> int:
    from components.errors import ConfigError
    from components.fields import is_unicode
    from pipeline.cli.arguments import has_option, names_external_model

    for argument in (command, *arguments):
        if not is_unicode(argument):
            raise ConfigError(f"{argument!r} is not UTF-8: rename the file or directory, or correct the argument")
    if command == "export":
        from pipeline.cli import export

        return export.execute(arguments)
    if command not in (*COMMANDS, "recipes"):
        raise ConfigError.unknown("command", command, (*COMMANDS, "export", "recipes"))
    if command == "sweep":
        return _run_sweep(arguments)
    if command == "report" and has_option(arguments, "--republish"):
        from pipeline.cli.republish import republish

        republish(arguments)
        return 0
    from pipeline.cli.recipe_arguments import parse_experiment, recipe_list

    if command == "recipes":
        print(recipe_list())
        return 0
    experiment = parse_experiment(command, arguments)
    # Run every stage for an external model: its test images and weights have to be prepared.
    stage = "run" if names_external_model(command, arguments) else command
    from pipeline import run

    run.execute(stage, experiment)
    return 0


def _run_sweep(arguments: list[str]) -> int:
    from pipeline.cli.arguments import SWEEP_USAGE, parse_sweep
    from pipeline.cli.recipe_arguments import parse_experiment

    if not arguments or {"-h", "--help"} & set(arguments):
        print(SWEEP_USAGE, end="")
        return 0 if arguments else 2
    options, rest = parse_sweep(arguments)
    experiment = parse_experiment("sweep", rest)
    from pipeline.sweep import run

    run.execute(experiment, options)
    return 0


def is_memory_shortage(error: Exception) -> bool:
    """Tell whether memory was too small for an array or a tensor. Torch has no exception for it."""
    torch_texts = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in torch_texts)


def version() -> str:
    """Return the project's version: that of this checkout, or of the installed package."""
    import importlib.metadata
    import tomllib

    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return str(project["version"])
    except (OSError, KeyError, ValueError):  # An installed package has no such file beside it.
        return importlib.metadata.version("defendpp")


def script() -> int:
    """Run the command line of this process, and return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may run a script
        sys.stderr.write(f"error: this Python ({sys.executable}) is too old: {_right_python()}\n")
        return 1
    from pipeline.runtime import standard_streams

    interrupts.install()
    standard_streams.harden()
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt as e:  # It came during an import.
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
