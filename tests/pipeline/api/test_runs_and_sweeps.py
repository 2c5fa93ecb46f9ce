"""Runs and sweeps read from Python, and the fields of a recipe that a call replaces."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import fake_run
import pytest
import sweeps
from documentation import python_of

import defendpp
from components.config import EvaluationConfig
from components.errors import ConfigError, DataError
from pipeline.api.runs import experiment_of
from pipeline.recipes.registry import RECIPES
from pipeline.runtime.storage import Storage
from pipeline.sweep.report import html, summary


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"train__epochs": 1}, "train.epochs", 1),
        ({"train.lam": 1}, "train.lam", 1.0),
        ({"seeds": 2}, "seeds", 2),
        ({"models": ("a:defense=none",), "evaluation__threat_models": ["white_box"]}, "models", ("a:defense=none",)),
        ({"storage": Path("/elsewhere")}, "storage", "/elsewhere"),
        ({"evaluation": EvaluationConfig(test_images=3)}, "evaluation.test_images", 3),
    ],
)
def test_fields_are_replaced(overrides: dict[str, Any], field: str, value: Any) -> None:
    experiment: Any = experiment_of("mnist-smoke", overrides)
    for name in field.split("."):
        experiment = getattr(experiment, name)
    assert experiment == value
    assert type(experiment) is type(value)
    assert experiment_of(RECIPES["mnist-smoke"].make(), {}) == RECIPES["mnist-smoke"].make()


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mnist-dmeo", {}, "unknown recipe 'mnist-dmeo'; did you mean mnist-demo"),
        ("mnist-smoke", {"train__epcohs": 1}, "unknown field of TrainConfig: 'epcohs'; did you mean epochs"),
        ("mnist-smoke", {"trian__epochs": 1}, "unknown field of Experiment: 'trian'; did you mean train"),
        ("mnist-smoke", {"train__epochs": "1"}, "train.epochs is '1'; it must be a whole number"),
        ("mnist-smoke", {"train__epochs": -1}, "train.epochs is -1; it must be 0 or more"),
        ("mnist-smoke", {"name__x": 1}, "the override is 'name__x'; it must be a field: name is no group of fields"),
        (3, {}, "recipe is 3; it must be the name of a recipe, or an Experiment"),
    ],
)
def test_what_cannot_be_replaced(recipe: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of(recipe, overrides)


def test_recipes_are_listed_with_what_they_show() -> None:
    assert defendpp.recipes().keys() == RECIPES.keys()
    assert all(defendpp.recipes().values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> defendpp.RunResult:
    directory = fake_run.write(Storage(str(tmp_path_factory.mktemp("runs"))))
    return defendpp.load_run(directory.uri)


def test_a_run_is_read(run: defendpp.RunResult) -> None:
    frame = run.to_dataframe()
    assert len(frame) == len(run.record.evaluations)
    row = frame[(frame.model == "defend") & (frame.threat_model == "white_box") & (frame.attack == "fgsm:eps=0.2")]
    judged = run.samples("fgsm", model="defend")
    assert row.accuracy.item() == (judged.adversarial_prediction == judged.label).mean()
    assert len(run.samples("fgsm", model="defend")) == fake_run.N
    assert run.samples("fgsm", model="control", source="no_defense").shape == (fake_run.N, 7)
    assert list(run.models) == list(fake_run.MODELS)
    history = run.history()
    assert len(history) == fake_run.EPOCHS * len(fake_run.MODELS)
    assert history[history.model == "defend"].epoch.tolist() == list(range(fake_run.EPOCHS))
    assert {"loss", "loss_cls", "validation_accuracy"} <= set(history)
    assert run.report == f"{run.directory}/report/report.html"
    for shown in (str(run), run._repr_html_()):
        assert "control" in shown
        assert f"{100 * row.accuracy.item():.1f}" in shown
    with pytest.raises(KeyError, match="the run has no_defense, control, defend"):
        run.models["defender"]


def test_a_directory_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the directory of a run"):
        defendpp.load_run(tmp_path / "runs" / "x")
    with pytest.raises(DataError, match=r"has no sweep.json. Sweeps lie under STORAGE/sweeps/"):
        defendpp.load_sweep(tmp_path / "sweeps" / "x")


def test_a_sweep_is_a_row_per_trial(tmp_path: Path) -> None:
    trials = [
        sweeps.entry(1, {"lam": 0.1, "shared_blocks": 2}, "finished", 0.1, 0.3),
        sweeps.entry(2, {"lam": 1.0, "shared_blocks": 4}, "finished", 0.2, 0.5),
        sweeps.entry(3, {"lam": 9.0, "shared_blocks": 1}, "diverged", reason="loss not finite at step 3"),
    ]
    sweep = sweeps.opened(tmp_path, sweeps.BLOCKS, trials)
    sweep.record["schema"] = 1
    sweep.stored.save()
    early = defendpp.load_sweep(sweep.storage.uri)
    assert early.best is None
    assert early.best_experiment is None
    assert early.evaluation is None
    assert "no choice yet" in str(early)
    sweep.record["choice"] = {"trial": 2, **trials[1].to_json(), "clean": 0.9, "robust": 0.5, "rule": "the rule"}
    sweep.record["front"] = [2]
    sweep.stored.save()
    names: dict[str, Any] = {}
    (block,) = python_of("docs/python.md", "Read a sweep")
    exec(re.sub(r'"/data/[^"]*"', repr(sweep.storage.uri), block), names)
    result, frame = names["sweep"], names["trials"]
    assert frame.trial.tolist() == [1, 2, 3]
    assert frame.state.tolist() == ["finished", "finished", "diverged"]
    assert frame["config/lam"].tolist() == [0.1, 1.0, 9.0]
    assert frame["config/shared_blocks"].tolist() == [2, 4, 1]
    assert frame.robust.tolist()[:2] == [0.3, 0.5]
    assert math.isnan(frame.robust[2])
    assert frame.epochs.tolist() == [2, 2, 0]
    assert frame.chosen.tolist() == frame.front.tolist() == [False, True, False]
    assert frame.reason[2] == "loss not finite at step 3"
    assert result.best is not None
    assert result.best.parameters == trials[1].parameters
    assert summary.conclusion(result.record) in str(result)
    assert "config/lam" in result._repr_html_()
    html.build(sweep.record, sweep.storage)
    assert Path(result.report).is_file()
