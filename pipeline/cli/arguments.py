"""The command line's own options, beside a recipe's fields. Imports nothing heavy, so that a typo is answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from components.errors import ConfigError
from pipeline.sweep.options import SweepOptions

SWEEP_USAGE = """\
main.py sweep RECIPE --space FILE [--trials N] [--search grid|random|tpe] [--seed S] [--max-concurrent K] [--resume]
              [--evaluate full|recipe|none] [--FIELD VALUE ...]

  --space           a file of tune_spaces/ (or its name alone), or your own copy of one (docs/sweeps.md)
  --trials          configurations in all, instead of what the space says; more than before: the sweep goes on
  --search          grid, random or tpe, instead of what the space says
  --seed            of random and tpe (not of the models, which name their own in --models). 0
  --max-concurrent  models trained at once at the most; without it as many as there is room for
  --resume          refuse to begin: there must be a sweep of these settings that goes on. Without it, the same command goes on too
  --evaluate        the last step, the chosen configuration on test images beside undefended and control. full: under the full suite of
                    attacks, at the budget of the recipe's first attack that has one, white-box, black-box and transferred; recipe:
                    as the recipe has it; none (or --no-evaluate): leave it out. full
  --seeds           N models per configuration, judged by their mean

Fields of a recipe, their types and meanings: python pipeline/main.py run RECIPE --help
"""
SUITES = ("full", "recipe", "none")


class Parser(argparse.ArgumentParser):
    """Options that stand among a recipe's fields, which are left to tyro. A wrong one is a ConfigError."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"main.py {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ConfigError, instead of printing the usage and ending the process."""
        raise ConfigError(f"{message.removeprefix('argument ')}; `{self.prog} --help` explains its options")


def parse_sweep(arguments: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Return the options of a sweep, and the arguments that are left for the recipe.

    Raises:
        ConfigError: no space, or a value that an option does not take.
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
    known, rest = parser.parse_known_args(list(arguments))
    options = SweepOptions(**vars(known))
    if not options.space:
        raise ConfigError(
            "a sweep needs a space: give a file of tune_spaces/, e.g. --space tune_spaces/lambda_blocks.py"
        )
    if options.max_concurrent < 0:
        raise ConfigError.of("--max-concurrent", options.max_concurrent, "0 (as there is room) or more")
    if options.evaluate not in SUITES:
        raise ConfigError.of("--evaluate", options.evaluate, f"one of {', '.join(SUITES)}")
    return options, rest


def names_a_model(arguments: Sequence[str]) -> bool:
    """Tell whether an ``attack`` command names a model of its own instead of a recipe."""
    return any(a == "--model" or a.startswith("--model=") for a in arguments)
