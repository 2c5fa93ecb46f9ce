"""A run's record survives the way through its type, and a broken record is one clear error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fake_run
import pytest

from components.errors import DataError
from components.fields import to_dict
from pipeline.recipes.registry import RECIPES
from pipeline.records import Record, RunRecord, drop_unreadable, run_address
from pipeline.reporting.records import read_run
from pipeline.runtime.storage import Storage

WORST = {"model": "defend", "threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": 300}
ATTACKED = {
    "worst_case": [{**WORST, "accuracy": 0.1, "accuracy_low": 0.07, "accuracy_high": 0.14, "attacks": 3}],
    "worst_case_pairs": [{**WORST, "against": "control", "only_model": 4, "only_against": 1, "p": 0.375}],
    "reliability": {
        "defend": {
            "probe": {"n": 30},
            "active": {"bim:eps=0.2,steps=40": {"n": 20, "found": 3, "passed": False}},
            "flags": [{"name": "zero_gradients", "fired": True, "measured": "a", "remedy": "b", "attacks": []}],
        }
    },
    "diverged": {},
}


@pytest.fixture
def value(tmp_path: Path) -> dict[str, Any]:
    """Return run.json of a complete run."""
    record: dict[str, Any] = fake_run.write(Storage(tmp_path)).read_json("run.json")
    record["evaluations"][3] |= {"chunks_split_for_memory": 2, "chunks_searched_in_float32": 1}
    return {**record, **ATTACKED}


def text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True)


def test_a_record_is_the_same_bytes_after_its_type(value: dict[str, Any]) -> None:
    assert text(RunRecord.from_json(value).to_json()) == text(value)


def test_a_new_record_is_the_same_bytes_after_its_type(value: dict[str, Any]) -> None:
    """Before the first stage, a record has no data, models or results."""
    made_with = ("command", "git", "source", "versions", "hardware")
    new: dict[str, Any] = {key: value[key] for key in ("schema", "name", "experiment", "created", *made_with)}
    new |= {"finished": None, "data": None, "models": {}, "evaluations": [], "stages": {}}
    record = RunRecord.from_json(new)
    assert text(record.to_json()) == text(new)
    assert record.reliability is record.worst_case is None
    assert record.data == {}


def test_models_and_stages_are_in_the_order_in_which_people_read_them(value: dict[str, Any]) -> None:
    record = RunRecord.from_json(json.loads(text(value)))
    assert list(record.models) == list(record.roles) == list(fake_run.MODELS)
    assert list(record.stages) == ["pyramids", "train", "attack", "report"]
    assert list(record.data["rows"]) == ["train", "validation", "test"]


def test_a_sweep_shares_what_it_was_made_with(value: dict[str, Any]) -> None:
    """sweep.json has other keys beside these."""
    record = Record.from_json({**value, "trials": [], "space": {}})
    assert (record.command, record.git, record.versions) == (value["command"], value["git"], value["versions"])
    assert record.experiment == fake_run.experiment()


def test_the_config_of_a_model_is_known_before_it_is_trained(value: dict[str, Any]) -> None:
    value["models"] = {}
    config = fake_run.experiment().model_configs()["defend"].canonical()
    assert RunRecord.from_json(value).model_config("defend") == to_dict(config)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("name",), r"run\.json lacks 'name'; run the same command again"),
        (("experiment",), r"run\.json lacks 'experiment'"),
        (("models", "defend", "path"), r"models\.defend lacks 'path'"),
        (("evaluations", 2, "attack"), r"entry 2 of evaluations lacks 'attack'"),
        (("evaluations", 2, "metrics", "accuracy_low"), r"entry 2 of evaluations lacks metrics\.accuracy_low"),
        (("worst_case", 0, "eps"), r"entry 0 of worst_case lacks 'eps'"),
        (("worst_case_pairs", 0, "p"), r"entry 0 of worst_case_pairs lacks 'p'"),
    ],
)
def test_a_missing_key_is_named(value: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], message: str) -> None:
    broken = json.loads(text(value))
    *place, key = path
    holder = broken
    for step in place:
        holder = holder[step]
    del holder[key]
    run = Storage(tmp_path)
    run.write_json("run.json", broken)
    with pytest.raises(DataError, match=message):
        read_run(run)


@pytest.mark.parametrize("entry", [None, [], "text"])
def test_an_entry_that_is_no_object_is_named(value: dict[str, Any], entry: Any) -> None:
    value["evaluations"][1] = entry
    with pytest.raises(DataError, match="entry 1 of evaluations is no JSON object"):
        RunRecord.from_json(value)


@pytest.mark.parametrize(
    ("section", "damaged"),
    [
        ("models", {"defend": {"train": {}}}),
        ("models", ["defend"]),
        ("evaluations", [{"model": "defend", "metrics": {"accuracy": 0.9}}]),
        ("evaluations", [{"model": "defend", "threat_model": "clean", "attack": "none", "n": 3, "metrics": 3}]),
        ("worst_case", [{"model": "defend"}]),
        ("reliability", {"defend": 3}),
    ],
)
def test_a_damaged_section_is_written_anew(value: dict[str, Any], section: str, damaged: Any) -> None:
    """Only what cannot be read is dropped: a run that continues computes it again from the files on storage."""
    broken = {**value, section: damaged}
    assert drop_unreadable(broken) == [section]
    assert broken == {k: v for k, v in value.items() if k != section}
    assert drop_unreadable(dict(value)) == []


def test_settings_that_came_later_leave_the_addresses_of_earlier_runs() -> None:
    """The address of mnist-demo is that of README and of revision 286f8f3."""
    demo = RECIPES["mnist-demo"].make()
    assert run_address(demo) == "runs/mnist-demo-19b04ae00caef08e"
    for changes in ({"ema_decay": 0.9}, {"adversarial_training": True}):
        other = dataclasses.replace(demo, train=dataclasses.replace(demo.train, **changes))
        assert run_address(other) != run_address(demo)
