"""The experiment that a command line names: a recipe's, a record's or an external model's."""

from __future__ import annotations

from collections.abc import Sequence

from components.config import Experiment
from components.errors import ConfigError
from components.fields import from_dict
from pipeline.cli.arguments import names_external_model, parse_overrides
from pipeline.recipes.paper import PAPER
from pipeline.recipes.registry import RECIPES, summary_of
from pipeline.recipes.scales import SCALES


def parse_experiment(command: str, arguments: Sequence[str]) -> Experiment:
    """Return the experiment of a command, with its overrides.

    ``--help`` prints and ends the process with status 0. tyro ends it with status 2
    (:func:`parse_overrides`).

    Args:
        arguments: those behind the command. First the recipe, or ``--from FILE``; then overrides.

    Raises:
        ConfigError: there is no recipe, it is unknown, or its own checks refuse a value.
        UserError: a file that the arguments name cannot be read.
    """
    if names_external_model(command, arguments):
        return _external_model(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(recipe_list())
        print(f"Fields of a recipe: python pipeline/main.py {command} RECIPE --help")
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
        raise ConfigError(f"the recipe comes before {name}: main.py {command} RECIPE {name} ...")
    else:
        raise ConfigError.unknown("recipe", name, RECIPES, "`main.py recipes`")
    return parse_overrides(experiment, rest, f"main.py {command} {name}", experiment.description)


def _external_model(arguments: Sequence[str]) -> Experiment:
    from pipeline.cli import external_model  # It loads torch.

    if {"-h", "--help"} & set(arguments):
        print(external_model.USAGE)
        raise SystemExit(0)
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
        return from_dict(Experiment, record["experiment"])
    except ConfigError as e:
        raise ConfigError(f"the experiment in {file} cannot be run: {e}") from None


def recipe_list() -> str:
    """Return the recipes as text: what each shows, its scales, its models and its cost."""
    lines = ["Scales of the paper's tables and figures (NAME-SCALE; NAME alone is NAME-fast):", ""]
    lines += [f"  {scale:<6} {meaning}" for scale, meaning in SCALES.items()]
    lines += ["", "Recipes:"]
    for name, recipe in RECIPES.items():
        base, _, scale = name.rpartition("-")
        if name in PAPER or (base in PAPER and scale != PAPER[base][1][0]):
            continue  # Each table is listed once, with its scales.
        experiment = recipe.make()
        models = f"    models: {', '.join(experiment.first_replicates())}"
        if base not in PAPER:
            lines += ["", name, f"    {experiment.description}", models, f"    {recipe.cost}"]
            continue
        make, scales = PAPER[base]
        costs = {scale: RECIPES[f"{base}-{scale}"].cost for scale in scales}
        measured = [f"{scale} {cost}" for scale, cost in costs.items() if cost != SCALES[scale]]
        lines += ["", f"{base}   {' | '.join(scales)}", f"    {summary_of(make)}", models]
        lines += [f"    measured: {'; '.join(measured)}"] if measured else []
    return "\n".join(lines)
