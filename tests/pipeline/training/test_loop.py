"""The training loop: rows of a rank, epochs, and losses that are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import SHAPES, defended, tiny
from torch import Tensor

from components.errors import DataError
from components.random_streams import stream_seed
from components.training.augment import Batch
from components.training.step import PhaseModule, make_optimizer, train_step
from pipeline.runtime.storage import Storage
from pipeline.training import finished_models
from pipeline.training.exports import load_classifier
from pipeline.training.loop import NonFiniteLoss, RankData, TrainingLoop

CPU = torch.device("cpu")


class Shards:
    """A shard set in memory, in files of uneven length."""

    def __init__(self, n: int, cuts: tuple[int, ...] = (), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.num_rows = n
        images = rng.integers(0, 256, (n, 1, 14, 14), dtype=np.uint8)
        self.columns: dict[str, np.ndarray] = {
            "index": np.arange(n),
            "image": images,
            "label": np.arange(n) % 10,
            "level_1": images.reshape(n, 1, 7, 2, 7, 2).mean((3, 5)).astype(np.float16) / np.float16(255),
        }
        self.cuts = (0, *cuts, n)

    level_columns = ("level_1",)

    def iter_shards(self, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        for a, b in zip(self.cuts, self.cuts[1:], strict=False):
            yield {k: self.columns[k][a:b] for k in columns}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("cuts", [(), (4, 5, 12), (0, 7)])
def test_ranks_share_the_rows_evenly(world: int, cuts: tuple[int, ...]) -> None:
    shards = Shards(17, cuts)
    ranks = [RankData(shards, r, world, CPU, levels=True) for r in range(world)]
    assert {len(r) for r in ranks} == {17 // world}
    for rank, data in enumerate(ranks):
        rows = list(range(rank, 17, world))[: 17 // world]
        assert np.array_equal(data.images.numpy(), shards.columns["image"][rows])
        assert np.array_equal(data.labels.numpy(), shards.columns["label"][rows])
        assert np.array_equal(data.levels[0].numpy(), shards.columns["level_1"][rows])
    assert RankData(shards, 0, world, CPU, levels=False).levels == ()


def rank_data(n: int = 12) -> RankData:
    return RankData(Shards(n), 0, 1, CPU, levels=True)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"train\.batch_size is 16, but there are only 12 training images: lower --train\.batch-size"
    ):
        TrainingLoop(tiny(batch_size=16), SHAPES, rank_data(), None)


@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("lam", [0.01, 0.0])
def test_a_nan_in_a_level_is_found_at_its_step(row: int, lam: float) -> None:
    config = tiny(lam=lam)
    data = rank_data()
    data.levels[0][row, 0, 3, 3] = float("nan")
    loop = TrainingLoop(config, SHAPES, data, None)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(stream_seed(config.seed, 0, 0)))
    step = order.tolist().index(row) // config.batch_size
    with pytest.raises(NonFiniteLoss) as error:
        loop.run_epoch()
    assert error.value.step == step


def test_an_absurd_learning_rate_is_found_at_its_step() -> None:
    """The steps are counted over the whole run; the first loss is still finite."""
    config = tiny(lr=1e30, lr_schedule="step", epochs=5)
    loop = TrainingLoop(config, SHAPES, rank_data(), None)
    probe = defended(config)
    optimizer, module = make_optimizer(probe, config), PhaseModule(probe, "joint", config)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(stream_seed(config.seed, 0, 0)))
    finite = []
    for i in range(3):
        terms = train_step(module, optimizer, rank_data().batch(order[4 * i : 4 * i + 4]), lr=1e30, config=config)
        finite.append(bool(torch.isfinite(terms["loss"])))
    assert finite[0]
    assert not all(finite)
    with pytest.raises(NonFiniteLoss) as error:
        loop.run_epoch()
    assert error.value.step == finite.index(False)


def test_weights_spoiled_by_the_last_step_are_found() -> None:
    """One step an epoch: its loss is finite, what it leaves is not, and no later loss of the epoch could show it."""
    config = tiny(lr=1e38, lr_schedule="step", batch_size=12)
    loop = TrainingLoop(config, SHAPES, rank_data(), None)
    loop.epoch = 1
    with torch.no_grad():
        loop.net.get_parameter("classifier.fc.weight").fill_(3e3)
    with pytest.raises(NonFiniteLoss) as error:
        loop.run_epoch()
    assert error.value.step == 1
    assert loop.epoch == 1


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    class Spy(RankData):
        def batch(self, rows: Tensor | slice) -> Batch:
            assert isinstance(rows, Tensor)
            seen[-1].extend(rows.tolist())
            return super().batch(rows)

    seen: list[list[int]] = []
    orders = []
    for seed in (0, 0, 1):
        loop = TrainingLoop(tiny(seed=seed), SHAPES, Spy(Shards(12), 0, 1, CPU, levels=True), None)
        for _ in range(2):
            seen.append([])
            loop.run_epoch()
        orders.append(seen[-2:])
    assert all(sorted(rows) == list(range(12)) for rows in seen)
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert orders[0] != orders[2]


def test_a_record_of_an_epoch() -> None:
    config = tiny(epochs=3)
    loop = TrainingLoop(config, SHAPES, rank_data(13), rank_data(5))
    seen: list[tuple[int, int, bool]] = []
    first = loop.run_epoch(lambda done, total, loss: seen.append((done, total, loss() > 0)))
    assert seen == [(1, 9, True), (2, 9, True), (3, 9, True)]
    second = loop.run_epoch()
    assert [r["epoch"] for r in (first, second)] == [0, 1]
    assert [s["step"] for r in (first, second) for s in r["steps"]] == list(range(6))
    assert set(first["validation"]) == {"accuracy", "reconstruction"}
    assert set(first["steps"][0]) >= {"step", "time", "lr", "loss", "loss_cls", "loss_rec", "rec_0", "rec_1"}
    assert first["steps"][0]["lr"] == pytest.approx(config.lr / 25)


def test_the_moving_average_of_the_weights_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    """From the weights after the first step on, each step moves the average a tenth of the way (decay 0.9)."""
    config = tiny(ema_decay=0.9, epochs=1, defense="none")
    loop = TrainingLoop(config, SHAPES, rank_data(13), rank_data(5))
    weights: list[dict[str, Tensor]] = []
    record = loop.run_epoch(lambda *_: weights.append({k: v.clone() for k, v in loop.net.state_dict().items()}))
    average = weights[0]
    for later in weights[1:]:
        average = {k: 0.9 * v + 0.1 * later[k] if v.is_floating_point() else later[k] for k, v in average.items()}
    trained = loop.trained_net.state_dict()
    for name, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(trained[name], value, msg=name)
    assert not torch.equal(trained["fc.weight"], weights[-1]["fc.weight"])
    storage = Storage(tmp_path)
    storage.write_json("history/epoch-00000.json", record)
    finished_models.export_trained(loop, storage, {"pyramids": {}, "weights": ""})
    exported = load_classifier(tmp_path)
    assert torch.equal(exported.get_parameter("fc.weight"), trained["fc.weight"])
    plain = TrainingLoop(tiny(epochs=1, defense="none"), SHAPES, rank_data(13), rank_data(5))
    plain.run_epoch()
    assert plain.trained_net is plain.net
    plain.net.load_state_dict(trained)
    assert plain.validate() == record["validation"]
