"""The queue between trials and workers, and the pool of Ray Train runs that serve it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from components.errors import UserError
from pipeline.runtime.storage import StorageError
from pipeline.sweep.trials.pool import TrainingPool
from pipeline.sweep.trials.queue import JobQueue, NoRequest
from pipeline.sweep.trials.states import DONE, FAILED, TRAINING, WAITING


def requests(*names: str) -> list[dict[str, Any]]:
    return [{"address": name} for name in names]


def test_the_queue_gives_each_model_once_in_order() -> None:
    queue = JobQueue(attempts=2)
    assert queue.take(0) is NoRequest.YET
    for _ in range(3):  # A repeated request changes nothing.
        assert queue.follow(requests("a", "b"), "t1") == [(WAITING, ""), (WAITING, "")]
    assert queue.take(0) == {"address": "a"}
    assert queue.take(1) == {"address": "b"}
    assert queue.take(2) is NoRequest.YET
    assert queue.follow(requests("a", "b"), "t1") == [(TRAINING, ""), (TRAINING, "")]
    queue.end("a", DONE)
    assert queue.follow(requests("a"), "t2") == [(DONE, "")]
    assert queue.take(0) is NoRequest.YET
    queue.close()
    assert queue.take(0) is NoRequest.ANY_MORE


def test_a_run_that_was_started_again_goes_on_until_its_model_counts_as_what_kills_it() -> None:
    queue = JobQueue(attempts=2)
    queue.follow(requests("a", "b"), "t")
    assert queue.take(0) == {"address": "a"}
    assert queue.take(0) == {"address": "a"}
    assert queue.take(0) == {"address": "b"}
    ((state, reason),) = queue.follow(requests("a"), "t")
    assert state == FAILED
    assert "died 2 times" in reason
    queue.release(0)  # Another run may have the model of a run that ended for good.
    assert queue.take(1) == {"address": "b"}


def test_a_model_that_nobody_wants_any_more_is_left_at_the_next_epoch() -> None:
    queue = JobQueue(attempts=2)
    for trial in ("t1", "t2"):
        queue.follow(requests("a"), trial)
    queue.take(0)
    queue.leave("t1")
    assert not queue.cancelled("a", 0), "t2 wants it still"
    queue.leave("t2")
    assert queue.cancelled("a", 0)
    queue.put_back("a")
    assert queue.take(0) is NoRequest.YET
    queue.follow(requests("a"), "t3")
    assert queue.take(0) == {"address": "a"}, "wanted again, it goes on from its checkpoint"


def test_a_queue_that_was_lost_fills_itself_again() -> None:
    queue = JobQueue(attempts=2)
    assert not queue.cancelled("a", 0), "a run trains on, and its model is known again"
    assert queue.follow(requests("a"), "t") == [(TRAINING, "")]
    assert queue.take(1) is NoRequest.YET


def test_an_error_of_no_one_model_gives_out_nothing_more_and_fails_none() -> None:
    queue = JobQueue(attempts=1)
    queue.follow(requests("a", "b"), "t")
    assert queue.take(0) == {"address": "a"}
    assert queue.error() == ""
    queue.close("the disk is full")
    queue.close("a consequence")
    queue.close()
    assert queue.error() == "the disk is full"
    assert queue.cancelled("a", 0)
    for _ in range(2):  # Its workers died of the error.
        assert queue.take(0) is NoRequest.ANY_MORE
    queue.end("a", FAILED, "the other rank was gone")
    assert queue.follow(requests("a", "b"), "t") == [(WAITING, "")] * 2


def test_a_run_lost_for_good_is_told_and_the_last_one_ends_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    queue, errors = JobQueue(attempts=2), list[UserError]()
    queue.follow(requests("a"), "t")
    first_lost, ended = threading.Event(), threading.Event()

    def fit(number: int) -> None:
        if number == 0:
            queue.take(0)
            raise RuntimeError("node gone\nmore")
        assert first_lost.wait(30)
        raise RuntimeError("the other node gone")

    def fail(error: UserError) -> None:
        errors.append(error)
        ended.set()

    pool = TrainingPool(queue, 2, fit, fail=fail)
    printed, deadline = "", time.monotonic() + 30
    while "lost for good, 1 left: node gone" not in printed:
        assert time.monotonic() < deadline, printed
        printed += capsys.readouterr().out
        time.sleep(0.01)
    assert errors == []
    assert queue.take(1) == {"address": "a"}, "another run may have its model"
    first_lost.set()
    assert ended.wait(30)
    assert "could not be kept up: the other node gone" in str(errors[0])
    pool.close()
    assert queue.take(1) is NoRequest.ANY_MORE


def test_an_error_of_the_user_ends_the_sweep_as_it_is() -> None:
    errors, ended = list[UserError](), threading.Event()

    def fit(number: int) -> None:
        raise StorageError("the disk is full")

    def fail(error: UserError) -> None:
        errors.append(error)
        ended.set()

    TrainingPool(JobQueue(attempts=2), 1, fit, fail=fail)
    assert ended.wait(30)
    assert str(errors[0]) == "the disk is full"
