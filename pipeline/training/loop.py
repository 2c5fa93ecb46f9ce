"""Training loop: one rank's epochs over one model, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from components.config import Shapes, TrainConfig
from components.errors import DataError
from components.models.comdefend import ComDefend
from components.models.defend import DefendNet
from components.network import build_net
from components.random_streams import ADVERSARIAL_STREAM, DROPOUT_STREAM, stream_seed
from components.training.augment import Batch, augmented, gaussian_noise
from components.training.schedule import Phase, learning_rate, phase_at_epoch
from components.training.step import PhaseModule, make_optimizer, train_step, validation_sums
from pipeline.runtime.storage import Storage
from pipeline.training import checkpoints

VALIDATION_BATCH = 500
FINITE_CHECK_STEPS = 100
"""Steps between two checks that the loss is finite. Each check stops the GPU."""

Live = Callable[[int, int, Callable[[], float]], None]
"""Callback after each step: (steps done, steps in all, function that returns the last loss)."""


T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks that train a model together.

    Only rank 0 asks the storage what is left to train and where to continue. Each rank could get
    another answer on a network file system that caches directories, or beside another run.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def agreed(self, ask: Callable[[], T]) -> T:
        """Call ``ask`` on rank 0, and return its answer or raise its error on every rank."""
        if self.world == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = ask()
            except Exception as e:
                answer[1] = e
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]


class RankData:
    """Rows of one rank, held in memory: every world-th row, so that sorted sources stay mixed.

    All ranks hold the same number of rows. At most world - 1 rows of the set are left out.
    """

    def __init__(self, shards: Any, rank: int, world: int, device: torch.device, levels: bool) -> None:
        count = shards.num_rows // world
        names = ["image", "label", *(shards.level_columns if levels else ())]
        columns: dict[str, list[np.ndarray]] = {}
        row = 0
        for shard in shards.iter_shards(names):
            rows = slice((rank - row) % world, None, world)
            for key, values in shard.items():
                columns.setdefault(key, []).append(np.ascontiguousarray(values[rows]))
            row += len(shard["label"])
        joined = {k: torch.from_numpy(np.concatenate(v)[:count]) for k, v in columns.items()}
        self.images = joined["image"].to(device)
        self.labels = joined["label"].long().to(device)
        self.levels = tuple(joined[k].to(device) for k in sorted(k for k in joined if k.startswith("level_")))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return a batch of these rows."""
        return Batch(images=self.images[rows], labels=self.labels[rows], levels=tuple(x[rows] for x in self.levels))


class TrainingLoop:
    """One rank's training, epoch by epoch. It needs a process group only if ``world`` > 1.

    Raises:
        DataError: there are fewer training images than one batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        shapes: Shapes,
        data: RankData,
        validation: RankData | None,
        *,
        ranks: Ranks | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.shapes, self.data, self.validation = config, shapes, data, validation
        self.ranks = ranks or Ranks()
        self.rank, self.world, self.device = self.ranks.rank, self.ranks.world, self.ranks.device
        self.local_batch = config.batch_size // self.world
        self.steps_per_epoch = len(data) // self.local_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"train.batch_size is {config.batch_size}, but there are only {len(data) * self.world} training "
                "images: lower --train.batch-size"
            )
        self.net = build_net(config, shapes, weights).to(self.device)
        if config.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.has_dropout = any(isinstance(m, _DropoutNd) and m.p > 0 for m in self.net.modules())
        self.optimizer = make_optimizer(self.net, config)
        self.average = _moving_average(self.net, config.ema_decay) if config.ema_decay else None
        self.epoch = 0
        self.resumed: dict[str, Any] = {}
        """Entry of the next epoch's record on damaged checkpoints (docs/records.md)."""
        self._module: nn.Module | None = None
        self._phase: Phase | None = None

    def resume(self, storage: Storage) -> None:
        """Continue from the newest whole checkpoint in a directory, if there is one.

        Rank 0 reads the file and sends its bytes. All ranks then continue from the same state,
        whatever each node's file system shows.
        """
        newest = self.ranks.agreed(lambda: checkpoints.newest_whole(storage))
        if newest.path:
            self.epoch = checkpoints.load_checkpoint(newest, **self._checkpointed())
        if newest.damaged:
            self.resumed = {"from": newest.path, "damaged": list(newest.damaged)}

    def save(self, storage: Storage) -> None:
        """Write a checkpoint of the epochs done so far."""
        checkpoints.save_checkpoint(storage, epoch=self.epoch, **self._checkpointed())

    def _checkpointed(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the number of epochs."""
        return {
            "net": self.net,
            "optimizer": self.optimizer,
            "average": self.average,
            "config": self.config,
            "shapes": self.shapes,
        }

    @property
    def trained_net(self) -> nn.Module:
        """Return the network to validate and export: the moving average, if there is one."""
        return self.net if self.average is None else self.average.module

    def module(self, phase: Phase) -> nn.Module:
        """Return the phase's module, wrapped in DDP if there are several ranks.

        It is built anew only if the phase changes.
        """
        if self._phase != phase or self._module is None:
            module = PhaseModule(self.net, phase, self.config)
            # Batch norm is per rank: buffers are not broadcast before each step (docs/method.md).
            self._module = DistributedDataParallel(module, broadcast_buffers=False) if self.world > 1 else module
            self._phase = phase
        return self._module

    def run_epoch(self, live: Live | None = None) -> dict[str, Any]:
        """Train one epoch, validate, and return the epoch's record (docs/records.md).

        Raises:
            NonFiniteLoss: the loss or a weight is not finite.
        """
        epoch, total = self.epoch, self.config.epochs * self.steps_per_epoch
        phase = phase_at_epoch(epoch, self.config)
        module = self.module(phase)
        self.net.train()
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, epoch, self.rank))
        order = torch.randperm(len(self.data), generator=generator).to(self.device)
        steps: list[tuple[int, float, float, dict[str, Tensor]]] = []
        # First step whose loss is not finite, on the device, since reading it stops the GPU.
        bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        begin = time.time()
        for i in range(self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + i
            rows = order[i * self.local_batch : (i + 1) * self.local_batch]
            lr = learning_rate(step, self.steps_per_epoch, self.config)
            terms = self._step(module, rows, step, lr)
            bad_step = torch.where((bad_step < 0) & ~torch.isfinite(terms["loss"]), step, bad_step)
            steps.append((step, time.time(), lr, terms))
            if live is not None:
                live(step + 1, total, terms["loss"].item)
            if i % FINITE_CHECK_STEPS == FINITE_CHECK_STEPS - 1:
                self._check_finite(bad_step, step)
        self._check_finite(bad_step, step)
        self._share_buffers()
        seconds = time.time() - begin
        self.epoch += 1
        names = list(steps[0][3])
        values = torch.stack([torch.stack([t[n] for n in names]) for *_, t in steps]).float().cpu().tolist()
        rate = self.steps_per_epoch * self.local_batch * self.world / seconds
        resumed, self.resumed = self.resumed, {}
        return {
            **({"resumed": resumed} if resumed else {}),
            "epoch": epoch,
            "phase": phase,
            "seconds": seconds,
            "images_per_second": rate,
            "steps": [
                {"step": step, "time": at, "lr": lr, "images_per_second": rate, **dict(zip(names, row, strict=True))}
                for (step, at, lr, _), row in zip(steps, values, strict=True)
            ],
            "validation": self.validate(),
        }

    def _step(self, module: nn.Module, rows: Tensor, step: int, lr: float) -> dict[str, Tensor]:
        """Train on one batch. Every random stream follows from the step."""
        seed = self.config.seed
        if self.has_dropout:  # Dropout draws from torch's global stream.
            torch.manual_seed(stream_seed(seed, step, self.rank, DROPOUT_STREAM))
        terms = train_step(
            module,
            self.optimizer,
            augmented(self.data.batch(rows), self.config, step, self.rank),
            lr=lr,
            config=self.config,
            sizes=self.shapes.sizes,
            noise=gaussian_noise(self.config, step, self.rank, self.device),
            generator=torch.Generator().manual_seed(stream_seed(seed, step, self.rank, ADVERSARIAL_STREAM)),
        )
        if self.average is not None:
            self.average.update_parameters(self.net)
        return terms

    def _check_finite(self, bad_step: Tensor, step: int) -> None:
        # The weights are checked too: after the last step no loss shows that they are spoiled.
        weights = torch.stack([p.detach().abs().amax() for p in self.net.parameters()]).amax()
        bad_step = torch.where((bad_step < 0) & ~torch.isfinite(weights), step, bad_step)
        if self.world > 1:  # Every rank must come to the same decision.
            first = torch.where(bad_step < 0, torch.iinfo(torch.int64).max, bad_step)
            dist.all_reduce(first, dist.ReduceOp.MIN)
            bad_step = torch.where(first == torch.iinfo(torch.int64).max, -1, first)
        if int(bad_step) >= 0:
            raise NonFiniteLoss(int(bad_step))

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Give every rank the batch norm statistics of rank 0, which are the exported ones.

        This happens after every epoch. Adversarial training reads the statistics, since it makes
        its examples in eval mode. It sees the same values after a restart, and without validation.
        """
        if self.world > 1:
            for net in {id(net): net for net in (self.net, self.trained_net)}.values():
                for buffer in net.buffers():
                    dist.broadcast(buffer, src=0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return accuracy and mean squared error per value of level 0, on held-out images."""
        if self.validation is None:
            return {}
        net = self.trained_net.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.validation), VALIDATION_BATCH):
            batch = self.validation.batch(slice(start, start + VALIDATION_BATCH))
            sums += validation_sums(net, batch)
        if self.world > 1:
            dist.all_reduce(sums)
        correct, count, error = sums.tolist()
        metrics = {}
        if not isinstance(self.net, ComDefend):
            metrics["accuracy"] = correct / count
        if isinstance(self.net, (ComDefend, DefendNet)):
            metrics["reconstruction"] = error / count
        return metrics


def _moving_average(net: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a network for the exponential moving average of its weights and buffers."""
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


class NonFiniteLoss(Exception):
    """The loss or the weights are not finite. ``step`` is the first step at which this was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step
