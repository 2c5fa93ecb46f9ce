"""Options of the command line beside a recipe's fields.

Imports nothing heavy, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import NoReturn

from components.config import Experiment
from components.errors import ConfigError
from pipeline.sweep.options import Evaluate, SweepOptions

SWEEP_USAGE = """\
main.py sweep RECIPE --space FILE [--trials N] [--search grid|random|tpe] [--seed S] [--max-concurrent K] [--resume]
              [--evaluate full|recipe|none] [--FIELD VALUE ...]

  --space           a file of tune_spaces/ (or its name alone), or your own copy of one (docs/sweeps.md)
  --trials          number of configurations, instead of the space's; with more than before, the sweep goes on
  --search          grid, random or tpe, instead of the space's
  --seed            seed of random and tpe; models have seeds of their own in --models (default: 0)
  --max-concurrent  how many models are trained at once at most (default: as many as there is room for)
  --resume          refuse to begin a new sweep; without it, too, the same command continues a sweep
  --evaluate        how the chosen configuration is tested on test images, beside undefended and control (default: full)
                      full    under the full suite of attacks, white-box, black-box and transferred, at the budget of
                              the recipe's first attack that has one
                      recipe  under the recipe's attacks and threat models
                      none    not at all; --no-evaluate means the same
  --seeds           train N models per configuration and judge it by their mean

Fields of a recipe, their types and meanings: python pipeline/main.py run RECIPE --help
"""


class Parser(argparse.ArgumentParser):
    """Parser of options among a recipe's fields, which it leaves to tyro. Raises ConfigError."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"main.py {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ConfigError, instead of ending the process."""
        raise ConfigError(f"{message.removeprefix('argument ')}; `{self.prog} --help` explains its options")


def parse_sweep(arguments: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Return the options of a sweep, and the arguments that are left for the recipe.

    Raises:
        ConfigError: there is no space, or an option does not take its value.
    """
    parser = Parser("sweep")
    parser.add_argument("--space", default="")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-concurrent", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", default="full")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_const", const="none")
    parsed, rest = parser.parse_known_args(list(arguments))
    options = SweepOptions(**vars(parsed))
    if not options.space:
        raise ConfigError(
            "a sweep needs a space: give a file of tune_spaces/, e.g. --space tune_spaces/lambda_blocks.py"
        )
    if options.max_concurrent < 0:
        raise ConfigError.of("--max-concurrent", options.max_concurrent, "0 (as there is room) or more")
    choices = typing.get_args(Evaluate)
    if options.evaluate not in choices:
        raise ConfigError.of("--evaluate", options.evaluate, f"one of {', '.join(choices)}")
    return options, rest


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Tell whether an option is among arguments."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


def names_external_model(command: str, arguments: Sequence[str]) -> bool:
    """Tell whether a command attacks an external model instead of a recipe's."""
    return command == "attack" and has_option(arguments, "--model")


def parse_overrides(default: Experiment, arguments: Sequence[str], prog: str, description: str = "") -> Experiment:
    """Return an experiment with the fields that the arguments set.

    tyro itself ends the process with status 2 if a field is unknown or a value has the wrong type.
    """
    import tyro

    return tyro.cli(Experiment, default=default, args=list(arguments), prog=prog, description=description or None)
