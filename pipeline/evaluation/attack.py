"""Driver of the attack stage: one Ray task per batch of chunks, with records on storage.

A chunk of samples is the unit of work. Each attack has its own random stream in a chunk (seed,
chunk number, attack), and each chunk has a file of examples and files of judgements. The config
fixes the chunks, so the result is the same for any number of tasks. No chunk is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment
from components.evaluation.metrics import standard_budgets, summarize
from pipeline.evaluation.addresses import ExampleSet, example_sets, searches_in_bfloat16
from pipeline.evaluation.attack_progress import AttackProgress, Chunk, ChunkBatch, Progress
from pipeline.evaluation.attack_tasks import TestSet, attack_chunks, job_basis
from pipeline.evaluation.chunks import chunk_name, read_chunks, read_metadata, write_json_once
from pipeline.evaluation.plan import Evaluation, Model, plan_evaluations
from pipeline.runtime.cluster import attack_bundle
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage
from pipeline.runtime.tasks import RunTasks, run_tasks


def attack(
    models: Sequence[Model],
    test: TestSet,
    experiment: Experiment,
    root: Storage,
    progress: Progress,
    run: RunTasks = run_tasks,
) -> list[dict[str, Any]]:
    """Attack every model under every threat model, and return the ``evaluations`` of run.json.

    Args:
        run: runs the tasks, by default with Ray.

    Raises:
        AttackViolation: an attack returned an example outside its rules.
        DataError, StorageError: records on storage are damaged, or the storage fails.
    """
    config = experiment.evaluation
    evaluations = plan_evaluations(models, experiment)
    n = min(config.test_images or test.num_rows, test.num_rows)
    chunks = [(i, start, min(start + config.chunk_size, n)) for i, start in enumerate(range(0, n, config.chunk_size))]
    ends_within_a_chunk = n if n % config.chunk_size else 0
    sets, addresses = example_sets(evaluations, test.address, ends_within_a_chunk, config)
    _write_specs(sets, test, ends_within_a_chunk, config, root)
    pending = _pending_batches(sets, chunks, experiment.scaling.chunks_per_attack, root)
    tracker = AttackProgress(pending, len(chunks) * len(sets), progress)
    entries: dict[Evaluation, dict[str, Any]] = {}

    def add_entries() -> None:
        for e in evaluations:
            if e not in entries and tracker.is_complete(addresses[e][0]):
                entries[e] = evaluation_entry(e, addresses[e], len(chunks), experiment, root)

    add_entries()
    tracker.report()
    basis = job_basis(experiment, root, test)
    jobs = ((_task_job(batch, basis), batch) for batch in pending)
    bundle = attack_bundle(experiment.scaling)
    for batch in run(attack_chunks, jobs, bundle, name="attack", on_straggler=tracker.note_straggler):
        tracker.finish(batch)
        if tracker.is_complete(batch.examples.address):
            add_entries()  # Each read from storage overlaps with the tasks that still run.
    return [entries[e] for e in evaluations]


def _write_specs(
    sets: Sequence[ExampleSet], test: TestSet, ends_within_a_chunk: int, config: EvaluationConfig, root: Storage
) -> None:
    """Write the settings behind each address beside its chunks, for people who look there."""
    for examples in sets:
        spec = {
            "attack": examples.attack,
            "early_leaving": examples.stop_on_success,
            "search_precision": "bfloat16" if examples.bfloat16 else "float32",
            "source": examples.source.address if examples.source else None,
            "test": test.address,
            "ends_within_a_chunk": ends_within_a_chunk,
            "chunk_size": config.chunk_size,
            "seed": config.seed,
        }
        if examples.attack != "none":
            write_json_once(root, f"{examples.address}/spec.json", spec)
        for judged, model in examples.judges.items():
            judged_spec = {**spec, "examples": examples.address, "model": model.address}
            write_json_once(root, f"{judged}/spec.json", judged_spec)


def _pending_batches(
    sets: Sequence[ExampleSet], chunks: Sequence[Chunk], batch_size: int, root: Storage
) -> list[ChunkBatch]:
    """List the chunks that lack a judgement, ``batch_size`` of them to a task.

    Each directory is listed once: on an object store, a question per chunk is a round trip.
    """
    directories = [address for examples in sets for address in (examples.address, *examples.judges)]
    for directory in directories:
        root.delete_stale(directory, HALF_WRITTEN_S)
    present = {directory: set(root.list(directory)) for directory in directories}
    batches = []
    for examples in sets:
        missing = [c for c in chunks if any(chunk_name(c[0]) not in present[judged] for judged in examples.judges)]
        batches += [ChunkBatch(examples, missing[k : k + batch_size]) for k in range(0, len(missing), batch_size)]
    return batches


def _task_job(batch: ChunkBatch, basis: dict[str, Any]) -> dict[str, Any]:
    examples, source = batch.examples, batch.examples.source
    return {
        **basis,
        "tags": {"run": basis["run"], "model": source.name if source else "", "attack": examples.attack},
        "examples": examples.address,
        "source": source.weights if source else None,
        "autoencoder": f"{source.path}#{source.autoencoder}" if source else None,
        "attack": examples.attack,
        "early_leaving": examples.stop_on_success,
        "bfloat16": examples.bfloat16,
        "judges": {judged: model.weights for judged, model in examples.judges.items()},
        "chunks": batch.chunks,
    }


def evaluation_entry(
    e: Evaluation, addresses: tuple[str, str], chunks: int, experiment: Experiment, root: Storage
) -> dict[str, Any]:
    """Return the entry of an evaluation in run.json, from the files of all its chunks.

    Raises:
        DataError: a chunk is missing or corrupt.
    """
    examples, judged = addresses
    columns = read_chunks(root / judged, chunks)
    seconds, micro_batches, in_float32 = 0.0, 0, 0
    if e.attack != "none":
        for i in range(chunks):
            metadata = read_metadata(root / examples, i)
            seconds += metadata["seconds"]
            micro_batches += metadata["micro_batch"] > 0
            # Chunks of earlier versions lack the key. They were searched as the config asked.
            in_float32 += not metadata.get("bfloat16", True)
    spec = None if e.attack == "none" else AttackSpec.parse(e.attack)
    budgets = standard_budgets(experiment.data.channels, experiment.data.image_size)
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
    if in_float32 and searches_in_bfloat16(e.attack, experiment.evaluation):
        entry["chunks_searched_in_float32"] = in_float32
    return entry
