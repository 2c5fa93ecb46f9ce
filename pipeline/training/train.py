"""Driver of training: the models of an experiment, from shards to exported weights.

A Ray Train run costs half a minute to start on two cores, since each of its processes imports
torch. One run therefore trains models one after the other, and there are as many runs side by side
as the cluster has room for. Killed at any time, training continues: a model's checkpoints lie in
its own directory, ``models/<kind>-<hash>/`` (docs/records.md), where any run finds them.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.config import Experiment, Shapes
from components.fields import to_dict
from components.models.classifiers import ARCHITECTURES
from components.network import build_net
from pipeline.runtime import interrupts
from pipeline.runtime.console import say
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage, StorageError
from pipeline.training import checkpoints, exports, pretrained
from pipeline.training.external import copy_autoencoder
from pipeline.training.finished_models import export_external
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingData, TrainingJob, make_job
from pipeline.training.monitor import Progress, TrainingMonitor
from pipeline.training.ray_runs import TrainingError, parallel_runs, train_group
from pipeline.training.worker_group import LIVE_INTERVAL_S

VISIBLE_S = 90.0
"""How long a network file system may hide a new file. NFS caches directories for up to a minute."""


def prepare_jobs(
    experiment: Experiment, shapes: Shapes, data: TrainingData, root: Storage, tracking_uri: str = ""
) -> list[TrainingJob]:
    """List the models of an experiment as jobs.

    Pretrained weights are copied to the storage, where every worker reaches them. Raises UserError.
    """
    jobs = []
    for name, config in experiment.model_configs().items():
        config = config.canonical()
        weights = pretrained.fetch(config, root, tracking_uri) if config.pretrained else ""
        autoencoder, reason = "", ""
        if not config.epochs:
            tensors = pretrained.load(root, weights)
            autoencoder, reason = copy_autoencoder(config, shapes, tensors, root, tracking_uri)
        job = make_job(name, config, shapes, data, experiment.scaling.workers, weights, autoencoder)
        jobs.append(dataclasses.replace(job, why_no_autoencoder=reason))
    return jobs


def check_models(experiment: Experiment, shapes: Shapes, tracking_uri: str = "") -> list[str]:
    """Build and export every network once, without data, before compute is spent.

    Returns:
        Notes for the user on how pretrained weights were chosen.

    Raises:
        ConfigError: a setting makes no network.
        DataError, StorageError: pretrained weights cannot be read, or do not fit.
    """
    checked, notes = set(), dict[str, None]()
    for config in experiment.model_configs().values():
        config = dataclasses.replace(config.canonical(), seed=0)
        if config not in checked:
            checked.add(config)
            weights = pretrained.read(config, tracking_uri) if config.pretrained else None
            if weights is not None and weights.note:
                notes[weights.note] = None
            net = build_net(config, shapes, weights)
            # Tests show that this project's own can be exported and loaded.
            if config.arch not in ARCHITECTURES:
                exports.check_export(net, config, shapes)
    return list(notes)


def train(
    experiment: Experiment,
    shapes: Shapes,
    data: TrainingData,
    root: Storage,
    progress: Progress | None = None,
    tracking_uri: str = "",
) -> dict[str, dict[str, Any]]:
    """Train every model of an experiment. Finished models stay, started ones continue.

    Returns:
        Name -> model.json, with "path" = the model's address below ``root``, in the experiment's
        order. A model that diverged has {"diverged": step} instead, if the experiment allows it.

    Raises:
        TrainingError: a loss was not finite, or the workers failed more often than allowed. The
            other models are trained all the same, and kept.
        UserError: a worker found data or storage wrong.
    """
    progress = progress or Progress()
    jobs = prepare_jobs(experiment, shapes, data, root, tracking_uri)
    monitor = TrainingMonitor(root, jobs, progress)
    for job in jobs:
        if job.why_no_autoencoder:
            progress.on_external(job.name, job.why_no_autoencoder)
        if not job.config.epochs and not (root / job.address).exists("model.json"):
            export_external(job, shapes, root)
    monitor.look()
    pending = _pending_jobs(jobs, monitor, root, experiment.allow_diverged)
    token = secrets.token_hex(8)
    if pending:
        settings = {
            "shapes": to_dict(shapes),
            "root": root.full_uri,
            "threads": experiment.scaling.threads_per_worker,
            "token": token,
        }
        with monitor.following():
            groups = _groups(pending, parallel_runs(experiment))
            _train_side_by_side(groups, settings, experiment, root, monitor.check)
    ends = {
        job.name: _end_of(root / job.address, monitor, token if job in pending else "")
        for job in jobs
        if job.name not in monitor.finished
    }
    failed = [
        job
        for job in jobs
        if job.name not in monitor.finished and not (experiment.allow_diverged and "step" in ends[job.name])
    ]
    if failed:
        _raise_failures(failed, ends, root)
    return {job.name: monitor.finished.get(job.name) or {"diverged": ends[job.name]["step"]} for job in jobs}


def _pending_jobs(
    jobs: Sequence[TrainingJob], monitor: TrainingMonitor, root: Storage, allow_diverged: bool
) -> list[TrainingJob]:
    """List the jobs to train, one per address. Say which of them another run trains now."""
    pending = [job for job in {job.address: job for job in jobs}.values() if job.name not in monitor.finished]
    if allow_diverged:  # A model that diverged would diverge again.
        pending = [job for job in pending if not (root / job.address).exists(NOT_FINITE)]
    for job in pending:
        if holder := Lease(root / job.address).holder_name():
            say(
                f"  {job.name} is being trained by {holder}: this run waits for it, or goes on with it if that one is "
                "gone"
            )
    return pending


def _end_of(home: Storage, monitor: TrainingMonitor, token: str) -> dict[str, Any]:
    """Return how a model ended: ``step`` if it diverged, ``reason`` if it failed, {} if finished.

    The workers have ended, so there is a record with this call's token. A network file system may
    show it late, and another run may have overwritten it meanwhile.

    Raises:
        StorageError: there is no record.
    """
    deadline = time.monotonic() + VISIBLE_S
    while True:
        names = home.list()
        if "model.json" in names:
            monitor.look()
            return {}
        for name in (FAILED_MODEL, NOT_FINITE):
            if name in names:
                end = dict(home.read_json(name))
                if end.get("token", "").startswith(token) or time.monotonic() > deadline:
                    return end
        if time.monotonic() > deadline:
            raise StorageError(
                f"the training workers have ended, but {home.uri} holds no model: the storage is not the same "
                "directory on every node. Give a storage that all nodes share"
            )
        time.sleep(1.0)


def _groups(jobs: Sequence[TrainingJob], runs: int) -> list[list[TrainingJob]]:
    """Share jobs out over runs, the longest first to the least loaded run.

    Each run keeps the experiment's order.
    """
    loads = [0.0] * min(runs, len(jobs))
    groups: list[list[TrainingJob]] = [[] for _ in loads]
    for job in sorted(jobs, key=lambda job: -job.config.relative_cost):
        i = loads.index(min(loads))
        loads[i] += job.config.relative_cost
        groups[i].append(job)
    return [sorted(group, key=jobs.index) for group in groups]


def _train_side_by_side(
    groups: Sequence[Sequence[TrainingJob]],
    settings: dict[str, Any],
    experiment: Experiment,
    root: Storage,
    check: Callable[[], None],
) -> None:
    """Train each group in a Ray Train run of its own. Raise the first error at the end.

    No run is in the main thread: Ray Train would take Ctrl-C over there, and never give it back.
    """
    errors: list[Exception] = []

    def run(group: Sequence[TrainingJob]) -> None:
        try:
            train_group(group, settings, experiment, root)
        except Exception as e:
            errors.append(e)

    # Daemon threads end with the driver, so an interrupted driver does not wait for them.
    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        interrupts.raise_received()
        check()
        for thread in threads:
            thread.join(LIVE_INTERVAL_S / len(threads))
    if errors:
        raise errors[0]


def _raise_failures(jobs: Sequence[TrainingJob], ends: Mapping[str, Mapping[str, Any]], root: Storage) -> None:
    lines = []
    for job in jobs:
        home, end = root / job.address, ends[job.name]
        if "step" not in end:
            lines.append(f"training of {job.name} failed: {end['reason']}")
            continue
        names = checkpoints.list_checkpoints(home / "checkpoints")
        good = f"{home.uri}/checkpoints/{names[-1]}" if names else "none was written yet"
        lines.append(
            f"training of {job.name} stopped: the loss was not finite at step {end['step']}. "
            f"Last good checkpoint: {good}"
        )
    if any("step" in ends[job.name] for job in jobs):
        lines.append(
            "Lower --train.lr or --train.reconstruction-weight, or set --train.clip-norm; "
            "with --allow-diverged the run goes on without"
        )
    lines.append("The other models are trained and kept; the same command tries these again")
    raise TrainingError("\n".join(lines))
