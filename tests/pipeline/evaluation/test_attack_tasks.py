"""What runs attacks as Ray tasks: how many wait at a time, stragglers, and batches that do not fit the memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacked_models import Small, convnet, near_grey, predict
from torch import Tensor, nn

from components.attacks import fast_copy
from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.judge import judge
from pipeline.evaluation import attack, attack_tasks, chunks, plan
from pipeline.recipes.registry import RECIPES
from pipeline.records import RunRecord
from pipeline.reporting.sentences import explanation
from pipeline.run_directory import new_record
from pipeline.runtime import cluster, tasks
from pipeline.runtime.cluster import ResourceError
from pipeline.runtime.storage import Storage, StorageError

# --- a storage that is not shared


def test_a_storage_that_nodes_do_not_share_is_refused_before_compute(ray_cluster: str, tmp_path: Path) -> None:
    cluster.check_shared(Storage(f"file://{tmp_path}/shared"))
    # a directory as fsspec sees it, shared by all processes, and one that is another in every process
    cluster.check_shared(Storage(f"local://{tmp_path}/shared"))
    assert not list((tmp_path / "shared").glob("*"))
    with pytest.raises(
        StorageError, match=r"memory://run is not shared by node \S+ .*does not exist.*every node mounts"
    ):
        cluster.check_shared(Storage("memory://run"))


# --- stragglers


class Watched:
    """Three tasks under a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.notes = 1000.0, list[str]()
        self.watch = tasks.StragglerWatch(self.notes.append, clock=lambda: self.now)

    def at(self, seconds: float) -> list[str]:
        """What is told ``seconds`` from now on."""
        self.now += seconds
        self.notes.clear()
        self.watch.look()
        return list(self.notes)


def test_a_straggler_is_named_while_others_keep_ending() -> None:
    w = Watched()
    w.watch.running({"slow": ", fab-t on defend", "a": ", pgd on defend"})
    told: list[tuple[float, str]] = []
    for second in range(60):  # one short task after another
        w.now += 1
        w.watch.ended("a")
        told += [(second + 1, note) for note in w.at(0)]
        w.watch.running({"slow": ", fab-t on defend", "a": ", pgd on defend"})
    assert told[0] == (30, "; the slowest of 1 tasks, fab-t on defend, has run for 30 s, 1 s is usual")
    assert [second for second, _ in told] == [30, 35, 40, 45, 50, 55, 60], "at most every LOOK_S seconds"


def test_what_is_no_straggler() -> None:
    w = Watched()
    w.watch.running({"a": ", a", "b": ", b"})
    assert w.at(1000) == [], "nothing has ended yet: nobody knows what is usual"
    w.watch.ended("a")
    assert w.at(tasks.LOOK_S) == [], "as long as the one before"
    assert w.at(3 * 1000) == ["; the slowest of 1 tasks, b, has run for 4005 s, 1000 s is usual"]
    w.watch.ended("b")
    assert w.at(tasks.LOOK_S / 2) == []
    assert w.at(tasks.LOOK_S / 2) == [""], "told once that it is over"
    assert w.at(tasks.LOOK_S) == []


def test_a_short_task_is_no_straggler_however_short_the_others() -> None:
    w = Watched()
    w.watch.running({"a": ", a", "b": ", b"})
    w.now += 0.1
    w.watch.ended("a")
    assert w.at(tasks.STRAGGLER_S - 1) == []
    assert w.at(tasks.LOOK_S) != []


# --- back-pressure


def test_no_more_jobs_are_taken_than_may_wait(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS_IN_FLIGHT", 3)
    monkeypatch.setattr(tasks, "LOOK_S", 0.02)
    taken, ended, most = 0, 0, 0

    def work(job: dict[str, float]) -> None:
        time.sleep(job["seconds"])

    def jobs() -> Iterator[tuple[dict[str, float], int]]:
        nonlocal taken, most
        for i in range(12):
            taken += 1
            most = max(most, taken - ended)
            yield {"seconds": 0.05}, i

    found = []
    # room for one at a time, so twice that is less than the bound
    for tag in tasks.run_tasks(work, jobs(), {"CPU": 4.0}, name="test", on_straggler=lambda note: None):
        found.append(tag)
        ended += 1
    assert sorted(found) == list(range(12))
    assert most == 3


def crafted(model: nn.Module, x: Tensor, y: Tensor, text: str = "pgd:eps=0.1,steps=3,restarts=2") -> tuple[Tensor, int]:
    spec = AttackSpec.parse(text)
    return attack_tasks.craft(spec, model, lambda: None, None, x, y, stop_on_success=True, seed=7)


@pytest.mark.parametrize(("room", "size"), [(10, 0), (9, 5), (4, 3), (1, 1)])
def test_a_chunk_that_does_not_fit_is_attacked_in_micro_batches(room: int, size: int) -> None:
    model, x = convnet(0).eval(), near_grey(10, side=8)
    y = predict(model, x)
    found, micro_batch = crafted(Small(model, room), x, y)
    assert micro_batch == size
    generator = torch.Generator().manual_seed(7)
    wanted = [
        fast_copy.run_attack_on_copy(
            AttackSpec.parse("pgd:eps=0.1,steps=3,restarts=2"),
            model,
            None,
            a,
            b,
            stop_on_success=True,
            generator=generator,
        )
        for a, b in zip(x.split(size or 10), y.split(size or 10), strict=True)
    ]
    assert torch.equal(found, torch.cat(wanted))
    if size:
        assert not torch.equal(found, crafted(model, x, y)[0]), "other random starts, hence recorded"


def test_judging_does_not_depend_on_how_much_fits() -> None:
    model, x = convnet(0).eval(), near_grey(10, side=8)
    y = predict(model, x)
    adversarial, _ = crafted(model, x, y)
    whole = judge(model, x, adversarial, y)
    for room in (9, 1):
        found, micro_batch = attack_tasks.judge_in_batches(Small(model, room), x, adversarial, y)
        assert micro_batch == {9: 5, 1: 1}[room]
        assert found.keys() == whole.keys()
        for name, column in whole.items():
            assert column.dtype == found[name].dtype
            np.testing.assert_allclose(found[name], column, rtol=1e-6)


def test_what_does_not_fit_image_by_image_is_told() -> None:
    model, x = convnet(0).eval(), near_grey(3, side=8)
    y = predict(model, x)
    with pytest.raises(
        ResourceError, match=r"pgd:.* a single image does not fit the memory.*tried to allocate 1 images"
    ):
        crafted(Small(model, 0), x, y)
    with pytest.raises(ResourceError, match="judging a single image does not fit"):
        attack_tasks.judge_in_batches(Small(model, 0), x, x, y)


def record_of(experiment: Experiment, entry: dict[str, Any]) -> RunRecord:
    """A run with one evaluation."""
    return RunRecord.from_json({**new_record(experiment), "evaluations": [entry]})


def test_split_chunks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the tasks' files to run.json's entry, and what is said of it."""
    model, x = convnet(0).eval(), near_grey(8, side=8)
    y = predict(model, x)
    monkeypatch.setattr(attack_tasks, "load_model", lambda root, path, device: Small(model, 5))
    monkeypatch.setattr(attack_tasks, "load_fast_copy", lambda *_: None)
    rows = {"index": np.arange(8), "label": y.numpy().astype(np.int32)}
    monkeypatch.setattr(
        attack_tasks, "load_images", lambda job, a, b: ({k: v[a:b] for k, v in rows.items()}, x[a:b], y[a:b])
    )
    job = {
        "root": str(tmp_path),
        "device": "cpu",
        "attack": "pgd:eps=0.1,steps=2",
        "examples": "examples/a",
        "source": "models/a",
        "judges": {"judged/a": "models/a"},
        "early_leaving": False,
        "bfloat16": False,
        "seed": 0,
    }
    for i, start, stop in ((0, 0, 6), (1, 6, 8)):  # six images do not fit, two do
        attack_tasks.attack_chunk(job, i, start, stop)
    root = Storage(str(tmp_path))
    assert [chunks.read_metadata(root / "examples/a", i)["micro_batch"] for i in (0, 1)] == [3, 0]
    experiment = RECIPES["mnist-smoke"].make()
    one = plan.Model(name="a", path="models/a", sha256="a")
    e = plan.Evaluation(model=one, source=one, threat_model="white_box", attack=job["attack"])
    entry = attack.evaluation_entry(e, ("examples/a", "judged/a"), 2, experiment, root)
    assert (entry["n"], entry["chunks_split_for_memory"]) == (8, 1)
    ending = "in smaller batches, with other random starts: a under white_box, PGD, eps 0.1, 2 steps."
    assert explanation(record_of(experiment, entry))[-1].endswith(ending)
    del entry["chunks_split_for_memory"]
    whole = json.dumps(explanation(record_of(experiment, entry)))
    assert "smaller batches" not in whole
    assert "bfloat16" not in whole
    bfloat16 = replace(experiment, evaluation=replace(experiment.evaluation, search_precision="bfloat16"))
    assert explanation(record_of(bfloat16, entry))[-1].endswith("All verdicts are float32.")
    # these chunks searched in float32
    entry = attack.evaluation_entry(e, ("examples/a", "judged/a"), 2, bfloat16, root)
    assert entry["chunks_searched_in_float32"] == 2
    in_float32 = "no bfloat16 copy, so the search was in float32: PGD, eps 0.1, 2 steps on a."
    assert in_float32 in explanation(record_of(bfloat16, entry))[-1]
