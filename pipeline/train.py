"""Ray Train: the models of an experiment, from shards to exported weights. Killed at any time, they continue.

Starting a Ray Train run costs half a minute on two cores (each of its processes imports torch), so one run trains models one
after the other, and there are as many runs side by side as the cluster has room for. A model's checkpoints lie in its own
directory, ``models/<kind>-<hash>/`` (docs/records.md), not in the run's: whichever run takes it up next finds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from components.config import Experiment, TrainConfig
from components.config.data import Shapes
from components.config.train import stored_levels
from components.errors import DataError, UserError, first_line
from components.fields import from_dict, to_dict
from components.models.build import build_net
from components.models.classifiers import ARCHITECTURES
from components.models.comdefend import ComDefend
from components.models.defend import DefendNet
from components.precision import describe
from components.random_streams import ADVERSARIAL_STREAM, DROPOUT_STREAM, stream_seed
from components.training.augment import Batch, augmented, gaussian_noise
from components.training.schedule import Phase, learning_rate, phase_at_epoch
from components.training.step import PhaseModule, make_optimizer, train_step, validation_sums
from pipeline import checkpoints, pretrained
from pipeline.assignment import ATTEMPT, Assignment
from pipeline.given import AUTOENCODER, copy_autoencoder
from pipeline.jobs import FAILED_MODEL, NOT_FINITE, Job, TrainingData, model_address
from pipeline.ranks import Ranks
from pipeline.runtime import interrupts
from pipeline.runtime.console import say
from pipeline.runtime.lease import Lease, LeaseLost
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage, StorageError

VALIDATION_BATCH = 500
LIVE_INTERVAL_S = 1.0
POLL_S = 2.0
"""How often a worker group looks whether a model that another run trains is finished or free."""
VISIBLE_S = 90.0
"""How long a network file system may hide a new file (NFS caches directory entries for up to a minute)."""
FINITE_CHECK_STEPS = 100
MAX_CONTROLLER_FAILURES = 3
"""How often Ray may fail to place the workers; without a limit it would try for ever."""


Live = Callable[[int, int, Callable[[], float]], None]
"""Called by the loop with (steps done, steps in all, function that gives the last loss)."""


class TrainingError(UserError):
    """Training stopped for a reason that starting it again would not mend."""


def jobs_of(experiment: Experiment, shapes: Shapes, data: TrainingData, root: Storage) -> list[Job]:
    """The models of an experiment as jobs. Pretrained weights are copied to the storage, where every worker reaches them."""
    jobs = []
    for name, given in experiment.variants().items():
        config = given.canonical()
        weights = pretrained.fetch(config, root, _tracking_uri(experiment)) if config.pretrained else ""
        autoencoder, without = "", ""
        if not config.epochs:
            tensors = pretrained.load(root, weights)
            autoencoder, without = copy_autoencoder(config, shapes, tensors, root, _tracking_uri(experiment))
        reads, identity = data.for_model(config)
        address = model_address(
            config, shapes, identity, experiment.scaling.workers, "+".join(filter(None, (weights, autoencoder)))
        )
        job = Job(name=name, config=config, pyramids=reads, weights=weights, address=address)
        jobs.append(dataclasses.replace(job, autoencoder=autoencoder, without=without))
    return jobs


class RankData:
    """The rows of one rank, held in memory: every world-th row, so that sorted sources stay mixed.

    Ranks hold equally many rows (at most world - 1 rows of the set are left out).
    """

    def __init__(self, shards: Any, rank: int, world: int, device: torch.device, levels: bool) -> None:
        count = shards.num_rows // world
        wanted = ["image", "label", *(shards.level_columns if levels else ())]
        columns: dict[str, list[np.ndarray]] = {}
        row = 0
        for shard in shards.iter_shards(wanted):
            mine = slice((rank - row) % world, None, world)
            for key, values in shard.items():
                columns.setdefault(key, []).append(np.ascontiguousarray(values[mine]))
            row += len(shard["label"])
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
                f"train.batch_size={config.batch_size} is more than the {len(data) * self.world} training images there are"
            )
        self.net = build_net(config, shapes, weights).to(self.device)
        if config.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.has_dropout = any(isinstance(m, _DropoutNd) and m.p > 0 for m in self.net.modules())
        self.optimizer = make_optimizer(self.net, config)
        self.epoch = 0
        self.resumed: dict[str, Any] = {}
        """What the next epoch's record says about the checkpoint it went on from (docs/records.md)."""
        self._module: nn.Module | None = None
        self._phase: Phase | None = None

    def resume(self, storage: Storage) -> None:
        """Continue from the newest whole checkpoint below a directory, if there is one.

        Rank 0 reads the file and sends its bytes, so that all ranks go on from the same state whatever each node's file
        system shows.
        """
        newest = self.ranks.agreed(lambda: checkpoints.newest_whole(storage))
        if newest.path:
            self.epoch = checkpoints.load_checkpoint(
                newest, net=self.net, optimizer=self.optimizer, config=self.config, shapes=self.shapes
            )
        if newest.damaged:
            self.resumed = {"from": newest.path, "damaged": list(newest.damaged)}

    def save(self, storage: Storage) -> None:
        """Write a checkpoint of the epochs done so far."""
        checkpoints.save_checkpoint(
            storage,
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
            if self.has_dropout:  # it draws from the process's global stream; a continued run draws the same
                torch.manual_seed(stream_seed(self.config.seed, step, self.rank, DROPOUT_STREAM))
            terms = train_step(
                module,
                self.optimizer,
                augmented(self.data.batch(rows), self.config, step, self.rank),
                lr=lr,
                config=self.config,
                sizes=self.shapes.sizes,
                noise=gaussian_noise(self.config, step, self.rank, self.device),
                generator=torch.Generator().manual_seed(
                    stream_seed(self.config.seed, step, self.rank, ADVERSARIAL_STREAM)
                ),
            )
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

    def _check_finite(self, bad_step: Tensor, step: int) -> None:
        # weights too: the last step may have spoiled them without a later loss to show it
        weights = torch.stack([p.detach().abs().amax() for p in self.net.parameters()]).amax()
        bad_step = torch.where((bad_step < 0) & ~torch.isfinite(weights), step, bad_step)
        if self.world > 1:  # every rank must come to the same decision
            first = torch.where(bad_step < 0, torch.iinfo(torch.int64).max, bad_step)
            dist.all_reduce(first, dist.ReduceOp.MIN)
            bad_step = torch.where(first == torch.iinfo(torch.int64).max, -1, first)
        if int(bad_step) >= 0:
            raise NonFiniteLoss(int(bad_step))

    @torch.no_grad()
    def _share_buffers(self) -> None:
        """Give every rank rank 0's batch norm statistics, which are those that are saved, validated and exported.

        Done at the end of every epoch, so that what reads them (examples of adversarial training are made in eval mode) sees
        the same values after a restart, and with or without validation images.
        """
        if self.world > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, src=0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return accuracy and reconstruction error (mean squared error per value, level 0) on the held-out images."""
        if self.validation is None:
            return {}
        self.net.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.validation), VALIDATION_BATCH):
            batch = self.validation.batch(slice(start, start + VALIDATION_BATCH))
            sums += validation_sums(self.net, batch)
        if self.world > 1:
            dist.all_reduce(sums)
        right, count, error = sums.tolist()
        out = {}
        if not isinstance(self.net, ComDefend):
            out["accuracy"] = right / count
        if isinstance(self.net, (ComDefend, DefendNet)):
            out["reconstruction"] = error / count
        return out


class NonFiniteLoss(Exception):
    """The loss or the weights are no longer finite. ``step`` is the first step at which this was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step


def _worker(settings: dict[str, Any]) -> None:
    """Train the models of one Ray Train run, on one of its workers."""
    import ray.train

    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    train_models(settings["jobs"], Storage(settings["root"]), ranks, settings)


def train_models(orders: Sequence[dict[str, Any]], root: Storage, ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Train models one after the other, on every rank of a worker group. Knows nothing of Ray.

    A model that fails is recorded (FAILED_MODEL, NOT_FINITE) and does not stop those behind it. A model that another run is
    training is left to that run: this one trains the others first and then waits.

    Args:
        orders: see :meth:`pipeline.jobs.Job.order`.
        settings: ``shapes``; ``token``, which names this worker group also after a restart.

    Raises:
        StorageError, DataError: of the storage or the shards, which all models share.
        ModelFailed: on several ranks only a new worker group can go on. Started again, it takes the next model.
    """
    assignment = Assignment(orders, root, settings["token"])
    data = DataCache(root, ranks)
    try:
        while (order := ranks.agreed(assignment.take)) is not None:
            if not order:
                time.sleep(POLL_S)
                continue
            data.load(order)
            _train_one(order, root / order["address"], data, settings, _WhileLeased(ranks, assignment))
            assignment.leave()
    finally:
        assignment.leave()


def _train_one(
    order: dict[str, Any], home: Storage, data: DataCache, settings: Mapping[str, Any], between: Between
) -> None:
    failure = ""
    try:
        train_model(order, home, data, settings, between)
    except NonFiniteLoss as e:  # on every rank alike
        if data.ranks.rank == 0:
            home.write_json(NOT_FINITE, {"step": e.step, "token": settings["token"]})
            home.delete(FAILED_MODEL)  # an earlier try's
    except StorageError:
        raise
    except Exception as e:
        if data.ranks.world > 1 and _lost_a_rank(e):
            raise
        failure = reason_of(e)
    if failure:
        record_failure(home, failure, settings["token"])
        if data.ranks.world > 1:  # the other ranks wait for this one within a step
            raise ModelFailed(failure)
        torch.cuda.empty_cache()  # here, where the error no longer holds the failed batch's tensors


def record_failure(home: Storage, reason: str, token: str) -> None:
    """Write down that a worker group could not train a model, and why."""
    home.write_json(FAILED_MODEL, {"reason": reason, "token": token})
    home.delete(NOT_FINITE)  # an earlier try's


class ModelFailed(Exception):
    """A model failed on one of several ranks; why is recorded on the storage."""


def reason_of(error: Exception) -> str:
    """Return one line that says why a model could not be trained, and what to do about it."""
    if isinstance(error, UserError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        reason += ". Lower train.batch_size or train.width, or train on GPUs with more memory"
    return reason


def _lost_a_rank(error: Exception) -> bool:
    """Tell whether a collective failed because another rank is gone, which is no fault of the model."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


class DataCache:
    """The last used data of each split: models that are trained one after the other mostly train on the same."""

    def __init__(self, root: Storage, ranks: Ranks) -> None:
        self.root, self.ranks = root, ranks
        self.kept: dict[str, tuple[tuple[str, bool], RankData]] = {}

    def get(self, split: str, addresses: Mapping[str, str], levels: bool) -> RankData | None:
        from pipeline.data import shards

        if split not in addresses:
            return None
        key = (addresses[split], levels)
        if split not in self.kept or self.kept[split][0] != key:
            self.kept.pop(split, None)  # before the next is loaded: both may not fit
            ranks = self.ranks
            loaded = RankData(shards.load(self.root, key[0]), ranks.rank, ranks.world, ranks.device, levels=levels)
            self.kept[split] = key, loaded
        return self.kept[split][1]

    def load(self, order: Mapping[str, Any]) -> None:
        """Read what a model is trained on. Damaged shards are no fault of the model, so they are met before it starts."""
        self.get("train", order["pyramids"], levels=stored_levels(from_dict(TrainConfig, order["config"])))
        self.get("validation", order["pyramids"], levels=False)


class Between:
    """Hooks that every rank calls after an epoch; these do nothing.

    No epoch is reported to Ray Train: it takes a report every 2 s, which a small model's epoch would wait for, and nothing
    reads them. The driver follows the records on storage.
    """

    def measure(self, loop: Loop, record: Mapping[str, Any]) -> None:
        """Called before the epoch counts as done: killed meanwhile, it is trained and measured again."""

    def stop(self, loop: Loop) -> bool:
        """Whether to leave the model as it is, with its checkpoint; every rank must come to the same answer."""
        return False


class _WhileLeased(Between):
    """Leaves a model that another run has taken over."""

    def __init__(self, ranks: Ranks, assignment: Assignment) -> None:
        self.ranks, self.assignment = ranks, assignment

    def stop(self, loop: Loop) -> bool:
        return not self.ranks.agreed(lambda: self.assignment.holds)


def train_model(
    job: dict[str, Any], home: Storage, data: DataCache, settings: Mapping[str, Any], between: Between | None = None
) -> None:
    """Train a model, or go on where it was left, and export it; called on every rank of a Ray Train worker group.

    Args:
        job: see :meth:`pipeline.jobs.Job.order`.

    Raises:
        NonFiniteLoss: on every rank alike.
    """
    config = from_dict(TrainConfig, job["config"])
    shapes = from_dict(Shapes, settings["shapes"])
    train_data = data.get("train", job["pyramids"], levels=stored_levels(config))
    assert train_data is not None  # the driver passes it always
    loop = Loop(
        config,
        shapes,
        train_data,
        data.get("validation", job["pyramids"], levels=False),
        ranks=data.ranks,
        weights=pretrained.load(data.root, job["weights"]) if job["weights"] else None,
    )
    kept = home / "checkpoints"
    if data.ranks.rank == 0:
        for directory in ("", "checkpoints", "history"):  # of workers that were killed while they wrote
            home.delete_stale(directory, HALF_WRITTEN_S)
    loop.resume(kept)
    last_live = 0.0

    def live(done: int, total: int, loss: Callable[[], float]) -> None:
        nonlocal last_live
        if data.ranks.rank == 0 and time.monotonic() - last_live >= LIVE_INTERVAL_S:
            last_live = time.monotonic()
            with suppress(StorageError):  # it only moves the progress bar
                home.write_json("live.json", {"done": done, "total": total, "loss": loss()})

    between = between or Between()
    while loop.epoch < config.epochs:
        record = loop.run_epoch(live)
        between.measure(loop, record)
        if data.ranks.rank == 0:
            home.write_json(f"history/epoch-{record['epoch']:05d}.json", record)
            if loop.epoch % config.checkpoint_every_epochs == 0 or loop.epoch == config.epochs:
                loop.save(kept)
        if loop.epoch < config.epochs and between.stop(loop):
            return
    if data.ranks.rank == 0 and not home.exists("model.json"):  # never over one that others may be reading
        _export(loop, home, job)


def _export(loop: Loop, home: Storage, job: dict[str, Any]) -> None:
    history = [home.read_json(f"history/{name}") for name in home.list("history")][: loop.config.epochs]
    seconds = sum(h["seconds"] for h in history)
    rate = sum(h["images_per_second"] * h["seconds"] for h in history) / seconds
    measured = {
        "workers": loop.world,
        "validation": history[-1]["validation"],
        "seconds": seconds,
        "images_per_second": rate,
        "arithmetic": describe(loop.device.type, loop.config.precision),
    }
    files = checkpoints.export(home, loop.net, loop.config, loop.shapes)
    parts = checkpoints.parts_of(loop.net)
    _write_model(home, files, parts, loop.config, loop.shapes, job["pyramids"], job["weights"], measured)
    # what it takes to continue is not needed any more, and is three times as large as the model
    for name in checkpoints.list_checkpoints(home / "checkpoints"):
        home.delete(f"checkpoints/{name}")
    for name in ("live.json", ATTEMPT, FAILED_MODEL, NOT_FINITE):
        home.delete(name)


def _write_model(
    home: Storage,
    files: Sequence[str],
    parts: Mapping[str, nn.Module],
    config: TrainConfig,
    shapes: Shapes,
    pyramids: Mapping[str, str],
    weights: str,
    measured: Mapping[str, Any],
) -> None:
    """Write the model.json of exported files, which says that the model is finished (docs/records.md)."""
    home.write_json(
        "model.json",
        {
            "schema": checkpoints.SCHEMA,
            "train": to_dict(config),
            "shapes": to_dict(shapes),
            "pyramids": dict(pyramids),
            "weights": weights,
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            **measured,
            "files": {f: hashlib.sha256(home.read_bytes(f)).hexdigest() for f in files},
        },
    )


def _take_as_given(job: Job, shapes: Shapes, root: Storage) -> None:
    """A model that is not trained but evaluated as it is (``epochs=0``), with its auto-encoder if it has one."""
    home = root / job.address
    net = build_net(job.config, shapes, pretrained.load(root, job.weights))
    files, parts = checkpoints.export(home, net, job.config, shapes), checkpoints.parts_of(net)
    if job.autoencoder:
        home.write_bytes(AUTOENCODER, root.read_bytes(job.autoencoder))
        files, parts = (
            [*files, AUTOENCODER],
            {**parts, "autoencoder": checkpoints.load_autoencoder(home.full_uri, trusted=job.config.arch)},
        )
    measured = {"workers": 1, "validation": {}, "seconds": 0.0, "images_per_second": 0.0}
    _write_model(home, files, parts, job.config, shapes, job.pyramids, job.weights, measured)


def _tracking_uri(experiment: Experiment) -> str:
    """Where mlflow:... is looked up: the tracking server of the run, or the database in its storage."""
    if experiment.tracking_uri:
        return experiment.tracking_uri
    from pipeline.tracking import uri

    return uri.default_uri(Storage(experiment.storage))


def check_models(experiment: Experiment, shapes: Shapes) -> list[str]:
    """Build every network once, without data: what cannot be built, exported and loaded again is refused before anything is
    computed.

    Returns:
        What a user should know of how pretrained weights were chosen.

    Raises:
        ConfigError: naming the setting. DataError, StorageError: pretrained weights that cannot be read, or do not fit.
    """
    seen, notes = set(), {}
    for config in experiment.variants().values():
        same = dataclasses.replace(config.canonical(), seed=0)
        if same not in seen:
            seen.add(same)
            weights = pretrained.read(same, _tracking_uri(experiment)) if same.pretrained else None
            if weights is not None and weights.note:
                notes[weights.note] = None
            net = build_net(same, shapes, weights)
            if same.arch not in ARCHITECTURES:  # those of this project are known to be exported and loaded again
                checkpoints.check_export(net, same, shapes)
    return list(notes)


class Progress:
    """What :func:`train` tells while it goes on. All calls come from one thread at a time, though not the caller's."""

    def on_epoch(self, name: str, record: dict[str, Any]) -> None:
        """An epoch's record, in order, once."""

    def on_live(self, done: int, total: int, note: str) -> None:
        """About once a second: steps done and in all, over all models."""

    def on_given(self, name: str, without: str) -> None:
        """A model that is given, not trained, has no auto-encoder, and why."""

    def on_model(self, name: str, model: dict[str, Any]) -> None:
        """A model is finished: its model.json, with "path"."""


def train(
    experiment: Experiment,
    shapes: Shapes,
    data: TrainingData,
    root: Storage,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Train every model of an experiment, or take it where it is finished, or continue it where it is not.

    Returns:
        Name -> model.json, with "path" = the model's address below ``root``, in the experiment's order; where the experiment
        allows that a model diverges, {"diverged": step} instead.

    Raises:
        TrainingError: a loss was not finite, or the workers failed more often than allowed. The other models are trained all
            the same, and kept.
        UserError: what a worker found wrong with data or storage.
    """
    progress = progress or Progress()
    jobs = jobs_of(experiment, shapes, data, root)
    watch = _Watch(root, jobs, progress)
    for job in jobs:
        if job.without:
            progress.on_given(job.name, job.without)
        if not job.config.epochs and not (root / job.address).exists("model.json"):
            _take_as_given(job, shapes, root)
    watch.look()
    allowed, token = experiment.allow_diverged, secrets.token_hex(8)
    todo = [j for j in {j.address: j for j in jobs}.values() if j.name not in watch.finished]
    if allowed:  # trained again, it would diverge again
        todo = [j for j in todo if not (root / j.address).exists(NOT_FINITE)]
    if todo:
        settings = {
            "shapes": to_dict(shapes),
            "root": root.full_uri,
            "threads": experiment.scaling.threads_per_worker,
            "token": token,
        }
        for job in todo:
            if holder := Lease(root / job.address).holder_name():
                say(
                    f"  {job.name} is being trained by {holder}: this run waits for it, or goes on with it if that one is gone"
                )
        with watch.following():
            _fit_side_by_side(_groups(todo, parallel_runs(experiment)), settings, experiment, root, watch.check)
    missing = [j for j in jobs if j.name not in watch.finished]
    ends = {j.name: _end_of(root / j.address, watch, token if j in todo else "") for j in missing}
    ends = {name: end for name, end in ends.items() if name not in watch.finished}
    refused = [j for j in jobs if j.name in ends and not (allowed and "step" in ends[j.name])]
    if refused:
        _refuse(refused, ends, root)
    return {j.name: watch.finished.get(j.name) or {"diverged": ends[j.name]["step"]} for j in jobs}


def _end_of(home: Storage, watch: _Watch, token: str) -> dict[str, Any]:
    """Return the record of how a model that is not finished ended: ``step`` where it diverged, else ``reason``.

    Its workers have ended, so there is one of this call's token. A network file system may show it late, and another run
    may have tried the model since and written over it.

    Raises:
        StorageError: there is none.
    """
    deadline = time.monotonic() + VISIBLE_S
    while True:
        names = home.list()
        if "model.json" in names:
            watch.look()
            return {}
        for name in (FAILED_MODEL, NOT_FINITE):
            if name in names:
                end = dict(home.read_json(name))
                if end.get("token", "").startswith(token) or time.monotonic() > deadline:
                    return end
        if time.monotonic() > deadline:
            raise StorageError(
                f"the training workers have ended, but {home.uri} holds no model: the storage is not the same directory on "
                "every node. Give a storage that all nodes share"
            )
        time.sleep(1.0)


def parallel_runs(experiment: Experiment) -> int:
    """How many Ray Train runs there is room for at once."""
    from pipeline.runtime.cluster import room_for, train_bundle

    scaling = experiment.scaling
    room = max(1, room_for(train_bundle(scaling)) // scaling.workers)
    return min(room, scaling.parallel_models) if scaling.parallel_models else room


def _groups(jobs: Sequence[Job], runs: int) -> list[list[Job]]:
    """Jobs shared out over so many runs, longest first to the least loaded; each run keeps the experiment's order."""
    loads = [0.0] * min(runs, len(jobs))
    groups: list[list[Job]] = [[] for _ in loads]
    for job in sorted(jobs, key=lambda j: -j.config.relative_cost):
        i = loads.index(min(loads))
        loads[i] += job.config.relative_cost
        groups[i].append(job)
    return [sorted(group, key=jobs.index) for group in groups]


def _fit_side_by_side(
    groups: Sequence[Sequence[Job]],
    settings: dict[str, Any],
    experiment: Experiment,
    root: Storage,
    check: Callable[[], None],
) -> None:
    """Train every group in a Ray Train run of its own. The first error is raised when all have ended: nothing else is lost.

    No run is in the main thread: Ray Train would take Ctrl-C over there, and never give it back.
    """
    errors: list[Exception] = []

    def fit(group: Sequence[Job]) -> None:
        try:
            _fit(group, settings, experiment, root)
        except Exception as e:
            errors.append(e)

    # daemons: an interrupted driver does not wait for them, and its end is theirs
    threads = [threading.Thread(target=fit, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        check()
        for thread in threads:
            thread.join(LIVE_INTERVAL_S / len(threads))
    if errors:
        raise errors[0]


def _fit(group: Sequence[Job], settings: dict[str, Any], experiment: Experiment, root: Storage) -> None:
    import ray.train

    from pipeline.runtime.user_errors import unwrap

    failures = experiment.scaling.max_failures
    token = f"{settings['token']}-{secrets.token_hex(4)}"
    config = {**settings, "jobs": [job.order() for job in group], "token": token}
    while True:
        before = _progress_of(group, root)
        try:
            return fit_workers(_worker, config, experiment, root, max_failures=failures)
        except Exception as e:
            mine = unwrap(e)
            if mine is not None:
                raise mine from e
            # failures count since the last progress: a spot node is lost now and then in days of training
            may_blame = not isinstance(e, ray.train.ControllerError)  # else the workers could not even start
            if _progress_of(group, root) != before or (may_blame and _blame(group, root, token, e)):
                continue
            names = ", ".join(j.name for j in group if not root.exists(f"{j.address}/model.json"))
            raise TrainingError(
                f"training of {names} failed more than scaling.max_failures={failures} times: {e}\n"
                f"Checkpoints are kept below {root.uri}/models; the same command continues from the last one"
            ) from e


def _progress_of(group: Sequence[Job], root: Storage) -> list[Any]:
    """Return what changes on the storage when an epoch or a model of the group ends, one way or another."""
    homes = [root / job.address for job in group]
    ends = ("model.json", FAILED_MODEL, NOT_FINITE)
    return [
        (len(home.list("history")), [home.read_json(name) if home.exists(name) else None for name in ends])
        for home in homes
    ]


def _blame(group: Sequence[Job], root: Storage, token: str, error: Exception) -> bool:
    """Record the model at which the workers died again and again as failed, so that those behind it are trained."""
    for home in (root / job.address for job in group):
        if home.exists(ATTEMPT) and home.read_json(ATTEMPT)["token"] == token:
            reason = f"its workers died again and again (killed for want of memory?): {first_line(error)}"
            record_failure(home, reason, token)
            home.delete(ATTEMPT)
            return True
    return False


def fit_workers(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    experiment: Experiment,
    root: Storage,
    *,
    max_failures: int,
) -> None:
    """One Ray Train run from its start to its end: ``worker(config)`` on every rank. Raises what Ray Train does."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipeline.process_group import NodeTorchConfig
    from pipeline.runtime.cluster import train_bundle

    scaling = experiment.scaling
    # nothing of Ray's own state is continued: the models' directories say how far they are
    ray_files = root / f"ray/{secrets.token_hex(8)}"
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        torch_config=NodeTorchConfig(backend="nccl" if scaling.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers, use_gpu=scaling.gpu, resources_per_worker=train_bundle(scaling)
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=ray_files.root,
            storage_filesystem=ray_files.fs,
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures, controller_failure_limit=MAX_CONTROLLER_FAILURES
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )

    def clean() -> None:
        with suppress(OSError):
            root.fs.delete_dir(ray_files.root)

    with interrupts.cleaning_up(clean):
        trainer.fit()


def _refuse(jobs: Sequence[Job], ends: Mapping[str, Mapping[str, Any]], root: Storage) -> None:
    lines = []
    for job in jobs:
        home, end = root / job.address, ends[job.name]
        if "step" not in end:
            lines.append(f"training of {job.name} failed: {end['reason']}")
            continue
        names = checkpoints.list_checkpoints(home / "checkpoints")
        good = f"{home.uri}/checkpoints/{names[-1]}" if names else "none was written yet"
        lines.append(
            f"training of {job.name} stopped: the loss was not finite at step {end['step']}. Last good checkpoint: {good}"
        )
    if any("step" in ends[job.name] for job in jobs):
        lines.append(
            "Lower train.lr or train.reconstruction_weight, or set train.clip_norm; with allow_diverged the run goes on without"
        )
    lines.append("The other models are trained and kept; the same command tries these again")
    raise TrainingError("\n".join(lines))


class _Watch:
    """Follows the files that the ranks 0 write. Records pass over the storage, so none is lost with a process."""

    def __init__(self, root: Storage, jobs: Sequence[Job], progress: Progress) -> None:
        self.root, self.jobs, self.progress = root, jobs, progress
        self.finished: dict[str, dict[str, Any]] = {}
        self.told: dict[str, set[str]] = {job.name: set() for job in jobs}
        self.lost: LeaseLost | None = None

    def look(self) -> None:
        """Tell what is new."""
        steps, losses = {}, {}
        for job in self.jobs:
            if job.name in self.finished:
                continue
            home = self.root / job.address
            whole = home.exists("model.json")  # asked first: what it counts is there by then
            for name in home.list("history"):
                if name not in self.told[job.name]:
                    self.progress.on_epoch(job.name, home.read_json(f"history/{name}"))
                    self.told[job.name].add(name)
            if whole:
                model = _finished_model(home, job.address)
                self.progress.on_model(job.name, model)
                self.finished[job.name] = model
            elif home.exists("live.json"):
                live = home.read_json("live.json")
                steps[job.name], losses[job.name] = (live["done"], live["total"]), live["loss"]
        if steps:
            share = (sum(done / total for done, total in steps.values()) + len(self.finished)) / len(self.jobs)
            now = (f"{name} step {done} of {total}, loss {losses[name]:.4f}" for name, (done, total) in steps.items())
            self.progress.on_live(round(100 * share), 100, f"%: {'; '.join(now)}")

    def check(self) -> None:
        """Raise LeaseLost where another process has taken the run over."""
        if self.lost is not None:
            raise self.lost

    @contextmanager
    def following(self) -> Iterator[None]:
        """Look about once a second while the body runs, and once more at its end."""
        done = threading.Event()

        def follow() -> None:
            told = ""
            while not done.wait(LIVE_INTERVAL_S):
                try:
                    self.look()
                except LeaseLost as e:
                    self.lost = e
                    return
                except Exception as e:  # whatever it is passes or comes again at the end, where it is raised
                    if str(e) != told:
                        say(f"progress cannot be read or published for the moment ({e}); training goes on")
                        told = str(e)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        interrupted = False
        try:
            yield
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            done.set()
            if not interrupted:  # it may be publishing to a server that does not answer
                thread.join()
                self.look()


def _finished_model(home: Storage, address: str) -> dict[str, Any]:
    model: dict[str, Any] = home.read_json("model.json")
    for file, digest in model["files"].items():
        if hashlib.sha256(home.read_bytes(file)).hexdigest() != digest:
            raise DataError(f"{home.uri}/{file} is not what was exported; delete {home.uri} to train the model again")
    return {**model, "path": address}
