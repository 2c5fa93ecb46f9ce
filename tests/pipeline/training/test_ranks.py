"""Two ranks over gloo, without Ray, on storages that do not show both the same: what they train must not depend on that.

All that the ranks do happens in four processes (starting one takes seconds); each test looks at one part of what they left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from made_up_shards import SHAPES, write_shards

from components.config import TrainConfig
from components.fields import to_dict
from pipeline.runtime.storage import Storage
from pipeline.training import worker_group
from pipeline.training.jobs import FAILED_MODEL
from pipeline.training.loop import Ranks, TrainingLoop
from pipeline.training.worker_group import DataCache, EpochCallback, ModelFailed, train_model, train_models

pytestmark = [pytest.mark.slow, pytest.mark.drill]
TRAIN = "pyramids/train"
CONFIGS = {
    f"models/m{seed}": TrainConfig(defense="none", width=4, batch_size=8, epochs=3, seed=seed) for seed in range(3)
}
NETWORK = """
import torch
from torch import nn

class Bad(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(1, num_classes)

    def forward(self, x):
        if self.training and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return self.head(x.mean((2, 3)))

def build(num_classes, **others):
    return Bad(num_classes)
"""


def order(address: str, config: TrainConfig | None = None) -> dict[str, Any]:
    config = config or CONFIGS[address]
    return {"address": address, "config": to_dict(config), "pyramids": {"train": TRAIN}, "weights": ""}


def settings(token: str) -> dict[str, Any]:
    return {"shapes": to_dict(SHAPES), "token": token}


def weights(root: Path, address: str) -> bytes:
    return (root / address / "classifier.safetensors").read_bytes()


class StopAfter(EpochCallback):
    """Leaves a model after some epochs, as a kill does."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def stop(self, loop: TrainingLoop) -> bool:
        return loop.epoch >= self.epochs


def group(directory: str, name: str, rank: int) -> Ranks:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store-{name}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    return Ranks(rank, 2)


def worker(process: int, directory: str) -> None:
    torch.set_num_threads(1)
    original = worker_group.train_model

    def logged(order: dict[str, Any], home: Storage, data: DataCache, config: Mapping[str, Any], *more: Any) -> None:
        if data.ranks.rank == 0:
            with open(f"{data.root.local_root}/trained", "a") as file:
                file.write(f"{order['address']} {config['token']}\n")
        original(order, home, data, config, *more)

    worker_group.train_model = logged
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rank = process % 2
    # two runs at the same moment on one storage, in opposite order
    ranks = group(directory, f"run-{process // 2}", rank)
    addresses = list(CONFIGS) if process < 2 else list(CONFIGS)[::-1]
    train_models([order(a) for a in addresses], Storage(f"{directory}/shared"), ranks, settings(f"run-{process // 2}"))
    dist.destroy_process_group()
    if process >= 2:
        return

    # a storage that does not show rank 1 the checkpoint that rank 0 sees, as a network file system with caches does
    ranks = group(directory, "stale", rank)
    root = Storage(f"{directory}/fresh")
    home = root / "models/m0"
    train_model(order("models/m0"), home, DataCache(root, ranks), settings("stale"), StopAfter(1))
    dist.barrier()
    if rank == 1:
        root = Storage(f"{directory}/stale")
    train_models([order("models/m0")], root, ranks, settings("stale"))
    dist.destroy_process_group()

    # the second of three models fails on rank 1 alone; what Ray Train does then is to start the group again
    root = Storage(f"{directory}/failing")
    orders = [
        order("models/m1"),
        order("models/bad", TrainConfig(defense="none", arch="failing:build", epochs=1, batch_size=8)),
    ]
    orders.append(order("models/m2"))
    for attempt in range(2):
        ranks = group(directory, f"failing-{attempt}", rank)
        try:
            train_models(orders, root, ranks, settings("failing"))
        except (ModelFailed, RuntimeError) as e:  # of the other rank: that this one is gone
            if attempt or isinstance(e, ModelFailed) != (rank == 1):
                raise
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    for name in ("alone", "shared", "fresh", "failing"):
        write_shards(Storage(directory / name), TRAIN, 40)
    shutil.copytree(directory / "fresh", directory / "stale")
    (directory / "failing.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)
        environment.syspath_prepend(directory)
        mp.spawn(worker, args=(str(directory),), nprocs=4)
    return directory


def test_two_runs_that_share_models_train_each_once(trained: Path) -> None:
    lines = [line.split() for line in (trained / "shared" / "trained").read_text().splitlines()]
    assert sorted(address for address, _ in lines) == list(CONFIGS), "each once"
    assert {token for _, token in lines} == {"run-0", "run-1"}, "the runs shared the work"
    for address in CONFIGS:
        assert (trained / "shared" / address / "model.json").exists()
        assert not (trained / "shared" / address / "owner.json").exists(), "the lease was given back"
    assert weights(trained / "shared", "models/m1") == weights(trained / "failing", "models/m1"), "the same as alone"


def test_ranks_go_on_from_the_same_bytes_whatever_each_sees(trained: Path) -> None:
    assert weights(trained / "fresh", "models/m0") == weights(trained / "shared", "models/m0"), "of an undisturbed run"
    assert not (trained / "stale" / "models").exists(), "rank 1 neither read nor wrote"


def test_a_model_that_fails_on_one_rank_does_not_stop_the_others(trained: Path) -> None:
    models = trained / "failing" / "models"
    assert [name for name in ("m1", "bad", "m2") if (models / name / "model.json").exists()] == ["m1", "m2"]
    reason = Storage(models / "bad").read_json(FAILED_MODEL)["reason"]
    assert reason == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB. Lower --train.batch-size or --train.width, or train on "
        "GPUs with more memory"
    )
