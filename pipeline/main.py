"""The command line: which stage, which recipe, which fields of it are different.

python pipeline/main.py run mnist-demo --train.epochs 8 --storage s3://bucket/defendpp
ray job submit --working-dir . -- python pipeline/main.py run mnist-demo --storage /shared/defendpp
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# When run as a script, Python puts pipeline/ on sys.path. The packages are in its parent directory. A user's own networks may
# be in the directory that the command is run from, which comes last so that its modules hide none of the installed ones.
sys.path[:] = [str(Path(__file__).resolve().parent.parent), *(p for p in sys.path if p != str(Path(__file__).parent))]
if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())

from pipeline import interrupts  # noqa: E402

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

Fields of a recipe, their types and meanings: python pipeline/main.py run RECIPE --help
"""
COMMANDS = ("run", "pyramids", "train", "attack", "report", "sweep")


def main(arguments: list[str]) -> int:
    """Run one command. Returns the exit status: 0, 1 (the run failed), 2 (the command line or a setting is wrong)."""
    from components.errors import ConfigError, UserError
    from pipeline.progress import complain

    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "recipes":
            list_recipes()
            return 0
        if command not in COMMANDS:
            raise ConfigError.of("command", command, "one of " + ", ".join((*COMMANDS, "recipes")))
        if command == "sweep":
            return sweep(rest)
        experiment = parse(command, rest)
        from pipeline import given, run

        # of a model that is given there is nothing to train, but its test images must be read and its weights copied
        run.execute("run" if command == "attack" and given.is_asked_for(rest) else command, experiment)
        return 0
    except UserError as e:
        complain(str(e))
        return 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt as e:
        return interrupts.exit_status(e)


def sweep(arguments: list[str]) -> int:
    """Run a sweep. Raises as :func:`parse`, and ConfigError for an option of the sweep's own."""
    from pipeline import sweep as sweeps

    if not arguments or {"-h", "--help"} & set(arguments):
        print(sweeps.USAGE, end="")
        return 0 if arguments else 2
    options, rest = sweeps.parse_options(arguments)
    sweeps.execute(parse("sweep", rest), options)
    return 0


def parse(command: str, arguments: list[str]):  # type: ignore[no-untyped-def]
    """The recipe named first, with the overrides that follow.

    Raises:
        ConfigError: no or unknown recipe, or a value that the recipe's own checks refuse. tyro itself ends the process
            with status 2 for an unknown field or a value of the wrong type.
    """
    import tyro

    from components.errors import ConfigError
    from pipeline import given
    from pipeline.recipes import RECIPES

    if command == "attack" and given.is_asked_for(arguments):
        if {"-h", "--help"} & set(arguments):
            print(given.USAGE)
            raise SystemExit(0)
        default, rest = given.parse(arguments)
        return tyro.cli(type(default), default=default, args=rest, prog="main.py attack --model ...")
    if not arguments or arguments[0] in ("-h", "--help"):
        list_recipes()
        print(f"Fields of a recipe: python pipeline/main.py {command} RECIPE --help")
        raise SystemExit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name == "--from" and rest:
        default, name, rest = recorded(rest[0]), f"--from {rest[0]}", rest[1:]
    elif name in RECIPES:
        default = RECIPES[name].make()
    else:
        raise ConfigError.of("recipe", name, "one of " + ", ".join(RECIPES))
    return tyro.cli(
        type(default), default=default, args=rest, prog=f"main.py {command} {name}", description=default.description
    )


def recorded(file: str):  # type: ignore[no-untyped-def]
    """The experiment that a record holds: best.json of a sweep, run.json of a run.

    Raises:
        StorageError: it cannot be read. ConfigError: it holds none, or one that this version does not know.
    """
    from components.config import Experiment, from_dict
    from components.errors import ConfigError
    from pipeline.storage import Storage

    where = file if "://" in file else str(Path(file).expanduser().absolute())
    parent, _, name = where.rpartition("/")
    record = Storage(parent or "/").read_json(name)
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), dict):
        raise ConfigError.of("--from", file, "a record with an experiment: best.json of a sweep, or run.json of a run")
    return from_dict(Experiment, record["experiment"])


def list_recipes() -> None:
    """Print what each recipe shows, the scales it comes at, its models and what it costs."""
    from pipeline.recipes import PAPER, RECIPES, SCALES

    lines = ["Scales of the paper's tables and figures (NAME-SCALE; NAME alone is NAME-fast):", ""]
    lines += [f"  {scale:<6} {meaning}" for scale, meaning in SCALES.items()]
    lines += ["", "Recipes:"]
    for name, recipe in RECIPES.items():
        base, _, scale = name.rpartition("-")
        if name in PAPER or (base in PAPER and scale != PAPER[base][1][0]):
            continue
        experiment = recipe.make()
        models = f"    models: {', '.join(experiment.firsts())}"
        if base not in PAPER:
            lines += ["", name, f"    {experiment.description}", models, f"    {recipe.cost}"]
            continue
        costs = [
            f"{s} {RECIPES[f'{base}-{s}'].cost}" for s in PAPER[base][1] if RECIPES[f"{base}-{s}"].cost != SCALES[s]
        ]
        lines += ["", f"{base}   {' | '.join(PAPER[base][1])}", f"    {PAPER[base][0].__doc__}", models]
        lines += [f"    measured: {'; '.join(costs)}"] if costs else []
    print("\n".join(lines))


if __name__ == "__main__":
    interrupts.install()
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt as e:  # while something was imported
        status = interrupts.exit_status(e)
    interrupts.leave(status)
