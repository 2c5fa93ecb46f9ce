"""Fields of an experiment as options of the command line: their names, types, help and parser.

Imports nothing heavy, so that a typo is answered at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from components.config import Experiment
from components.errors import ConfigError
from components.fields import PLACE, check_values, convert, hints_of, option_of, replace_fields
from pipeline.program import program


class Parser(argparse.ArgumentParser):
    """Parser without abbreviations that raises its errors as ConfigError.

    Args:
        command: the command whose ``--help`` an error recommends, e.g. ``run mnist-demo``.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        super().__init__(prog=f"{program()} {command}", add_help=False, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ConfigError, instead of ending the process."""
        raise ConfigError(f"{message.removeprefix('argument ')}; `{self.prog} --help` explains its options")


def whole_number(option: str) -> Callable[[str], Any]:
    """Return the converter of an option that takes a whole number."""
    return functools.partial(convert, hint=int, where=option)


@dataclass(frozen=True)
class Option:
    """A field of an experiment, as an option."""

    field: str
    """Its name with its section, e.g. ``train.shared_blocks``."""
    hint: Any
    default: Any
    text: str
    """Documentation of the field: what it means."""

    @property
    def name(self) -> str:
        """Return the option, e.g. ``--train.shared-blocks``."""
        return option_of(self.field)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the option, and of a switch also the option that turns it off."""
        if self.hint is not bool:
            return (self.name,)
        section, dot, field = self.name.removeprefix("--").rpartition(".")
        return self.name, f"--{section}{dot}no-{field}"

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the values of a field that takes one of a few; () for others."""
        return typing.get_args(self.hint) if typing.get_origin(self.hint) is Literal else ()

    @property
    def item(self) -> Any:
        """Return the type of a value: of a tuple, that of its items."""
        return typing.get_args(self.hint)[0] if typing.get_origin(self.hint) is tuple else self.hint

    def add_to(self, group: argparse._ArgumentGroup, note: str = "") -> None:
        """Add the option to a parser.

        Args:
            note: text for the end of its help.
        """
        settings: dict[str, Any] = {"dest": self.field, "default": argparse.SUPPRESS}
        text = f"{self.text} (default: {_shown(self.default)}{note})".replace("%", "%%")
        if self.hint is bool:
            yes, no = self.names
            group.add_argument(yes, help=f"{text} {no} turns it off.", action="store_true", **settings)
            group.add_argument(no, help=argparse.SUPPRESS, action="store_false", **settings)
            return
        settings["type"] = functools.partial(convert, hint=self.item, where=self.name)
        settings["metavar"] = "{" + ",".join(self.choices) + "}" if self.choices else _TYPES[self.item]
        if self.item is not self.hint:
            settings["nargs"] = "*"
        group.add_argument(self.name, help=text, **settings)


_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


def _shown(value: Any) -> str:
    """Return a default as help shows it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "empty" if value == "" else f"{value}"


@functools.cache
def options_of(experiment: Experiment) -> tuple[Option, ...]:
    """Return the options of all fields, with the experiment's values as defaults."""
    return tuple(_options(experiment, ""))


def _options(config: Any, prefix: str) -> Iterator[Option]:
    hints, texts = hints_of(type(config)), _documentation(typing.cast(Hashable, type(config)))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{f.name}.")
        else:
            yield Option(f"{prefix}{f.name}", hints[f.name], value, texts.get(f.name, ""))


@functools.cache
def _documentation(cls: Hashable) -> dict[str, str]:
    """Return the documentation of each field: the text below it in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, cls)))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    texts[field.target.id] = " ".join(text.split()).replace("``", "")
    return texts


def parse_overrides(
    default: Experiment, arguments: Sequence[str], command: str, others: Iterable[str] = ()
) -> Experiment:
    """Return an experiment with the fields that the arguments set; see :func:`parse_fields`."""
    experiment = replace_fields(default, parse_fields(default, arguments, command, others))
    # Storage refuses it too, but imports pyarrow first.
    check_values(experiment, "", {"storage": PLACE})
    return experiment


def parse_fields(
    default: Experiment, arguments: Sequence[str], command: str, others: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the fields that the arguments set, with their values: ``train.epochs`` -> 8.

    ``--help`` among them prints all fields and ends the process with status 0.

    Args:
        command: the command with its recipe, e.g. ``run mnist-demo``.
        others: options of the command that are no fields, for "did you mean".

    Raises:
        ConfigError: an option is unknown, lacks its value, or its value has the wrong type.
    """
    parser = _parser(default, command)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help(), end="")
        raise SystemExit(0)
    parsed, unknown = parser.parse_known_args([_with_hyphens(a) for a in arguments])
    if unknown:
        raise _unknown(unknown[0], arguments, default, parser.prog, others)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items()}


def _with_hyphens(argument: str) -> str:
    """Return an option with - in place of _, as in ``--train.shared_blocks=2``; values unchanged."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else argument


def _parser(default: Experiment, command: str) -> Parser:
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    is_sweep = command.startswith("sweep ")
    parser = Parser(
        command,
        usage="%(prog)s --space FILE [--FIELD VALUE ...]" if is_sweep else "%(prog)s [--FIELD VALUE ...]",
        description=default.description.replace("%", "%%"),
        epilog=f"The options of sweep itself: {program()} sweep --help" if is_sweep else None,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=6, width=width),
    )
    parser.add_argument_group("options").add_argument("-h", "--help", action="help", help="Show this text and exit.")
    unused = frozenset.intersection(*(config.unused() for config in default.first_replicates().values()))
    unused -= {"checkpoint_every_epochs"}  # It has an effect, but none on what a model learns.
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(default):
        section = option.field.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "experiment", _section_text(section))
        without_effect = section == "train" and option.field.rpartition(".")[2] in unused
        option.add_to(groups[section], "; no effect on the models of this recipe" if without_effect else "")
    return parser


def _section_text(section: str) -> str | None:
    """Return what a section of the fields is about."""
    if section == "train":
        return "Settings that all models have in common."
    return (hints_of(Experiment)[section].__doc__ or "").partition("\n")[0] if section else None


def _unknown(
    argument: str, arguments: Sequence[str], default: Experiment, prog: str, others: Iterable[str]
) -> ConfigError:
    """Return the error for an argument that is no option, with the options that it may stand for."""
    options = options_of(default)
    name = argument.partition("=")[0]
    help_command = f"`{prog} --help`"
    if not name.startswith("-"):
        before = arguments[arguments.index(argument) - 1] if argument in arguments[1:] else ""
        switch = next((o for o in options if o.hint is bool and before in o.names), None)
        if switch:
            yes, no = switch.names
            return ConfigError(f"{argument!r} follows {before}, which takes no value: {yes} turns it on, {no} off")
        return ConfigError(f"{argument!r} belongs to no option; {help_command} lists the options")
    last = name.lstrip("-")
    # A field without its section, such as --epochs, means the field of that name.
    same = [n for o in options for n in o.names if n.removeprefix("--").rpartition(".")[2] == last]
    if same:
        return ConfigError(f"unknown option {name!r}; did you mean {' or '.join(same)}?")
    return ConfigError.unknown("option", name, [*others, *(n for o in options for n in o.names)], help_command)
