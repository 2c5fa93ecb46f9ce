"""Random configs, attack specs and command lines: each is accepted or refused with a clear error."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.attacks.spec import ATTACK_NAMES, AttackSpec
from components.config import Experiment, TrainConfig
from components.errors import UserError
from components.fields import from_dict, parse_spec, replace_typed, to_dict
from pipeline.cli.recipe_arguments import parse_experiment, recorded_experiment
from pipeline.cli.usage import COMMANDS
from pipeline.recipes.registry import RECIPES

VALID = to_dict(RECIPES["mnist-smoke"].make())
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, math.inf, -math.inf, math.nan, 1e-320, True]),
)
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "..", "../../x", "a:b", "a:b=c", "transfer:", "NaN", "１", "1_0", "0x1", "1e999", "\0", "\ud800"]
    ),
    st.sampled_from(
        [*ATTACK_NAMES, "none", "defend++", "white_box", "transfer:*", "~", "~x", "s3://", "://", "torchvision:"]
    ),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of a config, as the names that lead to it; sections too."""
    found = [path] if path else []
    for name, value in values.items():
        found += leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


FIELDS = leaves(VALID)


@given(json_values)
def test_any_json_is_a_config_or_is_refused(values: Any) -> None:
    for cls in (Experiment, TrainConfig, AttackSpec):
        with contextlib.suppress(UserError):
            from_dict(cls, values)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), json_values), min_size=1, max_size=3))
def test_a_config_with_any_field_changed_is_a_config_or_is_refused(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    values = copy.deepcopy(VALID)
    for path, value in changes:
        section: Any = values
        for name in path[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[path[-1]] = value
    with contextlib.suppress(UserError):
        config = from_dict(Experiment, values)
        assert from_dict(Experiment, to_dict(config)) == config or "nan" in repr(config)


@given(st.binary(max_size=40))
def test_any_file_is_a_record_or_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        recorded_experiment(str(file))


fields = st.sampled_from([f.name for f in dataclasses.fields(AttackSpec)] + ["x", ""])
values = st.one_of(numbers.map(str), texts, st.sampled_from(["8/255", "1/0", "-1/-5", "l2", "random", "dlr", "1/inf"]))


@settings(max_examples=200)
@given(st.sampled_from([*ATTACK_NAMES, "", "x"]), st.dictionaries(fields, values, max_size=4), texts)
def test_any_text_is_an_attack_or_is_refused(name: str, settings: dict[str, str], text: str) -> None:
    for candidate in (text, f"{name}:" + ",".join(f"{k}={v}" for k, v in settings.items()), name):
        with contextlib.suppress(UserError):
            spec = AttackSpec.parse(candidate)
            assert AttackSpec.parse(str(spec)) == spec
            spec.check_fits(1, 28)


@settings(max_examples=200)
@given(texts, st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), values, max_size=3))
def test_any_text_is_a_model_or_is_refused(text: str, overrides: dict[str, str]) -> None:
    with contextlib.suppress(UserError):
        parse_spec(text)
    with contextlib.suppress(UserError):
        config = replace_typed(TrainConfig(), overrides, "models[x]")
        assert from_dict(TrainConfig, to_dict(config)) == config or "nan" in repr(config)


OPTIONS = [f"--{'.'.join(path).replace('_', '-')}" for path in FIELDS]
tokens = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(["--from", "--from=", "--help", "-h", "--", "-", "--no-scaling.gpu", "--model", "--arch", "--eps"]),
    st.sampled_from([*RECIPES][:6]),
    texts,
    numbers.map(str),
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def accepted_or_refused(command: str, arguments: list[str]) -> None:
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(UserError, SystemExit),  # --help ends the process by itself
    ):
        parse_experiment(command, arguments)


@settings(max_examples=25, suppress_health_check=[*HealthCheck])
@given(st.sampled_from(list(COMMANDS)), st.lists(tokens, max_size=6))
def test_any_command_line_is_parsed_or_is_refused(quick: None, command: str, arguments: list[str]) -> None:
    accepted_or_refused(command, arguments)
    accepted_or_refused(command, ["mnist-smoke", *arguments])


@settings(max_examples=25, suppress_health_check=[*HealthCheck])
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), st.one_of(texts, numbers.map(str))), min_size=1, max_size=3))
def test_any_override_is_taken_or_is_refused(quick: None, overrides: list[tuple[str, str]]) -> None:
    accepted_or_refused("run", ["mnist-smoke", *(word for pair in overrides for word in pair)])
