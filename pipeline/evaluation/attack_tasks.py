"""Ray tasks of the attack stage: craft, verify and judge the examples of a chunk of samples."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from components.attacks.fast_copy import computes_in_bfloat16, make_fast_copy, run_attack_on_copy
from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.judge import Columns, judge, verify_examples
from components.fields import content_hash
from components.models.defend import adaptive_objective
from components.random_streams import stream_seed
from pipeline import ray_metrics
from pipeline.data import shards
from pipeline.evaluation.chunks import chunk_name, read_examples, write_table
from pipeline.evaluation.in_memory import InMemory, as_images, in_memory_of
from pipeline.runtime.cluster import ResourceError
from pipeline.runtime.storage import Storage, join_uri
from pipeline.runtime.tasks import T
from pipeline.training import exports

TestSet = shards.ShardSet | InMemory
"""The test images: shards on the storage, or images and networks in memory."""


def job_basis(experiment: Experiment, root: Storage, test: TestSet) -> dict[str, Any]:
    """Return the part of a job that all tasks share: data and setup of the process."""
    in_memory = test if isinstance(test, InMemory) else None
    device = "cuda" if experiment.scaling.gpus_per_attack else "cpu"
    return {
        "run": experiment.name,
        "root": root.full_uri,
        "test": test.address,
        "in_memory": in_memory,
        "seed": experiment.evaluation.seed,
        "device": in_memory.device if in_memory else device,
        "threads": experiment.scaling.threads_per_worker,
        "trusted": sorted({config.arch for config in experiment.model_configs().values()}),
    }


def forget_networks() -> None:
    """Drop the networks that this process holds for further tasks."""
    for cached in (load_model, load_fast_copy, _autoencoder):
        cached.cache_clear()


# The functions below run in the tasks.


@functools.lru_cache(maxsize=8)
def load_model(root: str | InMemory, weights: str, device: str) -> nn.Module:
    """Load the model of :attr:`Model.weights` in eval mode.

    Args:
        root: URI of the storage, or what holds the model in memory.

    Raises:
        DataError: a file no longer holds the weights that the records name.
    """
    if isinstance(root, InMemory):
        return root.networks[weights].to(device)
    parts = [part.partition("#") for part in weights.split("+")]
    (path, _, sha256), *behind = ((join_uri(root, path), mark, sha256) for path, mark, sha256 in parts)
    if not behind:
        return exports.load_classifier(path, device, sha256=sha256)
    ((classifier, _, classifier_sha256),) = behind
    return exports.load_reformed(path, classifier, device, sha256=(sha256, classifier_sha256))


@functools.lru_cache(maxsize=2)
def load_test_set(root: str, address: str) -> shards.ShardSet:
    """Open the test set's shards."""
    return shards.load(Storage(root), address)


def load_images(job: dict[str, Any], start: int, stop: int) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """Return rows of a job's test set, and their images in [0,1] and labels on the job's device."""
    test = in_memory_of(job) or load_test_set(job["root"], job["test"])
    rows = test.read_rows(start, stop)
    images = as_images(rows["image"], job["device"])
    return rows, images, torch.from_numpy(rows["label"]).to(job["device"]).long()


def named_seed(seed: int, chunk: int, name: str) -> int:
    """Return the seed of one of the random streams of a chunk.

    Args:
        name: an attack's canonical text, for the attack's own draws: attacks then differ in their
            random starts and models do not. Or an address, for torch's global stream, from which a
            randomised network draws.
    """
    return stream_seed(seed, chunk, int(content_hash(name)[:15], 16))


def networks_of(job: dict[str, Any]) -> str | InMemory:
    """Return where a job's networks are: the URI of the storage, or memory."""
    root: str = job["root"]
    return in_memory_of(job) or root


def prepare_task(job: dict[str, Any]) -> None:
    """Set up a task's process for a job that :func:`job_basis` begins."""
    torch.set_num_threads(job["threads"])
    exports.trust(job.get("trusted", ()))


def attack_chunks(job: dict[str, Any]) -> None:
    """Attack and judge the chunks of one task."""
    prepare_task(job)
    for i, start, stop in job["chunks"]:
        attack_chunk(job, i, start, stop)


def attack_chunk(job: dict[str, Any], i: int, start: int, stop: int) -> None:
    """Make the examples of one chunk and judge them, unless their files exist."""
    root, device = Storage(job["root"]), job["device"]
    rows, clean, labels = load_images(job, start, stop)
    if job["attack"] == "none":
        adversarial = clean
    else:
        directory = root / job["examples"]
        if not directory.exists(chunk_name(i)):
            _make_examples(job, i, directory, clean, labels, rows)
        # The examples always come from the file, so that a continued run judges the same ones.
        # torch.tensor copies them, since Arrow's memory is read-only.
        adversarial = torch.tensor(read_examples(directory, i), device=device)
    for judged, weights in job["judges"].items():
        directory = root / judged
        if directory.exists(chunk_name(i)):
            continue
        model = load_model(networks_of(job), weights, device)
        torch.manual_seed(named_seed(job["seed"], i, judged))
        columns, micro_batch = judge_in_batches(model, clean, adversarial, labels)
        records = {"index": pa.array(rows["index"]), **{k: pa.array(v) for k, v in columns.items()}}
        write_table(directory, i, records, {"micro_batch": micro_batch})


@functools.lru_cache(maxsize=8)
def load_fast_copy(
    root: str | InMemory, weights: str, device: str, shape: tuple[int, ...], bfloat16: bool
) -> nn.Module | None:
    """Return the fast copy of the model of ``weights``, on which attacks search, or None.

    The model and its copy must agree on eight random images.
    """
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    model = load_model(root, weights, device)
    # The copy is made while the task's first chunk is attacked. The network may draw random numbers
    # meanwhile, which must not change that chunk's stream.
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.startswith("cuda") else ()):
        return make_fast_copy(model, images, bfloat16=bfloat16)


@functools.lru_cache(maxsize=2)
def _autoencoder(root: str | InMemory, weights: str, device: str) -> nn.Module:
    if isinstance(root, InMemory):
        return root.networks[weights].to(device)
    path, _, sha256 = weights.partition("#")
    return exports.load_autoencoder(join_uri(root, path), device, sha256=sha256)


def _make_examples(
    job: dict[str, Any], i: int, directory: Storage, clean: Tensor, labels: Tensor, rows: dict[str, np.ndarray]
) -> None:
    spec = AttackSpec.parse(job["attack"])
    networks, device = networks_of(job), job["device"]
    model = load_model(networks, job["source"], device) if job["source"] else nn.Identity()
    begin = time.perf_counter()
    autoencoder = _autoencoder(networks, job["autoencoder"], device) if spec.name == "adaptive" else None

    def fast_copy() -> nn.Module | None:
        if not job["source"]:
            return None
        return load_fast_copy(networks, job["source"], device, clean.shape[1:], job["bfloat16"])

    torch.manual_seed(named_seed(job["seed"], i, job["examples"]))
    seed = named_seed(job["seed"], i, str(spec))
    adversarial, micro_batch = craft(
        spec, model, fast_copy, autoencoder, clean, labels, stop_on_success=job["early_leaving"], seed=seed
    )
    seconds = time.perf_counter() - begin
    bfloat16 = job["bfloat16"] and computes_in_bfloat16(fast_copy())
    verify_examples(clean, adversarial, rows["index"], spec)
    images = shards.tensor_array(adversarial.cpu().numpy())
    write_table(
        directory,
        i,
        {"index": pa.array(rows["index"]), "label": pa.array(rows["label"]), "adversarial": images},
        {"seconds": seconds, "micro_batch": micro_batch, "bfloat16": bfloat16, "attack": job["attack"]},
    )
    ray_metrics.chunk_attacked(job.get("tags", {}), len(clean), seconds)


def _auxiliary(autoencoder: nn.Module, clean: Tensor, spec: AttackSpec) -> Callable[[Tensor, Tensor], Tensor]:
    assert spec.objective is not None
    assert spec.weight is not None
    return adaptive_objective(autoencoder, clean, spec.objective, spec.weight)


def craft(
    spec: AttackSpec,
    model: nn.Module,
    fast_copy: Callable[[], nn.Module | None],
    autoencoder: nn.Module | None,
    clean: Tensor,
    labels: Tensor,
    *,
    stop_on_success: bool,
    seed: int,
) -> tuple[Tensor, int]:
    """Make the adversarial examples of a chunk, in micro-batches if memory is short.

    The size of the micro-batches (or 0) is recorded, since another has other random starts.
    """

    def attempt(micro_batches: list[slice]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        search = functools.partial(
            run_attack_on_copy, spec, model, fast_copy(), stop_on_success=stop_on_success, generator=generator
        )
        parts = []
        for rows in micro_batches:
            auxiliary = None if autoencoder is None else _auxiliary(autoencoder, clean[rows], spec)
            parts.append(search(clean[rows], labels[rows], auxiliary=auxiliary))
        return torch.cat(parts)

    return as_memory_allows(len(clean), attempt, f"{spec} on")


def judge_in_batches(model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor) -> tuple[Columns, int]:
    """Call :func:`judge`, in micro-batches if memory is short.

    Their size (or 0) is recorded, since a randomised network draws otherwise then. No other
    network's verdict depends on it.
    """

    def attempt(micro_batches: list[slice]) -> Columns:
        parts = [judge(model, clean[rows], adversarial[rows], labels[rows]) for rows in micro_batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return as_memory_allows(len(clean), attempt, "judging")


def as_memory_allows(n: int, attempt: Callable[[list[slice]], T], what: str) -> tuple[T, int]:
    """Call ``attempt`` on all of n samples at once, then on half as many at a time, until they fit.

    Args:
        what: work that the error message names, e.g. "judging".

    Returns:
        The result, and the number of samples at a time or 0 for all.

    Raises:
        ResourceError: a single sample does not fit.
    """
    size = n
    while True:
        try:
            return attempt([slice(start, start + size) for start in range(0, n, size)]), 0 if size == n else size
        except torch.OutOfMemoryError as e:
            if size == 1:
                raise ResourceError(
                    f"{what} a single image does not fit the memory ({e}). Raise --scaling.gpus-per-attack, so that "
                    "fewer tasks share a GPU, or attack on the CPU with --scaling.gpus-per-attack 0"
                ) from e
        # Outside the except block the exception no longer keeps the failed batch's tensors alive.
        size = (size + 1) // 2
        torch.cuda.empty_cache()
