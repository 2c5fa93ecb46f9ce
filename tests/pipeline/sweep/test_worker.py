"""A worker of a sweep, without Ray: it trains and measures models, and reports how they ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_shards import SHAPES, Shards, write_shards
from sweeps import recipe
from torch import nn

from components.config import TrainConfig
from pipeline.runtime.lease import WorkingLease
from pipeline.runtime.storage import Storage
from pipeline.sweep.trials.plan import Objective, SweepPlan
from pipeline.sweep.trials.queue import JobQueue, NoRequest
from pipeline.sweep.trials.states import DIVERGED, DONE, FAILED, TRAINING, WAITING
from pipeline.sweep.trials.worker import SweepWorker, Task, Work, _MeasureEpochs, worker_settings
from pipeline.training.jobs import NOT_FINITE, TrainingData
from pipeline.training.loop import RankData, Ranks, TrainingLoop


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    """Return the plan of a sweep over an undefended network, with shards on its storage."""
    data = TrainingData(
        train={"lowpass": "pyramids/train"}, without_levels="pyramids/train", validation="pyramids/validation"
    )
    root = Storage(str(tmp_path))
    write_shards(root, "pyramids/train", 40)
    write_shards(root, "pyramids/validation", 20, seed=1)
    base = TrainConfig(width=4, epochs=2, batch_size=20, defense="none")
    objective = Objective(attack="fgsm:eps=0.1", images=10, validation="pyramids/validation")
    experiment = recipe(train=base)
    return SweepPlan(
        root=str(tmp_path), experiment=experiment, base=base, shapes=SHAPES, data=data, weights="", objective=objective
    )


def request_of(plan: SweepPlan, **point: Any) -> dict[str, Any]:
    (job,) = plan.jobs(point)
    return job.request()


def worker_of(queue: JobQueue, plan: SweepPlan) -> SweepWorker:
    return SweepWorker({**worker_settings(queue, plan, threads=1, token="t"), "run": 0}, Ranks())


class ClosingQueue(JobQueue):
    """A queue that is closed once it has no more requests."""

    def take(self, run: int) -> Any:
        request = super().take(run)
        return NoRequest.ANY_MORE if request is NoRequest.YET else request


@pytest.mark.slow
def test_each_model_ends_in_its_own_way_and_stops_none_behind_it(plan: SweepPlan) -> None:
    queue, root = ClosingQueue(attempts=2), Storage(plan.root)
    good, diverging, broken, last = (request_of(plan, lr=lr) for lr in (0.01, 1e30, 0.03, 0.02))
    broken["config"] = {**broken["config"], "arch": "no_such_module:make"}
    requests = [good, diverging, broken, last]
    queue.follow(requests, "trial")
    worker_of(queue, plan).serve()
    states = queue.follow(requests, "trial")
    assert [state for state, _ in states] == [DONE, DIVERGED, FAILED, DONE]
    assert "not finite at step" in states[1][1]
    assert "no_such_module" in states[2][1]
    assert root.exists(f"{diverging['address']}/{NOT_FINITE}")
    for request in (good, last):
        home = root / request["address"]
        scores = [home.read_json(plan.objective.file(epoch)) for epoch in range(2)]
        assert [s["n"] for s in scores] == [10, 10]
        assert scores[1]["clean"] == home.read_json("model.json")["validation"]["accuracy"]


def test_a_model_that_is_trained_already_is_not_trained_again(plan: SweepPlan) -> None:
    root, request = Storage(plan.root), request_of(plan, lr=0.01)
    home = root / request["address"]
    stronger = replace(plan, objective=replace(plan.objective, attack="fgsm:eps=0.3"))
    trained: list[bytes] = []
    for sweep_plan, epochs in ((plan, (0, 1)), (plan, (0, 1)), (stronger, (1,))):
        queue = ClosingQueue(attempts=2)
        queue.follow([request], "trial")
        worker_of(queue, sweep_plan).serve()
        assert queue.follow([request], "trial") == [(DONE, "")]
        assert [home.exists(sweep_plan.objective.file(epoch)) for epoch in range(2)] == [e in epochs for e in range(2)]
        trained.append(home.read_bytes("model.json"))
    assert len(set(trained)) == 1
    diverged, queue = request_of(plan, lr=0.02), ClosingQueue(attempts=2)
    root.write_json(f"{diverged['address']}/{NOT_FINITE}", {"step": 7})
    queue.follow([diverged], "trial")
    worker_of(queue, plan).serve()
    assert queue.follow([diverged], "trial") == [(DIVERGED, "the loss was not finite at step 7")]


def test_a_model_that_no_trial_requests_any_more_is_left_after_an_epoch(plan: SweepPlan) -> None:
    queue, request = JobQueue(attempts=1), request_of(plan, lr=0.01)
    queue.follow([request], "trial")
    worker = worker_of(queue, plan)
    task = worker.next_task()
    assert task == Task(request, Work.TRAIN)
    queue.leave("trial")
    worker.carry_out(task)
    home = Storage(plan.root) / request["address"]
    assert len(home.list("history")) == 1
    assert not home.exists("model.json")
    assert worker.next_task() is NoRequest.YET
    assert queue.follow([request], "later") == [(WAITING, "")], "one attempt, but its worker did not die"


def test_a_model_that_another_run_trains_is_put_back(plan: SweepPlan) -> None:
    queue, root, request = JobQueue(attempts=1), Storage(plan.root), request_of(plan, lr=0.01)
    queue.follow([request], "trial")
    other = WorkingLease(root, "other")
    assert other.try_take(request["address"])
    worker = worker_of(queue, plan)
    task = worker.next_task()
    assert task == Task(request, Work.WAIT)
    assert queue.follow([request], "trial") == [(TRAINING, "")]
    worker.carry_out(task)
    assert queue.follow([request], "trial") == [(WAITING, "")]
    other.release()
    assert worker.next_task() == Task(request, Work.TRAIN)


@pytest.mark.parametrize("address", ["pyramids/train", "pyramids/validation"])
def test_damaged_shards_close_the_queue_and_fail_no_model(plan: SweepPlan, address: str) -> None:
    queue, root, request = JobQueue(attempts=1), Storage(plan.root), request_of(plan, lr=0.01)
    root.delete(f"{address}/a.parquet")
    queue.follow([request], "trial")
    worker_of(queue, plan).serve()
    assert address in queue.error()
    assert queue.follow([request], "trial")[0][0] in (WAITING, TRAINING)


def test_the_network_that_is_measured_is_the_one_that_is_exported(plan: SweepPlan) -> None:
    """With a moving average of the weights, that is the average."""
    config = TrainConfig(width=4, epochs=1, batch_size=20, defense="none", ema_decay=0.9)
    loop = TrainingLoop(config, SHAPES, RankData(Shards(40), 0, 1, torch.device("cpu"), levels=False), None)
    measured = []

    class Meter:
        def measure(self, classifier: nn.Module, home: Storage, **_: Any) -> None:
            measured.append(classifier)

    record = {**loop.run_epoch(), "validation": {"accuracy": 0.5}}
    callback = _MeasureEpochs(Meter(), Storage(plan.root), lambda: False)  # type: ignore[arg-type]
    callback.measure(loop, record)
    assert measured == [loop.trained_net]
    assert loop.trained_net is not loop.net
