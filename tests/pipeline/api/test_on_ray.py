"""The parts of the Python API that start Ray: training, and Ctrl-C while tasks run."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from documentation import python_of
from small_cnn import digits

import defendpp
from pipeline.runtime import tasks


def test_training_gives_the_models_and_the_same_call_continues(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    (block,) = python_of("docs/python.md", "Train and run a recipe")
    exec(block.replace("/data/defendpp", str(tmp_path)), names)
    trained, model = names["trained"], names["model"]
    history = trained.to_dataframe()
    assert history.model.tolist() == ["no_defense", "defend"]
    assert history.epoch.tolist() == [0, 0]
    assert not model.training
    images, _ = digits("test", 20)
    assert model(images).shape == (20, 10)
    assert trained.record.models["defend"].clean_validation == history.validation_accuracy.iloc[-1]
    capsys.readouterr()

    shorter = {"evaluation__attacks": ["fgsm:eps=0.2"], "evaluation__reliability_images": 0}
    done = defendpp.run(trained.record.experiment, storage=tmp_path, **shorter)
    assert "train: done" in capsys.readouterr().out
    assert done.history().equals(history)  # It was not trained again.
    assert Path(done.report).is_file()
    with torch.no_grad():
        predicted = done.models["defend"](done.examples("fgsm", model="defend")).argmax(1)
    assert predicted.tolist() == done.samples("fgsm", model="defend").adversarial_prediction.tolist()


def test_ctrl_c_cancels_the_tasks_that_run(ray_cluster: str, tmp_path: Path) -> None:
    def job(job: dict[str, Any]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a library may leave it
        (tmp_path / "started").touch()
        time.sleep(100)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 8)
        with pytest.raises(KeyboardInterrupt):
            list(tasks.run_tasks(job, [({}, 0)], {"CPU": 1.0}, name="test", on_straggler=print))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "started").exists()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4
