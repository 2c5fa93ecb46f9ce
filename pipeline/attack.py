"""Ray tasks that attack and judge: one task per (set of examples x chunk), its records on storage when it returns.

A chunk of samples is the unit of everything: it has its own random stream (seed, chunk number), its own file of examples and
its own file of records. Chunks are fixed by the config, so the result is the same for any number of tasks, and a finished
chunk is never computed again.
"""

from __future__ import annotations

import functools
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment, content_hash
from components.errors import DataError
from components.robustness import judge, summarize, usual_budgets, verify_examples
from pipeline import checkpoints, shards
from pipeline.cluster import unwrap
from pipeline.storage import Storage
from pipeline.train_step import stream_seed

CODE_VERSION = 1
"""Part of every address here. Raise it when the same settings would give other examples or records."""
TASKS_IN_FLIGHT = 64
"""Back-pressure: so many tasks wait inside Ray, however many thousand chunks there are."""
TASK_RETRIES = 3

RANDOM = "random"
CLEAN = "clean"
GREY_BOX = "grey_box"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model as attacks see it: its name in the run, its address and the checksum of its weights."""

    name: str
    path: str
    sha256: str
    classifier: Model | None = None
    """What stands behind it, where it is a reformer."""

    @property
    def identity(self) -> str:
        """Names the weights of all its parts."""
        return self.sha256 if self.classifier is None else f"{self.sha256}+{self.classifier.sha256}"

    @property
    def address(self) -> str:
        """What a task loads: a path, or the reformer's and the classifier's with a plus between."""
        return self.path if self.classifier is None else f"{self.path}+{self.classifier.path}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One cell of a table: examples of ``attack`` made on ``source``, judged on ``model``."""

    model: Model
    source: Model | None
    """None: the examples do not depend on a model (clean images, noise)."""
    threat_model: str
    attack: str
    """Attack spec; "none" for clean images."""
    early_leaving: bool = False


def plan(models: Sequence[Model], experiment: Experiment) -> list[Evaluation]:
    """Every evaluation of an experiment, table order.

    White-box examples are judged on the very model they were made on, so there a broken sample may leave its batch. Examples
    that another model will judge run all their steps: leaving early, they would stop just over the border of the model
    they were made on and hardly transfer (docs/evaluation.md; tests/test_attacks.py shows it).
    """
    by_name = {m.name: m for m in models}
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    out = []
    for model in models:
        out.append(Evaluation(model=model, source=None, threat_model=CLEAN, attack="none"))
        for spec in specs:
            if spec.name == "noise":  # the floor: no model, no attacker
                out.append(Evaluation(model=model, source=None, threat_model=RANDOM, attack=str(spec)))
        for threat in experiment.evaluation.threat_models:
            source, said = _source(model, threat, by_name, experiment)
            if source is None:
                continue
            for spec in specs:
                if spec.name != "noise":
                    early = spec.can_leave_early and source == model
                    out.append(
                        Evaluation(model=model, source=source, threat_model=said, attack=str(spec), early_leaving=early)
                    )
    return out


def _source(model: Model, threat: str, by_name: dict[str, Model], experiment: Experiment) -> tuple[Model | None, str]:
    """The model on which a threat model's examples are made (None: it does not apply), and what the threat model is called."""
    if threat == "white_box":
        return model, threat
    base = threat.partition(":")[2]
    source = by_name.get(experiment.source_of(model.name, base) or "")
    if source is not None and source == model.classifier:
        return source, GREY_BOX  # the attacker knows the classifier, not the reformer in front of it
    return source, threat


@dataclass(kw_only=True)
class _Examples:
    """A set of examples and who is to judge it."""

    address: str
    source: Model | None
    attack: str
    early_leaving: bool
    judges: dict[str, str] = field(default_factory=dict)
    """Address of the judged records -> path of the model that judges."""


def _example_sets(
    evaluations: Sequence[Evaluation], test_address: str, n: int, evaluation: EvaluationConfig
) -> tuple[list[_Examples], dict[Evaluation, tuple[str, str]]]:
    sets: dict[str, _Examples] = {}
    addresses: dict[Evaluation, tuple[str, str]] = {}
    for e in evaluations:
        made_on = e.source.identity if e.source else None
        key = content_hash(
            CODE_VERSION, made_on, e.attack, e.early_leaving, test_address, n, evaluation.chunk_size, evaluation.seed
        )
        judged = f"judged/{content_hash(CODE_VERSION, key, e.model.identity)}"
        one = sets.setdefault(
            key,
            _Examples(address=f"examples/{key}", source=e.source, attack=e.attack, early_leaving=e.early_leaving),
        )
        one.judges[judged] = e.model.address
        addresses[e] = (one.address, judged)
    return list(sets.values()), addresses


def attack(
    models: Sequence[Model],
    test: shards.ShardSet,
    experiment: Experiment,
    root: Storage,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Attack every model under every threat model and judge what came out.

    Args:
        models: trained models of the run, in table order.
        test: the test images.
        progress: called with (chunks done, chunks in all, note).
        on_evaluation: called with each entry once all of its chunks are there.

    Returns:
        The ``evaluations`` of run.json (docs/records.md), in table order.

    Raises:
        AttackViolation: an attack returned an example outside its rules. DataError, StorageError: see the message.
    """
    config, scaling = experiment.evaluation, experiment.scaling
    n = min(config.test_images or test.num_rows, test.num_rows)
    evaluations = plan(models, experiment)
    sets, addresses = _example_sets(evaluations, test.address, n, config)
    chunks = [(i, start, min(start + config.chunk_size, n)) for i, start in enumerate(range(0, n, config.chunk_size))]
    for one in sets:
        said = {
            "attack": one.attack,
            "early_leaving": one.early_leaving,
            "source": one.source.address if one.source else None,
            "test": test.address,
            "n": n,
            "chunk_size": config.chunk_size,
            "seed": config.seed,
        }
        if one.attack != "none":
            _once(root, f"{one.address}/spec.json", said)
        for judged, path in one.judges.items():
            _once(root, f"{judged}/spec.json", {**said, "examples": one.address, "model": path})

    # a listing per directory, not a question per chunk: on an object store each question is a round trip
    present = {a: set(root.list(a)) for one in sets for a in (one.address, *one.judges)}
    todo = [
        (one, i, start, stop)
        for one in sets
        for i, start, stop in chunks
        if any(_chunk(i) not in present[judged] for judged in one.judges)
    ]
    total = len(sets) * len(chunks)
    done = total - len(todo)
    task = ray.remote(_attack_chunk).options(
        num_cpus=scaling.cpus_per_attack,
        num_gpus=scaling.gpus_per_attack,
        max_retries=TASK_RETRIES,
        name="attack",
    )
    waiting: dict[Any, _Examples] = {}
    queue = iter(todo)
    told: set[Evaluation] = set()
    entries: dict[Evaluation, dict[str, Any]] = {}
    left = {one.address: sum(t[0] is one for t in todo) for one in sets}

    def finish_ready() -> None:
        for e in evaluations:
            if e not in told and left[addresses[e][0]] == 0:
                told.add(e)
                entries[e] = _entry(e, addresses[e], len(chunks), experiment, root)
                if on_evaluation is not None:
                    on_evaluation(entries[e])

    finish_ready()
    if progress is not None:
        progress(done, total, "chunks")
    try:
        while True:
            while len(waiting) < TASKS_IN_FLIGHT and (item := next(queue, None)) is not None:
                one, i, start, stop = item
                job = {
                    "root": root.uri,
                    "test": test.address,
                    "examples": one.address,
                    "source": one.source.address if one.source else None,
                    "attack": one.attack,
                    "early_leaving": one.early_leaving,
                    "judges": one.judges,
                    "chunk": i,
                    "rows": (start, stop),
                    "seed": config.seed,
                    "device": "cuda" if scaling.gpus_per_attack else "cpu",
                    "threads": scaling.threads_per_worker,
                }
                waiting[task.remote(job)] = one
            if not waiting:
                break
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for ref in ready:
                one = waiting.pop(ref)
                ray.get(ref)
                done += 1
                left[one.address] -= 1
                if progress is not None:
                    made_on = one.source.name if one.source else "no model"
                    progress(done, total, f"chunks, {one.attack} on {made_on}")
                if left[one.address] == 0:
                    finish_ready()
    except Exception as e:
        for ref in waiting:
            ray.cancel(ref)
        mine = unwrap(e)
        if mine is not None and mine is not e:
            raise mine from e
        raise
    return [entries[e] for e in evaluations]


def _once(root: Storage, name: str, value: Any) -> None:
    if not root.exists(name):
        root.write_json(name, value)


def _chunk(i: int) -> str:
    return f"chunk-{i:05d}.parquet"


def _entry(
    e: Evaluation, addresses: tuple[str, str], chunks: int, experiment: Experiment, root: Storage
) -> dict[str, Any]:
    examples, judged = addresses
    columns = read_chunks(root / judged, chunks)
    seconds, micro_batches = 0.0, 0
    if e.attack != "none":
        for i in range(chunks):
            metadata = _metadata(root / examples, i)
            seconds += metadata["seconds"]
            micro_batches += metadata["micro_batch"] > 0
    spec = None if e.attack == "none" else AttackSpec.parse(e.attack)
    budgets = usual_budgets(experiment.data.channels, experiment.data.image_size)
    entry = {
        "model": e.model.name,
        "source": e.source.name if e.source else None,
        "threat_model": e.threat_model,
        "attack": e.attack,
        "path": judged,
        "examples": None if e.attack == "none" else examples,
        "n": len(columns["index"]),
        "metrics": summarize(columns, spec, seconds, budgets=budgets),
    }
    if micro_batches:
        entry["chunks_split_for_memory"] = micro_batches
    return entry


def read_chunks(directory: Storage, chunks: int) -> dict[str, np.ndarray]:
    """All records of one evaluation, in the order of the samples.

    Raises:
        DataError: a chunk is missing or corrupt.
    """
    tables = [_read_table(directory, i) for i in range(chunks)]
    table = pa.concat_tables(tables)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _read_table(directory: Storage, i: int) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(directory.read_bytes(_chunk(i))))
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(
            f"{directory.uri}/{_chunk(i)} is corrupt ({e}); delete it and run the same command again: only it is computed anew"
        ) from e


def _metadata(directory: Storage, i: int) -> dict[str, Any]:
    schema = pq.read_schema(pa.BufferReader(directory.read_bytes(_chunk(i))))
    found: dict[str, Any] = json.loads(schema.metadata[b"defendpp"])
    return found


def _write_table(directory: Storage, i: int, columns: dict[str, pa.Array], metadata: dict[str, Any]) -> None:
    table = pa.table(columns)
    # beside what Arrow itself keeps there
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"defendpp": json.dumps(metadata).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    directory.write_bytes(_chunk(i), sink.getvalue())


def read_examples(directory: Storage, i: int) -> np.ndarray:
    """float32 [n,C,H,W]: the adversarial examples of one chunk.

    Raises:
        DataError: the file is corrupt.
    """
    return shards.to_numpy(_read_table(directory, i).column("adversarial"))


# what follows runs in the tasks


@functools.lru_cache(maxsize=8)
def _model(root: str, address: str, device: str) -> nn.Module:
    path, _, behind = address.partition("+")
    if behind:
        return checkpoints.load_reformed(f"{root}/{path}", f"{root}/{behind}", device)
    return checkpoints.load_classifier(f"{root}/{path}", device)


@functools.lru_cache(maxsize=2)
def _test_set(root: str, address: str) -> shards.ShardSet:
    return shards.load(Storage(root), address)


def _attack_chunk(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    # verdicts are given in true float32, and the same on every run
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    root, device = Storage(job["root"]), job["device"]
    rows = _test_set(job["root"], job["test"]).read_rows(*job["rows"])
    clean = torch.from_numpy(rows["image"]).to(device).float().div_(255)
    labels = torch.from_numpy(rows["label"]).to(device).long()
    i = job["chunk"]
    if job["attack"] == "none":
        adversarial = clean
    else:
        directory = root / job["examples"]
        if not directory.exists(_chunk(i)):
            _make_examples(job, directory, clean, labels, rows)
        # from the file in any case, so that a continued run judges what an unbroken one judged
        adversarial = torch.from_numpy(read_examples(directory, i)).to(device)
    for judged, path in job["judges"].items():
        directory = root / judged
        if directory.exists(_chunk(i)):
            continue
        columns = judge(_model(job["root"], path, device), clean, adversarial, labels)
        _write_table(
            directory, i, {"index": pa.array(rows["index"]), **{k: pa.array(v) for k, v in columns.items()}}, {}
        )


def _make_examples(
    job: dict[str, Any], directory: Storage, clean: Tensor, labels: Tensor, rows: dict[str, np.ndarray]
) -> None:
    spec = AttackSpec.parse(job["attack"])
    model = _model(job["root"], job["source"], job["device"]) if job["source"] else nn.Identity()
    begin = time.perf_counter()
    adversarial, micro_batch = _craft(spec, model, clean, labels, job)
    seconds = time.perf_counter() - begin
    verify_examples(clean, adversarial, rows["index"], spec)
    images = shards.tensor_array(adversarial.cpu().numpy())
    _write_table(
        directory,
        job["chunk"],
        {"index": pa.array(rows["index"]), "label": pa.array(rows["label"]), "adversarial": images},
        {"seconds": seconds, "micro_batch": micro_batch, "attack": job["attack"]},
    )


def _craft(
    spec: AttackSpec, model: nn.Module, clean: Tensor, labels: Tensor, job: dict[str, Any]
) -> tuple[Tensor, int]:
    """The examples of a chunk, and 0, or the size of the micro-batches that memory allowed (recorded: another result)."""
    size = len(clean)
    while True:
        generator = torch.Generator().manual_seed(stream_seed(job["seed"], job["chunk"]))
        try:
            parts = [
                run_attack(
                    spec,
                    model,
                    clean[start : start + size],
                    labels[start : start + size],
                    early_leaving=job["early_leaving"],
                    generator=generator,
                )
                for start in range(0, len(clean), size)
            ]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
            torch.cuda.empty_cache()
            continue
        return torch.cat(parts), 0 if size == len(clean) else size
