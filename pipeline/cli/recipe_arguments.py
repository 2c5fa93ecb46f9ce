"""The experiment that a command line names: a recipe's, a record's or an external model's."""

from __future__ import annotations

from collections.abc import Sequence

from components.config import Experiment
from components.errors import ConfigError
from components.fields import from_dict
from pipeline.cli import usage
from pipeline.cli.arguments import names_external_model
from pipeline.cli.options import parse_overrides
from pipeline.program import program
from pipeline.recipes.registry import RECIPES


def parse_experiment(command: str, arguments: Sequence[str]) -> Experiment:
    """Return the experiment of a command, with its overrides.

    ``--help`` prints and ends the process with status 0. No arguments print the same with status 2.

    Args:
        arguments: those behind the command. First the recipe, or ``--from FILE``; then overrides.

    Raises:
        ConfigError: there is no recipe, it is unknown, or its own checks refuse a value.
        UserError: a file that the arguments name cannot be read.
    """
    if names_external_model(command, arguments):
        return _external_model(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage.command_help(command), end="")
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name.startswith("--from="):
        name, rest = "--from", [name.removeprefix("--from="), *rest]
    if name == "--from":
        if not rest or not rest[0]:
            raise ConfigError("--from needs a file: the best.json of a sweep, or the run.json of a run")
        experiment, name, rest = recorded_experiment(rest[0]), f"--from {rest[0]}", rest[1:]
    elif name in RECIPES:
        experiment = RECIPES[name].make()
    elif name.startswith("-"):
        raise ConfigError(f"the recipe comes before {name}: {program()} {command} RECIPE {name} ...")
    else:
        raise ConfigError.unknown("recipe", name, RECIPES, f"`{program()} recipes`")
    others = usage.SWEEP_OPTIONS if command == "sweep" else ()
    return parse_overrides(experiment, rest, f"{command} {name}", others)


def _external_model(arguments: Sequence[str]) -> Experiment:
    if {"-h", "--help"} & set(arguments):
        print(usage.command_help("attack"), end="")
        raise SystemExit(0)
    from pipeline.cli import external_model  # It loads torch.

    return external_model.parse_external_model(arguments)


def recorded_experiment(file: str) -> Experiment:
    """Return the experiment that a record holds: best.json of a sweep, run.json of a run.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: it holds no experiment, or one that this version does not know.
    """
    from pipeline.runtime.storage import split_uri

    storage, name = split_uri(file)
    record = storage.read_json(name)
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), dict):
        raise ConfigError.of("--from", file, "a record with an experiment: best.json of a sweep, or run.json of a run")
    try:
        return from_dict(Experiment, record["experiment"], "experiment")
    except ConfigError as e:
        raise ConfigError(f"the experiment in {file} cannot be run: {e}. Correct that field of the file") from None
