"""Options of the command line beside a recipe's fields.

Imports nothing heavy, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence

from components.config import Experiment
from components.errors import ConfigError
from components.fields import check, check_choice
from components.search_space import Search
from pipeline.cli.options import Parser, parse_fields, whole_number
from pipeline.cli.usage import ATTACK_OPTIONS
from pipeline.sweep.options import Evaluate, SweepOptions


def parse_sweep(arguments: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Return the options of a sweep, and the arguments that are left for the recipe.

    Raises:
        ConfigError: there is no space, or an option does not take its value.
    """
    parser = Parser("sweep")
    parser.add_argument("--space", default="")
    parser.add_argument("--trials", type=whole_number("--trials"))
    parser.add_argument("--search")
    parser.add_argument("--seed", type=whole_number("--seed"), default=0)
    parser.add_argument("--max-concurrent", type=whole_number("--max-concurrent"), default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", default="full")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_const", const="none")
    parsed, rest = parser.parse_known_args(list(arguments))
    options = SweepOptions(**vars(parsed))
    if not options.space:
        raise ConfigError(
            "a sweep needs a space: give a file of tune_spaces/, e.g. --space tune_spaces/lambda_blocks.py"
        )
    check(options.max_concurrent >= 0, "--max-concurrent", options.max_concurrent, "0 (as there is room) or more")
    check_choice(options.evaluate, typing.get_args(Evaluate), "--evaluate")
    if options.search is not None:
        check_choice(options.search, typing.get_args(Search), "--search")
    return options, rest


def parse_attack(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of ``attack --model``, and the arguments that are left for the fields.

    Raises:
        ConfigError: an option is unknown or does not take its value, also one of a field.
    """
    parser = Parser("attack")
    for option in ("--model", "--arch", "--data", "--name", "--norm", "--eps", "--tracking-uri"):
        parser.add_argument(option, default="")
    parser.add_argument("--storage", default=Experiment.storage)
    options, rest = parser.parse_known_args(list(arguments))
    check_choice(options.norm or "linf", ("linf", "l2"), "--norm")
    # The file of weights decides on the defaults of the fields, but not on their names and types.
    parse_fields(Experiment(name="attack"), rest, "attack --model FILE", ATTACK_OPTIONS)
    return options, rest


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Tell whether an option is among arguments."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


def names_external_model(command: str, arguments: Sequence[str]) -> bool:
    """Tell whether a command attacks an external model instead of a recipe's."""
    return command == "attack" and has_option(arguments, "--model")
