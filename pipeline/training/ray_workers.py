"""What each Ray Train worker runs, and one Ray Train run."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from components.config import Experiment, TrainConfig
from components.config.data import Shapes
from components.config.train import stored_levels
from components.errors import UserError, first_line
from components.fields import from_dict, to_dict
from components.network import build_net
from components.precision import describe
from pipeline.runtime import interrupts
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage, StorageError
from pipeline.training import checkpoints, exports, pretrained
from pipeline.training.assignment import ATTEMPT, Assignment
from pipeline.training.external import AUTOENCODER
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingJob
from pipeline.training.loop import NonFiniteLoss, RankData, TrainingLoop
from pipeline.training.monitor import LIVE_INTERVAL_S
from pipeline.training.ranks import Ranks

POLL_S = 2.0
"""How often a worker group looks whether a model that another run trains is finished or free."""
MAX_CONTROLLER_FAILURES = 3
"""How often Ray may fail to place the workers; without a limit it would try for ever."""


class TrainingError(UserError):
    """Training stopped for a reason that starting it again would not mend."""


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
        orders: see :meth:`pipeline.training.jobs.TrainingJob.request`.
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
    order: dict[str, Any], home: Storage, data: DataCache, settings: Mapping[str, Any], between: EpochCallback
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


class EpochCallback:
    """Hooks that every rank calls after an epoch; these do nothing.

    No epoch is reported to Ray Train: it takes a report every 2 s, which a small model's epoch would wait for, and nothing
    reads them. The driver follows the records on storage.
    """

    def measure(self, loop: TrainingLoop, record: Mapping[str, Any]) -> None:
        """Called before the epoch counts as done: killed meanwhile, it is trained and measured again."""

    def stop(self, loop: TrainingLoop) -> bool:
        """Whether to leave the model as it is, with its checkpoint; every rank must come to the same answer."""
        return False


class _WhileLeased(EpochCallback):
    """Leaves a model that another run has taken over."""

    def __init__(self, ranks: Ranks, assignment: Assignment) -> None:
        self.ranks, self.assignment = ranks, assignment

    def stop(self, loop: TrainingLoop) -> bool:
        return not self.ranks.agreed(lambda: self.assignment.holds)


def train_model(
    job: dict[str, Any],
    home: Storage,
    data: DataCache,
    settings: Mapping[str, Any],
    between: EpochCallback | None = None,
) -> None:
    """Train a model, or go on where it was left, and export it; called on every rank of a Ray Train worker group.

    Args:
        job: see :meth:`pipeline.training.jobs.TrainingJob.request`.

    Raises:
        NonFiniteLoss: on every rank alike.
    """
    config = from_dict(TrainConfig, job["config"])
    shapes = from_dict(Shapes, settings["shapes"])
    train_data = data.get("train", job["pyramids"], levels=stored_levels(config))
    assert train_data is not None  # the driver passes it always
    loop = TrainingLoop(
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

    between = between or EpochCallback()
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


def _export(loop: TrainingLoop, home: Storage, job: dict[str, Any]) -> None:
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
    files = exports.export(home, loop.net, loop.config, loop.shapes)
    parts = exports.parts_of(loop.net)
    write_model(home, files, parts, loop.config, loop.shapes, job["pyramids"], job["weights"], measured)
    # what it takes to continue is not needed any more, and is three times as large as the model
    for name in checkpoints.list_checkpoints(home / "checkpoints"):
        home.delete(f"checkpoints/{name}")
    for name in ("live.json", ATTEMPT, FAILED_MODEL, NOT_FINITE):
        home.delete(name)


def write_model(
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
            "schema": exports.SCHEMA,
            "train": to_dict(config),
            "shapes": to_dict(shapes),
            "pyramids": dict(pyramids),
            "weights": weights,
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            **measured,
            "files": {f: hashlib.sha256(home.read_bytes(f)).hexdigest() for f in files},
        },
    )


def _take_as_given(job: TrainingJob, shapes: Shapes, root: Storage) -> None:
    """A model that is not trained but evaluated as it is (``epochs=0``), with its auto-encoder if it has one."""
    home = root / job.address
    net = build_net(job.config, shapes, pretrained.load(root, job.weights))
    files, parts = exports.export(home, net, job.config, shapes), exports.parts_of(net)
    if job.autoencoder:
        home.write_bytes(AUTOENCODER, root.read_bytes(job.autoencoder))
        files, parts = (
            [*files, AUTOENCODER],
            {**parts, "autoencoder": exports.load_autoencoder(home.full_uri, trusted=job.config.arch)},
        )
    measured = {"workers": 1, "validation": {}, "seconds": 0.0, "images_per_second": 0.0}
    write_model(home, files, parts, job.config, shapes, job.pyramids, job.weights, measured)


def parallel_runs(experiment: Experiment) -> int:
    """How many Ray Train runs there is room for at once."""
    from pipeline.runtime.cluster import room_for, train_bundle

    scaling = experiment.scaling
    room = max(1, room_for(train_bundle(scaling)) // scaling.workers)
    return min(room, scaling.parallel_models) if scaling.parallel_models else room


def fit_group(group: Sequence[TrainingJob], settings: dict[str, Any], experiment: Experiment, root: Storage) -> None:
    import ray.train

    from pipeline.runtime.user_errors import unwrap

    failures = experiment.scaling.max_failures
    token = f"{settings['token']}-{secrets.token_hex(4)}"
    config = {**settings, "jobs": [job.request() for job in group], "token": token}
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


def _progress_of(group: Sequence[TrainingJob], root: Storage) -> list[Any]:
    """Return what changes on the storage when an epoch or a model of the group ends, one way or another."""
    homes = [root / job.address for job in group]
    ends = ("model.json", FAILED_MODEL, NOT_FINITE)
    return [
        (len(home.list("history")), [home.read_json(name) if home.exists(name) else None for name in ends])
        for home in homes
    ]


def _blame(group: Sequence[TrainingJob], root: Storage, token: str, error: Exception) -> bool:
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

    from pipeline.runtime.cluster import train_bundle
    from pipeline.training.process_group import NodeTorchConfig

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
