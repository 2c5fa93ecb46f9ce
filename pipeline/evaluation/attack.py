"""Ray tasks that attack and judge: one task per (set of examples x chunk), its records on storage when it returns.

A chunk of samples is the unit of everything: it has a random stream for each attack (seed, chunk number, attack), its own file
of examples and its own file of records. Chunks are fixed by the config, so the result is the same for any number of tasks, and a finished
chunk is never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.metrics import summarize, usual_budgets
from pipeline.data import shards
from pipeline.evaluation.addresses import ExampleSet, example_sets, in_bfloat16
from pipeline.evaluation.attack_tasks import attack_chunks, job_basis
from pipeline.evaluation.chunks import chunk_name, read_chunks, read_metadata, write_once
from pipeline.evaluation.plan import Evaluation, Model, plan_evaluations
from pipeline.runtime.cluster import attack_bundle
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage
from pipeline.runtime.tasks import run_tasks


def _task_name(examples: ExampleSet) -> str:
    """Return what a progress line calls the work on a set of examples: ``ATTACK on MODEL``, or what needs no model."""
    if examples.attack == "none":
        return "clean images"
    return f"{examples.attack} on {examples.source.name}" if examples.source else examples.attack


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
    evaluations = plan_evaluations(models, experiment)
    # else 0, not n: whole chunks do not depend on how many follow, and an evaluation on more images goes on from those of one on fewer
    ends_within_a_chunk = n if n % config.chunk_size else 0
    sets, addresses = example_sets(evaluations, test.address, ends_within_a_chunk, config)
    chunks = [(i, start, min(start + config.chunk_size, n)) for i, start in enumerate(range(0, n, config.chunk_size))]
    for one in sets:
        said = {
            "attack": one.attack,
            "early_leaving": one.stop_on_success,
            "search_precision": "bfloat16" if one.bfloat16 else "float32",
            "source": one.source.address if one.source else None,
            "test": test.address,
            "ends_within_a_chunk": ends_within_a_chunk,
            "chunk_size": config.chunk_size,
            "seed": config.seed,
        }
        if one.attack != "none":
            write_once(root, f"{one.address}/spec.json", said)
        for judged, model in one.judges.items():
            write_once(root, f"{judged}/spec.json", {**said, "examples": one.address, "model": model.address})

    # a listing per directory, not a question per chunk: on an object store each question is a round trip
    directories = [a for one in sets for a in (one.address, *one.judges)]
    for directory in directories:
        root.delete_stale(directory, HALF_WRITTEN_S)
    present = {a: set(root.list(a)) for a in directories}
    todo: list[tuple[ExampleSet, list[tuple[int, int, int]]]] = []
    for one in sets:
        lacking = [c for c in chunks if any(chunk_name(c[0]) not in present[judged] for judged in one.judges)]
        size = scaling.chunks_per_attack
        todo += [(one, lacking[k : k + size]) for k in range(0, len(lacking), size)]
    total = len(sets) * len(chunks)
    left = {one.address: sum(len(batch) for o, batch in todo if o is one) for one in sets}
    told: set[Evaluation] = set()
    entries: dict[Evaluation, dict[str, Any]] = {}

    def finish_ready() -> None:
        for e in evaluations:
            if e not in told and left[addresses[e][0]] == 0:
                told.add(e)
                entries[e] = _entry(e, addresses[e], len(chunks), experiment, root)
                if on_evaluation is not None:
                    on_evaluation(entries[e])

    finish_ready()
    tell = progress or (lambda done, total, note: None)
    tell(total - sum(left.values()), total, "chunks")
    common = job_basis(experiment, root, test)
    jobs = (
        (
            {
                **common,
                "examples": one.address,
                "source": one.source.weights if one.source else None,
                "autoencoder": f"{one.source.path}#{one.source.autoencoder}" if one.source else None,
                "attack": one.attack,
                "early_leaving": one.stop_on_success,
                "bfloat16": one.bfloat16,
                "judges": {judged: model.weights for judged, model in one.judges.items()},
                "chunks": batch,
            },
            (one, batch),
        )
        for one, batch in todo
    )

    def named(tag: tuple[ExampleSet, list[tuple[int, int, int]]]) -> str:
        return f", {_task_name(tag[0])}"

    slow = ""

    def still(note: str) -> None:
        tell(total - sum(left.values()), total, f"chunks{note}{slow}")

    def straggler(note: str) -> None:
        nonlocal slow
        slow = note  # until the next look: it is not to vanish with the next chunk of another task
        still("")

    running = run_tasks(attack_chunks, jobs, attack_bundle(scaling), name="attack", named=named, on_straggler=straggler)
    for one, batch in running:
        left[one.address] -= len(batch)
        still(named((one, batch)))
        if left[one.address] == 0:
            finish_ready()
    return [entries[e] for e in evaluations]


def _entry(
    e: Evaluation, addresses: tuple[str, str], chunks: int, experiment: Experiment, root: Storage
) -> dict[str, Any]:
    examples, judged = addresses
    columns = read_chunks(root / judged, chunks)
    seconds, micro_batches, in_float32 = 0.0, 0, 0
    if e.attack != "none":
        for i in range(chunks):
            metadata = read_metadata(root / examples, i)
            seconds += metadata["seconds"]
            micro_batches += metadata["micro_batch"] > 0
            in_float32 += not metadata.get("bfloat16", True)  # chunks of before this was recorded: as asked
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
    if in_float32 and in_bfloat16(e.attack, experiment.evaluation):
        entry["chunks_searched_in_float32"] = in_float32
    return entry
