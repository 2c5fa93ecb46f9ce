"""Fields of frozen dataclasses that are settings: checks, text, JSON and hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from components.errors import ConfigError, one_of

MAX_NAME_BYTES = 100
"""Longest name of an experiment or a model.

A file system allows 255 bytes, and names are combined and given suffixes."""

Rule = tuple[Callable[[Any], bool], str]
"""Predicate of a field's value, and the values that it allows, in words.

The predicate must be False for NaN, as comparisons with NaN are."""
AT_LEAST_1: Rule = (lambda v: v >= 1, "at least 1")
POSITIVE: Rule = (lambda v: 0 < v < math.inf, "a finite number above 0")
NOT_NEGATIVE: Rule = (lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
PLACE: Rule = (
    lambda v: v[:1] in ("/", "~") or "://" in v,
    "an absolute path, a ~ path or a URI such as s3://bucket/path",
)
"""A relative path would be another place on each node."""


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless ``ok``.

    Args:
        name: the setting, for the message.
        allowed: the values that it may have, in words.
    """
    if not ok:
        raise ConfigError.of(name, value, allowed)


def check_choice(value: object, choices: Iterable[str], name: str) -> None:
    """Raise ConfigError, with the nearest choice, unless a value is one of a few."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError.of(name, value, one_of(value, choices))


def is_name(name: str) -> bool:
    """Tell whether a name can be part of a path, a URI and an MLflow name on every system."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and len(name.encode()) <= MAX_NAME_BYTES


def option_of(field: str) -> str:
    """Return the command-line option of a field: ``--train.replace-head`` of train.replace_head."""
    return "--" + field.replace("_", "-")


def check_name(where: str, name: str) -> None:
    """Refuse a name that could leave the storage's directories or that some storage does not take.

    Every name that becomes part of a path is checked here: of experiments, models and search
    spaces.

    Args:
        where: the setting that holds the name, for the message.

    Raises:
        ConfigError: the name is empty, too long, or has other characters.
    """
    allowed = (
        f"1 to {MAX_NAME_BYTES} bytes of letters, digits, _ - + and ., beginning with a letter, a digit or _: "
        "it becomes part of a path"
    )
    check(is_name(name), where, name, allowed)


_HINTS: dict[Any, dict[str, Any]] = {}


def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, cached since a look-up parses text."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def is_int64(value: float) -> bool:
    """Tell whether a whole number has at most 64 bits, as seeds, sizes and tensors have."""
    return -(2**63) <= value < 2**63


def check_values(config: Any, prefix: str, rules: Mapping[str, Rule]) -> None:
    """Check the fields of a config one by one.

    Args:
        prefix: name of the config, for messages.
        rules: field -> its rule. Any field with a Literal type must have one of its values, and any
            whole number at most 64 bits.

    Raises:
        ConfigError: a value is not allowed; the message names the field.
    """
    hints = hints_of(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        where = f"{prefix}.{f.name}".removeprefix(".")
        if typing.get_origin(hints[f.name]) is Literal:
            literals = typing.get_args(hints[f.name])
            check_choice(value, literals, where)
        elif isinstance(value, int):
            check(is_int64(value), where, value, "a number from -2**63 to 2**63 - 1")
    for name, (holds, allowed) in rules.items():
        value = getattr(config, name)
        check(holds(value), f"{prefix}.{name}".removeprefix("."), value, allowed)


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME:FIELD=VALUE,FIELD=VALUE`` into its name and its fields (values as text).

    Raises:
        ConfigError: the name is empty or a part is not FIELD=VALUE.
    """
    name, colon, rest = text.partition(":")
    check_name(f"the name in {text!r}", name)
    fields: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{part!r} in {text!r} is not FIELD=VALUE; the form is NAME:FIELD=VALUE,FIELD=VALUE")
        if key in fields:
            raise ConfigError(f"{text!r} sets {key} twice: leave one out")
        fields[key] = value.strip()
    return name, fields


ConfigT = TypeVar("ConfigT")


def replace_fields(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return a copy of a config with some fields replaced.

    Args:
        values: field -> value. A field of a section has the section's name before it:
            ``train.epochs``.
    """
    sections = {name.partition(".")[0] for name in values if "." in name}
    own = {name: value for name, value in values.items() if "." not in name}
    for section in sections:
        below = {n.removeprefix(f"{section}."): v for n, v in values.items() if n.startswith(f"{section}.")}
        own[section] = replace_fields(getattr(config, section), below)
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def replace_typed(config: ConfigT, overrides: dict[str, str], where: str) -> ConfigT:
    """Return a copy of a config with some fields replaced by values given as text.

    Raises:
        ConfigError: a field is unknown, or a text is no value of the field's type.
    """
    hints = hints_of(type(config))
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        if name not in hints:
            raise ConfigError.unknown(f"field of {where}:", name, hints)
        values[name] = convert(text, hints[name], f"{where}.{name}")
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


TYPE_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""Types of fields, in words."""


def convert(text: str, hint: Any, where: str) -> Any:
    """Convert text to a field's type.

    Raises:
        ConfigError: the text is no value of the type.
    """
    if typing.get_origin(hint) is Literal:
        check_choice(text, typing.get_args(hint), where)
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError.of(where, text, TYPE_WORDS[bool])
        return text.lower() == "true"
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise ConfigError.of(where, text, TYPE_WORDS[hint]) from None
    raise ConfigError(f"{where} cannot be set for one model: set it for all of them, as an option")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON types (tuples become lists), enough to repeat the run."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(cls: type[ConfigT], values: Any, where: str = "") -> ConfigT:
    """Return the config whose :func:`to_dict` is ``values``.

    Args:
        values: parsed JSON, possibly from a file of another program.
        where: the values' place in their file, for messages. Empty: the name of ``cls``.

    Raises:
        ConfigError: a field is unknown or missing, or a value is of another type or not allowed.
    """
    where = where or cls.__name__
    check(isinstance(values, dict), where, values, "a JSON object with the fields of this version")
    hints = hints_of(cls)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError.unknown(f"field of {where}:", name, hints)
        kwargs[name] = _from_json(value, hints[name], f"{where}.{name}")
    for f in dataclasses.fields(typing.cast(Any, cls)):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in kwargs:
            raise ConfigError(f"{where} lacks the field {f.name}, which every record of this version has")
    return cls(**kwargs)


def _from_json(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as a value of type ``hint``."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value, where)
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, list), where, value, "a list")
        return tuple(_from_json(item, typing.get_args(hint)[0], where) for item in value)
    kinds = (str,) if typing.get_origin(hint) is Literal else typing.get_args(hint) or (hint,)
    accepted = {*kinds, int} if float in kinds else set(kinds)
    # The type must be exact: True is an int to Python.
    check(type(value) in accepted, where, value, " or ".join(TYPE_WORDS.get(k, "null") for k in kinds))
    if isinstance(value, int):
        check(is_int64(value), where, value, "a number from -2**63 to 2**63 - 1")
    if isinstance(value, str):
        check(is_text(value), where, value, "text without NUL characters and lone surrogates")
    return value


def is_unicode(text: str) -> bool:
    """Tell whether text can be written as UTF-8, without undecoded bytes (lone surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_text(text: str) -> bool:
    """Tell whether text can be a file name: UTF-8 without zero bytes."""
    return "\0" not in text and is_unicode(text)


def content_hash(*parts: Any) -> str:
    """Hash JSON values to 16 hex digits that name a result by everything it follows from."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
