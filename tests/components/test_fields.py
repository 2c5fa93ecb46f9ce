"""Fields of config dataclasses: from text or JSON to values, and hashes."""

from __future__ import annotations

import dataclasses
import json

import pytest
from config_errors import assert_error_has, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    PyramidConfig,
    ScalingConfig,
    TrainConfig,
)
from components.fields import content_hash, from_dict, parse_spec, replace_typed, to_dict


@settings(max_examples=50)
@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,8}", fullmatch=True),
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.from_regex(r"[a-z0-9.=-]{0,8}", fullmatch=True)),
)
def test_parse_spec_round_trip(name: str, fields: dict[str, str]) -> None:
    text = name + (":" + ",".join(f"{k}={v}" for k, v in fields.items()) if fields else "")
    assert parse_spec(text) == (name, fields)


def test_parse_spec_strips_blanks() -> None:
    assert parse_spec("a:lr = 0.1, width = 8") == ("a", {"lr": "0.1", "width": "8"})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "letters, digits"),
        (":lr=1", "letters, digits"),
        ("a b", "letters, digits"),
        ("a/b:lr=1", "letters, digits"),
        ("a:", "'' in"),
        ("a:lr", "'lr' in"),
        ("a:=1", "'=1' in"),
        ("a: =1", "' =1' in"),
        ("a:lr=1,", "'' in"),
        ("a:lr=1,lr=2", "sets lr twice"),
        ("a:lr=1, lr=2", "sets lr twice"),
    ],
)
def test_parse_spec_refuses(text: str, part: str) -> None:
    assert_error_has(lambda: parse_spec(text), part, repr(text))


def test_replace_typed_converts_by_the_fields_type() -> None:
    base = TrainConfig()
    new = replace_typed(
        base, {"lr": "1e-3", "width": "8", "channels_last": "True", "defense": "none", "seed": "-1"}, "models[x]"
    )
    assert new == dataclasses.replace(base, lr=1e-3, width=8, channels_last=True, defense="none", seed=-1)
    assert [type(getattr(new, f)) for f in ("lr", "width", "channels_last", "defense")] == [float, int, bool, str]
    assert replace_typed(base, {}, "x") == base
    assert replace_typed(base, {"channels_last": "false"}, "x").channels_last is False


@settings(max_examples=50)
@given(
    st.builds(
        TrainConfig,
        width=st.integers(1, 99),
        lam=st.floats(0, 10),
        lr=st.floats(1e-9, 10),
        defense=st.sampled_from(["none", "defend++"]),
        channels_last=st.booleans(),
        seed=st.integers(-9, 9),
    )
)
def test_replace_typed_round_trip(config: TrainConfig) -> None:
    texts = {f: str(getattr(config, f)) for f in ("width", "lam", "lr", "defense", "channels_last", "seed")}
    assert replace_typed(TrainConfig(), texts, "x") == config


@pytest.mark.parametrize(
    ("field", "text", "named", "allowed"),
    [
        ("width", "8.5", "models[x].width", "a whole number"),
        ("lr", "fast", "models[x].lr", "a number"),
        ("channels_last", "1", "models[x].channels_last", "true or false"),
        ("defense", "armour", "models[x].defense", "none, defend++"),
        ("shared_blocks", "5", "train.shared_blocks", "1 to 4"),
    ],
)
def test_replace_typed_refuses(field: str, text: str, named: str, allowed: str) -> None:
    assert_error_has(
        lambda: replace_typed(TrainConfig(), {"colour": "red"}, "models[x]"), "unknown field of models[x]: 'colour'"
    )
    assert_error_has(lambda: replace_typed(TrainConfig(), {"defence": "none"}, "models[x]"), "did you mean defense?")
    assert_error_has(
        lambda: replace_typed(TrainConfig(), {"normalize_mean": "0.5"}, "models[x]"), "models[x].normalize_mean cannot"
    )
    value: object = 5 if field == "shared_blocks" else text
    assert_refused(lambda: replace_typed(TrainConfig(), {field: text}, "models[x]"), named, value, allowed)


def test_content_hash_is_stable() -> None:
    # pinned: another value would orphan every model and shard set on disk
    assert content_hash(1, {"b": [1, 2.5], "a": "x"}) == "fc068422a8662e67"
    assert content_hash(1, {"a": "x", "b": [1, 2.5]}) == content_hash(1, {"b": [1, 2.5], "a": "x"})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash("ab", "c") != content_hash("a", "bc")


def full() -> Experiment:
    return Experiment(
        name="full",
        data=DataConfig(source="folder:/x", image_size=32, channels=3),
        pyramids=PyramidConfig(levels=2, dtype="float32"),
        train=TrainConfig(normalize_mean=(0.1, 0.2, 0.3), normalize_std=(0.5, 0.5, 0.5), lam=0.1, lr=1 / 3),
        evaluation=EvaluationConfig(attacks=("cw",), threat_models=("white_box",)),
        scaling=ScalingConfig(workers=2, cpus_per_worker=0.5),
    )


def test_dict_round_trip_through_json() -> None:
    for config in (full(), Experiment(name="default"), TrainConfig(schedule="alternating", cycles=2, epochs=20)):
        back = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
        assert back == config
        assert hash(back) == hash(config)  # lists became tuples again
    assert isinstance(to_dict(full())["train"]["normalize_mean"], list)


def test_from_dict_refuses_an_unknown_field_and_validates() -> None:
    assert_error_has(lambda: from_dict(TrainConfig, {"colour": "red"}), "unknown field of TrainConfig: 'colour'")
    values = to_dict(full())
    values["train"]["lam"] = -1
    assert_refused(lambda: from_dict(Experiment, values), "train.lam", -1, "0 or more")
    assert_error_has(lambda: from_dict(Experiment, {}), "lacks the field name")
    assert_refused(lambda: from_dict(Experiment, {"name": 3}), "Experiment.name", 3, "text")
    assert_refused(lambda: from_dict(Experiment, {"name": "x", "train": []}), "Experiment.train", [], "a JSON object")
    assert_refused(lambda: from_dict(TrainConfig, {"epochs": True}), "TrainConfig.epochs", True, "a whole number")
    assert_refused(lambda: from_dict(TrainConfig, {"normalize_mean": 0.5}), "TrainConfig.normalize_mean", 0.5, "a list")
    assert_refused(
        lambda: from_dict(TrainConfig, {"pretrained": "\ud800"}), "TrainConfig.pretrained", "\ud800", "text without"
    )
