"""The end of a training stage, with the workers of Ray Train in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_shards import SHAPES, write_shards
from sweeps import recipe

from components.config import TrainConfig
from pipeline.runtime.storage import Storage
from pipeline.training import ray_runs, train, worker_group
from pipeline.training.jobs import TrainingData
from pipeline.training.loop import Ranks


def fit_here(worker: Any, config: dict[str, Any], experiment: Any, root: Storage, *, max_failures: int) -> None:
    worker_group.train_models(config["jobs"], root, Ranks(), config)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_other_models_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runs, "fit_workers", fit_here)
    monkeypatch.setattr(train, "parallel_runs", lambda experiment: 1)
    root = Storage(tmp_path)
    write_shards(root, "pyramids/train", 40)
    write_shards(root, "pyramids/validation", 20, seed=1)
    data = TrainingData(
        train={"lowpass": "pyramids/train"}, without_levels="pyramids/train", validation="pyramids/validation"
    )
    experiment = recipe(train=TrainConfig(width=4, epochs=2, batch_size=20, defense="none"))
    models = ("fine:seed=1", "wild:lr=1e30", "after:seed=2")
    with pytest.raises(ray_runs.TrainingError) as error:
        train.train(replace(experiment, models=models), SHAPES, data, root)
    message = str(error.value)
    assert "training of wild stopped: the loss was not finite at step" in message
    assert "Last good checkpoint: none was written yet" in message
    assert "Lower --train.lr" in message
    assert "fine" not in message
    assert "after" not in message
    assert len(list(tmp_path.glob("models/*/classifier.safetensors"))) == 2
