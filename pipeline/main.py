"""The command line: a command, a recipe, and the fields of it to override.

python pipeline/main.py run mnist-demo --train.epochs 8 --storage s3://bucket/defendpp
ray job submit --working-dir . -- python pipeline/main.py run mnist-demo --storage /shared/defendpp

The console script ``defendpp`` and ``python -m pipeline`` are the same program. Libraries that take
seconds to import are imported after the first line is printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # When run as a script, Python puts pipeline/ on sys.path. The packages are in its parent directory.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p != str(Path(__file__).parent))]

from pipeline.runtime import interrupts  # noqa: E402

PACKAGES = ("components", "pipeline", "tune_spaces")
"""Packages of this project, which are no dependencies."""


def main(arguments: list[str]) -> int:
    """Run one command. Return 0, 1 (the run failed) or 2 (the command line or a setting is wrong)."""
    if arguments[:1] in (["-V"], ["--version"]):
        print(version_text())
        return 0
    from components.errors import ConfigError, UserError
    from pipeline.runtime.console import print_error

    try:
        return _run_command(arguments)
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


def _run_command(arguments: list[str]) -> int:
    from components.errors import ConfigError
    from components.fields import is_unicode

    for argument in arguments:
        if not is_unicode(argument):
            raise ConfigError(f"{argument!r} is not UTF-8: rename the file or directory, or correct the argument")
    from pipeline.cli import usage

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage.main_help(), end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in ("--print-completion", "--complete"):
        from pipeline.cli import completion

        text = completion.script(rest) if command == "--print-completion" else completion.answer(rest)
        if text:  # An empty line would be a candidate, and the shell would not complete file names.
            print(text)
        return 0
    if command == "recipes":
        from pipeline.cli import recipe_table

        recipe_table.execute(rest)
        return 0
    if command == "ui":
        from pipeline.cli import ui

        return ui.execute(rest)
    if command == "export":
        from pipeline.cli import export

        return export.execute(rest)
    if command == "reproduction":
        from pipeline.cli import reproduction

        return reproduction.execute(rest)
    if command == "sweep":
        return _run_sweep(rest)
    if command in ("help", "version"):
        return main([*rest, f"--{command}"])
    if command not in usage.COMMANDS:
        raise ConfigError.unknown("command", command, (*usage.COMMANDS, *usage.OTHER_COMMANDS))
    return _run_stages(command, rest)


def _run_stages(command: str, arguments: list[str]) -> int:
    from pipeline.cli.arguments import has_option, names_external_model, parse_attack
    from pipeline.cli.recipe_arguments import parse_experiment

    if command == "report" and has_option(arguments, "--republish"):
        from pipeline.cli.republish import republish

        republish(arguments)
        return 0
    external = names_external_model(command, arguments)
    if external and not {"-h", "--help"} & set(arguments):
        parse_attack(arguments)  # A typo is answered at once. The rest depends on weights, which torch reads.
        _say_loading("attack --model")
    experiment = parse_experiment(command, arguments)
    if not external:
        _say_loading(f"{command} {experiment.name}")
    from pipeline import run

    # Run every stage for an external model: its test images and weights have to be prepared.
    run.execute("run" if external else command, experiment)
    return 0


def _run_sweep(arguments: list[str]) -> int:
    from pipeline.cli import usage
    from pipeline.cli.arguments import parse_sweep
    from pipeline.cli.recipe_arguments import parse_experiment

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage.command_help("sweep"), end="")
        return 0 if arguments else 2
    if {"-h", "--help"} & set(arguments):
        parse_experiment("sweep", arguments)
    options, rest = parse_sweep(arguments)
    experiment = parse_experiment("sweep", rest)
    from pipeline.sweep.space_file import load_space

    load_space(options)  # A wrong name is refused at once.
    _say_loading(f"sweep {experiment.name} over {options.space}")
    from pipeline.sweep import run

    run.execute(experiment, options)
    return 0


def _say_loading(what: str) -> None:
    """Print the first line of a long command, before imports that take seconds."""
    from pipeline.runtime.console import say

    say(f"{what}: loading PyTorch, Ray and MLflow ...")


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


def version_text() -> str:
    """Return the versions of this project, of its source, of Python and of the main libraries."""
    from pipeline.runtime import provenance

    source = provenance.revision(ROOT)
    changed = ", with changes that are not committed" if source["dirty"] else ""
    versions = provenance.versions()
    named = [f"{name} {versions[name]}" for name in ("python", "torch", "ray", "mlflow") if name in versions]
    return "\n".join(
        [f"defendpp {version()}", f"revision {source['revision'] or 'unknown'}{changed}", ", ".join(named)]
    )


def script() -> int:
    """Run the command line of this process, and return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may run a script
        sys.stderr.write(f"error: this Python ({sys.executable}) is too old: {_right_python()}\n")
        return 1
    from pipeline.runtime import standard_streams

    # A user's networks may be in the working directory. It comes last: it must not hide packages.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
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


def console() -> None:
    """Run the command line of this process, and end the process: the console script ``defendpp``."""
    interrupts.leave(script())


if __name__ == "__main__":
    console()
