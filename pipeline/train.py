"""Ray Train: one model of an experiment, from shards to exported weights. Killed at any time, it continues.

Where things are: ``models/<name>-<hash>/`` of the storage (docs/records.md); Ray's own checkpoints below its ``ray/``.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.config import Experiment, TrainConfig, content_hash, from_dict, to_dict
from components.errors import DataError, UserError
from components.models.defend import DefendNet
from components.schedule import Phase, learning_rate, phase_at_epoch
from pipeline import checkpoints
from pipeline.storage import Storage
from pipeline.train_step import (
    Batch,
    PhaseModule,
    Shapes,
    build_net,
    gaussian_noise,
    make_optimizer,
    stream_seed,
    train_step,
    validation_sums,
)

CODE_VERSION = 1
"""Part of a model's address. Raise it when the same config would train to other weights."""
VALIDATION_BATCH = 500
LIVE_INTERVAL_S = 1.0
FINITE_CHECK_STEPS = 100
NOT_FINITE = "not-finite.json"
MAX_CONTROLLER_FAILURES = 3
"""How often Ray may fail to place the workers; without a limit it would try for ever."""


Live = Callable[[int, int, Callable[[], float]], None]
"""Called by the loop with (steps done, steps in all, function that gives the last loss)."""


class TrainingError(UserError):
    """Training stopped for a reason that starting it again would not mend."""


def model_address(name: str, config: TrainConfig, shapes: Shapes, pyramids: dict[str, str], workers: int) -> str:
    """``models/<name>-<hash>``: all that the weights follow from. Batch norm is per worker, so their number counts."""
    parts = [CODE_VERSION, to_dict(config), to_dict(shapes), pyramids, workers]
    return f"models/{name}-{content_hash(*parts)}"


class RankData:
    """The rows of one rank, held in memory: every world-th row, so that sorted sources stay mixed.

    Ranks hold equally many rows (at most world - 1 rows of the set are left out).
    """

    def __init__(self, shards: Any, rank: int, world: int, device: torch.device, levels: bool) -> None:
        count = shards.num_rows // world
        columns: dict[str, list[np.ndarray]] = {}
        row = 0
        for shard in shards.iter_shards():
            n = len(shard["index"])
            mine = slice((rank - row) % world, None, world)
            for key, values in shard.items():
                if key in ("image", "label") or (levels and key.startswith("level_")):
                    columns.setdefault(key, []).append(np.ascontiguousarray(values[mine]))
            row += n
        joined = {k: torch.from_numpy(np.concatenate(v)[:count]) for k, v in columns.items()}
        self.images = joined["image"].to(device)
        self.labels = joined["label"].long().to(device)
        self.levels = tuple(joined[k].to(device) for k in sorted(k for k in joined if k.startswith("level_")))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor | slice) -> Batch:
        return Batch(images=self.images[rows], labels=self.labels[rows], levels=tuple(x[rows] for x in self.levels))


class Loop:
    """One rank's training, epoch by epoch. Needs a process group only where ``world`` > 1; knows nothing of Ray.

    Raises:
        DataError: fewer training images than one batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        shapes: Shapes,
        data: RankData,
        validation: RankData | None,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.shapes, self.data, self.validation = config, shapes, data, validation
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")
        self.local_batch = config.batch_size // world
        self.steps_per_epoch = len(data) // self.local_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"train.batch_size={config.batch_size} is more than the {len(data) * world} training images there are"
            )
        self.net = build_net(config, shapes).to(self.device)
        if config.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.net, config)
        self.epoch = 0
        self._module: nn.Module | None = None
        self._phase: Phase | None = None

    def resume(self, directory: str) -> None:
        """Continue from a checkpoint directory."""
        self.epoch = checkpoints.load_checkpoint(
            directory, net=self.net, optimizer=self.optimizer, config=self.config, shapes=self.shapes
        )

    def save(self, directory: str) -> None:
        """Write a checkpoint of the epochs done so far."""
        checkpoints.save_checkpoint(
            directory,
            net=self.net,
            optimizer=self.optimizer,
            epoch=self.epoch,
            config=self.config,
            shapes=self.shapes,
        )

    def module(self, phase: Phase) -> nn.Module:
        """The phase's module, wrapped in DDP where there are several ranks; built anew only where the phase changes."""
        if self._phase != phase or self._module is None:
            module = PhaseModule(self.net, phase, self.config)
            # per-rank batch norm: buffers are not broadcast before each step (docs/method.md)
            self._module = DistributedDataParallel(module, broadcast_buffers=False) if self.world > 1 else module
            self._phase = phase
        return self._module

    def run_epoch(self, live: Live | None = None) -> dict[str, Any]:
        """Train one epoch and validate. Returns its record (docs/records.md); raises NonFiniteLoss."""
        epoch, total = self.epoch, self.config.epochs * self.steps_per_epoch
        phase = phase_at_epoch(epoch, self.config)
        module = self.module(phase)
        self.net.train()
        generator = torch.Generator().manual_seed(stream_seed(self.config.seed, epoch, self.rank))
        order = torch.randperm(len(self.data), generator=generator).to(self.device)
        steps: list[tuple[int, float, float, dict[str, Tensor]]] = []
        # the first step whose loss is not finite, kept on the device: asking for it every step would stop the GPU
        bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        begin = time.time()
        for i in range(self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + i
            rows = order[i * self.local_batch : (i + 1) * self.local_batch]
            lr = learning_rate(step, self.steps_per_epoch, self.config)
            noise = gaussian_noise(self.config, step, self.rank, self.device)
            terms = train_step(module, self.optimizer, self.data.batch(rows), lr=lr, config=self.config, noise=noise)
            bad_step = torch.where((bad_step < 0) & ~torch.isfinite(terms["loss"]), step, bad_step)
            steps.append((step, time.time(), lr, terms))
            if live is not None:
                live(step + 1, total, terms["loss"].item)
            if i % FINITE_CHECK_STEPS == FINITE_CHECK_STEPS - 1:
                self._check_finite(bad_step)
        self._check_finite(bad_step)
        seconds = time.time() - begin
        self.epoch += 1
        names = list(steps[0][3])
        values = torch.stack([torch.stack([t[n] for n in names]) for *_, t in steps]).float().cpu().tolist()
        rate = self.steps_per_epoch * self.local_batch * self.world / seconds
        return {
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

    def _check_finite(self, bad_step: Tensor) -> None:
        # weights too: a last step may have spoiled them without a later loss to show it
        weights = torch.stack([p.detach().abs().amax() for p in self.net.parameters()]).amax()
        last = self.epoch * self.steps_per_epoch + self.steps_per_epoch - 1
        bad_step = torch.where((bad_step < 0) & ~torch.isfinite(weights), last, bad_step)
        if self.world > 1:  # every rank must come to the same decision
            first = torch.where(bad_step < 0, torch.iinfo(torch.int64).max, bad_step)
            dist.all_reduce(first, dist.ReduceOp.MIN)
            bad_step = torch.where(first == torch.iinfo(torch.int64).max, -1, first)
        if int(bad_step) >= 0:
            raise NonFiniteLoss(int(bad_step))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy and reconstruction error (mean squared error per value, level 0) on the held-out images.

        Uses rank 0's batch norm statistics on every rank, since those are what is exported.
        """
        if self.validation is None:
            return {}
        if self.world > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, src=0)
        self.net.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.validation), VALIDATION_BATCH):
            batch = self.validation.batch(slice(start, start + VALIDATION_BATCH))
            sums += validation_sums(self.net, batch, self.config)
        if self.world > 1:
            dist.all_reduce(sums)
        right, count, error = sums.tolist()
        out = {"accuracy": right / count}
        if isinstance(self.net, DefendNet):
            out["reconstruction"] = error / count
        return out


class NonFiniteLoss(Exception):
    """The loss or the weights are no longer finite. ``step`` is the first step at which this was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train

    from pipeline import shards

    config = from_dict(TrainConfig, settings["config"])
    shapes = from_dict(Shapes, settings["shapes"])
    root, home = Storage(settings["root"]), Storage(settings["home"])
    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def data_of(split: str) -> RankData | None:
        if split not in settings["pyramids"]:
            return None
        return RankData(
            shards.load(root, settings["pyramids"][split]), rank, world, device, levels=config.defense != "none"
        )

    train_data = data_of("train")
    assert train_data is not None  # the driver passes it always
    loop = Loop(config, shapes, train_data, data_of("validation"), rank=rank, world=world, device=device)
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as directory:
            loop.resume(directory)

    last_live = 0.0

    def live(done: int, total: int, loss: Callable[[], float]) -> None:
        nonlocal last_live
        if rank == 0 and time.monotonic() - last_live >= LIVE_INTERVAL_S:
            last_live = time.monotonic()
            home.write_json("live.json", {"done": done, "total": total, "loss": loss()})

    while loop.epoch < config.epochs:
        try:
            record = loop.run_epoch(live)
        except NonFiniteLoss as e:
            # told, not raised: a failure would be tried again, and would come again. By a file: Ray's result holds the
            # metrics of the last checkpoint, not of the last report
            if rank == 0:
                home.write_json(NOT_FINITE, {"step": e.step})
            return
        if rank == 0:
            home.write_json(f"history/epoch-{record['epoch']:05d}.json", record)
        metrics = {"epoch": loop.epoch, "phase": record["phase"], **record["validation"]}
        if loop.epoch % config.checkpoint_every_epochs and loop.epoch < config.epochs:
            ray.train.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if rank == 0:
                loop.save(directory)
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report(metrics, checkpoint=checkpoint)
    if rank == 0:
        _export(loop, home, settings)


def _export(loop: Loop, home: Storage, settings: dict[str, Any]) -> None:
    files = checkpoints.export(home, loop.net, loop.config, loop.shapes)
    history = [home.read_json(f"history/{name}") for name in home.list("history")][: loop.config.epochs]
    seconds = sum(h["seconds"] for h in history)
    parameters = {"classifier": sum(p.numel() for p in checkpoints.classifier_of(loop.net).parameters())}
    if isinstance(loop.net, DefendNet):
        parameters["autoencoder"] = sum(p.numel() for p in loop.net.autoencoder.parameters())
    home.write_json(
        "model.json",
        {
            "schema": checkpoints.SCHEMA,
            "train": settings["config"],
            "shapes": settings["shapes"],
            "pyramids": settings["pyramids"],
            "workers": loop.world,
            "parameters": parameters,
            "validation": history[-1]["validation"],
            "seconds": seconds,
            "images_per_second": sum(h["images_per_second"] * h["seconds"] for h in history) / seconds,
            "files": {f: hashlib.sha256(home.read_bytes(f)).hexdigest() for f in files},
        },
    )


def check_models(experiment: Experiment, shapes: Shapes) -> None:
    """Build every network once, without data: what cannot be built is refused before anything is computed.

    Raises:
        ConfigError: naming the setting.
    """
    for config in experiment.variants().values():
        build_net(config, shapes)


def train(
    name: str,
    config: TrainConfig,
    shapes: Shapes,
    pyramids: dict[str, str],
    experiment: Experiment,
    root: Storage,
    *,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_live: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Train one model, or take it where it is finished, or continue it where it is not.

    Args:
        pyramids: addresses of the shard sets, "train" and, if there is one, "validation".
        on_epoch: called on the driver with each epoch's record, in order, once per record.
        on_live: called on the driver about once a second with (steps done, steps in all, note).

    Returns:
        model.json, with "path" = the model's address below ``root``.

    Raises:
        TrainingError: the loss was not finite, or the workers failed more often than allowed.
        UserError: what a worker found wrong with data or storage.
    """
    scaling = experiment.scaling
    address = model_address(name, config, shapes, pyramids, scaling.workers)
    home = root / address
    if not home.exists("model.json"):
        settings = {
            "config": to_dict(config),
            "shapes": to_dict(shapes),
            "pyramids": pyramids,
            "root": root.uri,
            "home": home.uri,
            "threads": scaling.threads_per_worker,
        }
        with _watching(home, on_epoch, on_live):
            _fit(name, settings, experiment, home)
    elif on_epoch is not None:
        for record in _history(home):
            on_epoch(record)
    model: dict[str, Any] = home.read_json("model.json")
    for file, digest in model["files"].items():
        if hashlib.sha256(home.read_bytes(file)).hexdigest() != digest:
            raise DataError(
                f"{home.uri}/{file} is not what was exported; delete {home.uri}/model.json to export it again"
            )
    return {**model, "path": address}


def _fit(name: str, settings: dict[str, Any], experiment: Experiment, home: Storage) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.cluster import unwrap

    home.delete(NOT_FINITE)  # an earlier try's
    scaling = experiment.scaling
    resources: dict[str, float] = {"CPU": scaling.cpus_per_worker}
    if scaling.gpu:
        resources["GPU"] = 1.0
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if scaling.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers, use_gpu=scaling.gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # the same name at the same place is how Ray finds the checkpoints of a run that was killed
            name="ray",
            storage_path=home.root,
            storage_filesystem=home.fs,
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=MAX_CONTROLLER_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as e:
        mine = unwrap(e)
        if mine is not None:
            raise mine from e
        raise TrainingError(
            f"training of {name} failed more than scaling.max_failures={scaling.max_failures} times: {e}\n"
            f"Checkpoints are kept below {home.uri}; the same command continues from the last one"
        ) from e
    if home.exists(NOT_FINITE):
        step = home.read_json(NOT_FINITE)["step"]
        good = result.checkpoint.path if result.checkpoint else "none was written yet"
        raise TrainingError(
            f"training of {name} stopped: the loss was not finite at step {step}. Last good checkpoint: {good}. "
            "Lower train.lr or train.reconstruction_weight, or set train.clip_norm"
        )


def _history(home: Storage) -> list[dict[str, Any]]:
    return [home.read_json(f"history/{name}") for name in home.list("history")]


@contextmanager
def _watching(
    home: Storage,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    on_live: Callable[[int, int, str], None] | None,
) -> Iterator[None]:
    """Follow the files that rank 0 writes. Records pass over the storage, so none is lost with a process."""
    done = threading.Event()
    told: set[str] = set()

    def look() -> None:
        for name in home.list("history"):
            if name not in told and on_epoch is not None:
                told.add(name)
                on_epoch(home.read_json(f"history/{name}"))
        if on_live is not None and home.exists("live.json"):
            live = home.read_json("live.json")
            on_live(live["done"], live["total"], f"steps, loss {live['loss']:.4f}")

    def follow() -> None:
        while not done.wait(LIVE_INTERVAL_S):
            with suppress(UserError):  # a file being replaced, a storage out of reach for a moment: look again
                look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()
