"""Ray Train: the models of an experiment, from shards to exported weights. Killed at any time, they continue.

Starting a Ray Train run costs half a minute on two cores (each of its processes imports torch), so one run trains models one
after the other, and there are as many runs side by side as the cluster has room for. A model's checkpoints lie in its own
directory, ``models/<kind>-<hash>/`` (docs/records.md), not in the run's: whichever run takes it up next finds them.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.config import Experiment
from components.config.data import Shapes
from components.fields import to_dict
from components.models.classifiers import ARCHITECTURES
from components.network import build_net
from pipeline.runtime.console import say
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage, StorageError
from pipeline.training import checkpoints, exports, pretrained
from pipeline.training.external import copy_autoencoder
from pipeline.training.jobs import FAILED_MODEL, NOT_FINITE, TrainingData, TrainingJob, model_address
from pipeline.training.monitor import LIVE_INTERVAL_S, VISIBLE_S, Progress, TrainingMonitor
from pipeline.training.ray_workers import TrainingError, _take_as_given, fit_group, parallel_runs


def list_jobs(experiment: Experiment, shapes: Shapes, data: TrainingData, root: Storage) -> list[TrainingJob]:
    """The models of an experiment as jobs. Pretrained weights are copied to the storage, where every worker reaches them."""
    jobs = []
    for name, given in experiment.model_configs().items():
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
        job = TrainingJob(name=name, config=config, pyramids=reads, weights=weights, address=address)
        jobs.append(dataclasses.replace(job, autoencoder=autoencoder, without=without))
    return jobs


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
    for config in experiment.model_configs().values():
        same = dataclasses.replace(config.canonical(), seed=0)
        if same not in seen:
            seen.add(same)
            weights = pretrained.read(same, _tracking_uri(experiment)) if same.pretrained else None
            if weights is not None and weights.note:
                notes[weights.note] = None
            net = build_net(same, shapes, weights)
            if same.arch not in ARCHITECTURES:  # those of this project are known to be exported and loaded again
                exports.check_export(net, same, shapes)
    return list(notes)


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
    jobs = list_jobs(experiment, shapes, data, root)
    watch = TrainingMonitor(root, jobs, progress)
    for job in jobs:
        if job.without:
            progress.on_external(job.name, job.without)
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


def _end_of(home: Storage, watch: TrainingMonitor, token: str) -> dict[str, Any]:
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


def _groups(jobs: Sequence[TrainingJob], runs: int) -> list[list[TrainingJob]]:
    """Jobs shared out over so many runs, longest first to the least loaded; each run keeps the experiment's order."""
    loads = [0.0] * min(runs, len(jobs))
    groups: list[list[TrainingJob]] = [[] for _ in loads]
    for job in sorted(jobs, key=lambda j: -j.config.relative_cost):
        i = loads.index(min(loads))
        loads[i] += job.config.relative_cost
        groups[i].append(job)
    return [sorted(group, key=jobs.index) for group in groups]


def _fit_side_by_side(
    groups: Sequence[Sequence[TrainingJob]],
    settings: dict[str, Any],
    experiment: Experiment,
    root: Storage,
    check: Callable[[], None],
) -> None:
    """Train every group in a Ray Train run of its own. The first error is raised when all have ended: nothing else is lost.

    No run is in the main thread: Ray Train would take Ctrl-C over there, and never give it back.
    """
    errors: list[Exception] = []

    def fit(group: Sequence[TrainingJob]) -> None:
        try:
            fit_group(group, settings, experiment, root)
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


def _refuse(jobs: Sequence[TrainingJob], ends: Mapping[str, Mapping[str, Any]], root: Storage) -> None:
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
