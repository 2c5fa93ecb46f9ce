"""Attack stage of a run on networks and images that are in memory."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from components.config import DataConfig, EvaluationConfig, Experiment, ScalingConfig, TrainConfig
from components.errors import ConfigError
from components.fields import to_dict
from pipeline.api import inputs
from pipeline.evaluation import attack, attack_tasks, gallery, reliability, worst_case
from pipeline.evaluation.attack_progress import Progress
from pipeline.evaluation.in_memory import InMemory
from pipeline.evaluation.plan import Model
from pipeline.records import SCHEMA, RunRecord, run_address
from pipeline.runtime import cluster, provenance
from pipeline.runtime.storage import Storage
from pipeline.runtime.stored_record import now
from pipeline.runtime.tasks import RunTasks, run_in_process, run_tasks

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} {postfix}"


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """The networks of an evaluation, the one under test first."""

    networks: dict[str, nn.Module]
    autoencoder: nn.Module | None
    trained: list[str]
    """Networks that came in training mode."""
    classes: int
    device: torch.device


def run(
    subjects: Subjects,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: EvaluationConfig,
    scaling: ScalingConfig,
    root: Storage,
    ray_address: bool | str,
    progress: bool,
) -> RunRecord:
    """Run the attack stage on the networks, and return the record of a run."""
    begin = now()
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    models, modules = _models(subjects, images.shape[1:])
    experiment = _experiment(subjects, models, digest, images, config, scaling, root)
    test = InMemory(
        address=f"memory/{digest}",
        images=images,
        labels=labels,
        networks=modules,
        device=_device(subjects.device, ray_address, scaling),
    )
    before = {name: inputs.state_hash(network) for name, network in subjects.networks.items()}
    names = list(subjects.networks)
    with _runner(test, ray_address, scaling, root) as run, _bar(progress) as bar, _as_before(subjects.device):
        evaluations = attack.attack(models, test, experiment, root, bar, run)
        judged = worst_case.EvaluationRecords(root, evaluations, config.chunk_size)
        tests = reliability.reliability(models, test, experiment, root, judged, bar, run)
    directory = root / run_address(experiment)
    gallery.make(test, models, evaluations, experiment, directory, root, lambda *_: None)
    for name, network in subjects.networks.items():
        inputs.check_unchanged(name, network, before[name])
    content = {
        "schema": SCHEMA,
        "name": experiment.name,
        "experiment": to_dict(experiment),
        "created": begin,
        "finished": now(),
        "data": {
            "source": experiment.data.source,
            "hash": digest,
            "rows": {"test": len(images)},
            "splits": {"test": test.address},
        },
        "models": {m.name: _model_entry(subjects, m, experiment) for m in models},
        "evaluations": evaluations,
        "worst_case": worst_case.worst_cases(names, experiment, judged),
        "worst_case_pairs": worst_case.paired_worst_cases(
            [(names[0], other) for other in names[1:]], experiment, judged
        ),
        "reliability": tests,
        "stages": {},
        **provenance.environment(),
    }
    directory.write_json("run.json", content)
    return RunRecord.from_json(content)


def _device(own: torch.device, ray_address: bool | str, scaling: ScalingConfig) -> str:
    """Return the device of the attacks. Ray hides all GPUs from a task that reserves none."""
    if scaling.gpus_per_attack:
        return "cuda"
    return "cpu" if ray_address else str(own)


def _model_entry(subjects: Subjects, model: Model, experiment: Experiment) -> dict[str, Any]:
    """Return a network's entry in the record. It was not trained here, and no file holds it."""
    parts = {"classifier": subjects.networks[model.name]}
    if model.autoencoder and subjects.autoencoder is not None:
        parts["autoencoder"] = subjects.autoencoder
    return {
        "path": model.path,
        "train": to_dict(experiment.model_configs()[model.name].canonical()),
        "parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()},
        "autoencoder": bool(model.autoencoder),
    }


def _models(subjects: Subjects, shape: tuple[int, ...]) -> tuple[list[Model], dict[str, nn.Module]]:
    """Return the networks as the attack stage names them, and each module by the text of its weights."""
    models: list[Model] = []
    modules: dict[str, nn.Module] = {}
    for name, network in subjects.networks.items():
        sha256 = inputs.identity_of(name, network, shape)
        if twin := next((m.name for m in models if m.sha256 == sha256), ""):
            raise ConfigError(f"{name} is the same network as {twin}: there is nothing to compare")
        model = Model(name=name, path=f"models/memory-{sha256[:16]}", sha256=sha256)
        if subjects.autoencoder is not None and not models:
            known = inputs.state_hash(subjects.autoencoder)
            # The address of the run follows from the path, and another auto-encoder gives another run.
            model = replace(model, path=f"{model.path}-{known[:16]}", autoencoder=known)
            modules[f"{model.path}#{model.autoencoder}"] = subjects.autoencoder
        modules[model.weights] = network
        models.append(model)
    return models, modules


def _experiment(
    subjects: Subjects,
    models: Sequence[Model],
    digest: str,
    images: NDArray[np.float32],
    config: EvaluationConfig,
    scaling: ScalingConfig,
    root: Storage,
) -> Experiment:
    """Return the experiment of the record. ``memory:`` marks what no file holds."""
    name = models[0].name
    return Experiment(
        name=f"evaluate-{name}",
        description=f"{type(subjects.networks[name]).__name__} in memory, under attack",
        data=DataConfig(
            source=f"memory:{digest}",
            image_size=images.shape[2],
            channels=images.shape[1],
            num_classes=subjects.classes,
            allow_empty_classes=True,
        ),
        train=TrainConfig(defense="none", epochs=0, pretrained="memory", shared_blocks=1),
        models=tuple(
            f"{m.name}:arch=memory:{type(subjects.networks[m.name]).__name__}-{m.sha256[:8]},pretrained={m.path}"
            for m in models
        ),
        evaluation=config,
        scaling=scaling,
        storage=root.uri,
    )


@contextlib.contextmanager
def _runner(test: InMemory, address: bool | str, scaling: ScalingConfig, root: Storage) -> Iterator[RunTasks]:
    """Give what runs the jobs of an evaluation: this process, or Ray."""
    if not address:
        try:
            yield run_in_process
        finally:
            attack_tasks.forget_networks()
        return
    with _ray_address(address):
        cluster.connect()
    cluster.check_resources(scaling)
    cluster.check_shared(root)
    shared = ray.put(_on_cpu(test))

    def run(function: Any, jobs: Any, bundle: dict[str, float], **options: Any) -> Iterator[Any]:
        light = (({**job, "in_memory": shared}, tag) for job, tag in jobs)
        return run_tasks(function, light, bundle, **options)

    yield run


@contextlib.contextmanager
def _ray_address(address: bool | str) -> Iterator[None]:
    """Set $RAY_ADDRESS, which says what cluster to join, while the body runs; True leaves it as it is."""
    before = os.environ.get("RAY_ADDRESS")
    if isinstance(address, str):
        os.environ["RAY_ADDRESS"] = address
    try:
        yield
    finally:
        if isinstance(address, str):
            os.environ.pop("RAY_ADDRESS")
            os.environ.update({} if before is None else {"RAY_ADDRESS": before})


def _on_cpu(test: InMemory) -> InMemory:
    """Return the inputs with copies of networks that are on a GPU, which a task may not see."""
    if not any(tensor.is_cuda for network in test.networks.values() for tensor in network.parameters()):
        return test
    return replace(test, networks={key: copy.deepcopy(network).cpu() for key, network in test.networks.items()})


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    """Give the function that shows progress as a bar on standard error."""
    with tqdm(desc="evaluate", disable=not shown, unit="", bar_format=BAR) as bar:

        def update(done: int, total: int, note: str) -> None:
            bar.total = total
            bar.n = done
            bar.set_postfix_str(note, refresh=False)
            bar.refresh()

        yield update


@contextlib.contextmanager
def _as_before(device: torch.device) -> Iterator[None]:
    """Restore PyTorch's random streams and its number of threads after the body."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
