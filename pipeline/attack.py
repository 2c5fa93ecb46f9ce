"""Ray tasks that attack and judge: one task per (set of examples x chunk), its records on storage when it returns.

A chunk of samples is the unit of everything: it has a random stream for each attack (seed, chunk number, attack), its own file
of examples and its own file of records. Chunks are fixed by the config, so the result is the same for any number of tasks, and a finished
chunk is never computed again.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor, nn

from components.attacks.fast_copy import computes_in_bfloat16, search, stand_in
from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig, Experiment
from components.errors import DataError
from components.evaluation.judge import Columns, judge, verify_examples
from components.evaluation.metrics import summarize, usual_budgets
from components.fields import content_hash
from components.models.defend import adaptive_objective
from components.random_streams import stream_seed
from pipeline.data import shards
from pipeline.runtime.cluster import ResourceError, attack_bundle, room_for
from pipeline.runtime.storage import HALF_WRITTEN_S, Storage, join_uri
from pipeline.runtime.user_errors import unwrap
from pipeline.training import exports

CODE_VERSION = 2
"""Part of every address here. Raise it when the same settings would give other examples or records."""
FOLLOW_L2_GRADIENTS = ("fgsm", "bim", "pgd", "ddn", "apgd", "apgd-t", "adaptive", "autoattack")
"""Attacks that in L2 step along the normalised gradient. C&W, FAB and Square do not."""
CHANGED_SINCE = {
    ("noise", "l2"): 3,  # no longer shortened by clipping
    ("autoattack", "linf"): 3,  # a sample's draws no longer depend on who is left
    **{(name, "l2"): 4 for name in FOLLOW_L2_GRADIENTS},  # gradients below 1e-19 are normalised without underflow
}
"""The same for the attacks, by name and norm, whose examples alone have changed; all others are as they were."""
SEEDED_BY_NAME = 5
"""The same for the attacks that draw: each has had random numbers of its own in a chunk since then."""
TASKS_IN_FLIGHT = 64
"""Back-pressure: so many tasks (or twice as many as there is room for) wait inside Ray, however many thousand chunks there are."""
STRAGGLER = 3.0
"""A task that takes so many times the median is named in the progress line ..."""
STRAGGLER_S = 30.0
"""... once it has taken so many seconds."""
LOOK_S = 5.0
"""Between two looks for such a task, whether others end meanwhile or not."""
STAND_IN_IMAGES = 8
"""Random images on which a network and its faster stand-in must agree."""
TASK_RETRIES = 3

RANDOM = "random"
CLEAN = "clean"
WHITE_BOX = "white_box"
GREY_BOX = "grey_box"
BLACK_BOX = "black_box"
EVERY_SOURCE = "transfer:*"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model as attacks see it: its name in the run, its address and the checksum of its weights."""

    name: str
    path: str
    sha256: str
    autoencoder: str = ""
    """Checksum of the auto-encoder beside it, or empty."""
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

    @property
    def weights(self) -> str:
        """:attr:`address` with the checksum of the weights behind each path and a # between, for :func:`load_model`."""
        own = f"{self.path}#{self.sha256}"
        return own if self.classifier is None else f"{own}+{self.classifier.weights}"


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
        for source, threat in _sources(model, by_name, experiment):
            for spec in specs:
                if _applies(spec, source, threat):
                    early = spec.can_leave_early and source == model
                    out.append(
                        Evaluation(
                            model=model, source=source, threat_model=threat, attack=str(spec), early_leaving=early
                        )
                    )
    return out


def _sources(model: Model, by_name: dict[str, Model], experiment: Experiment) -> list[tuple[Model, str]]:
    """The models on which examples for ``model`` are made, each with what the threat model is called.

    ``transfer:*`` comes last, and adds the sources that no other threat model has.
    """
    found: dict[tuple[Model, str], None] = {}
    for threat in sorted(experiment.evaluation.threat_models, key=lambda threat: threat == EVERY_SOURCE):
        every = threat == EVERY_SOURCE
        taken = {source for source, _ in found} if every else set()
        for one in [f"transfer:{base}" for base in experiment.firsts()] if every else [threat]:
            source, said = _source(model, one, by_name, experiment)
            if source is not None and source not in taken:
                found[source, said] = None
    return list(found)


def _applies(spec: AttackSpec, source: Model, threat: str) -> bool:
    """Whether an attack belongs to a threat model: one that reads scores alone is black-box, one whose examples mean nothing to
    another model is not transferred, and an adaptive one needs the auto-encoder of the model that it knows."""
    if spec.name == "noise":
        return False
    if threat == BLACK_BOX:
        return not spec.needs_gradients
    if not spec.needs_gradients:
        return False
    if spec.name == "adaptive":
        return threat == WHITE_BOX and bool(source.autoencoder)
    return threat == WHITE_BOX or not spec.judged_on_source_only


def _source(model: Model, threat: str, by_name: dict[str, Model], experiment: Experiment) -> tuple[Model | None, str]:
    """The model on which a threat model's examples are made (None: it does not apply), and what the threat model is called."""
    if threat in (WHITE_BOX, BLACK_BOX):
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
    bfloat16: bool
    judges: dict[str, Model] = field(default_factory=dict)
    """Address of the judged records -> the model that judges."""


def _task_name(examples: _Examples) -> str:
    """Return what a progress line calls the work on a set of examples: ``ATTACK on MODEL``, or what needs no model."""
    if examples.attack == "none":
        return "clean images"
    return f"{examples.attack} on {examples.source.name}" if examples.source else examples.attack


def in_bfloat16(attack: str, evaluation: EvaluationConfig) -> bool:
    """Whether this attack's search runs in bfloat16."""
    return (
        evaluation.search_precision == "bfloat16"
        and attack != "none"
        and AttackSpec.parse(attack).may_search_in_bfloat16
    )


def _version(spec: AttackSpec) -> int:
    version = CHANGED_SINCE.get((spec.name, str(spec.norm)), CODE_VERSION)
    return max(version, SEEDED_BY_NAME) if spec.draws else version


def _example_sets(
    evaluations: Sequence[Evaluation], test_address: str, ends_within_a_chunk: int, evaluation: EvaluationConfig
) -> tuple[list[_Examples], dict[Evaluation, tuple[str, str]]]:
    sets: dict[str, _Examples] = {}
    addresses: dict[Evaluation, tuple[str, str]] = {}
    for e in evaluations:
        made_on = e.source.identity if e.source else None
        spec = None if e.attack == "none" else AttackSpec.parse(e.attack)
        version = _version(spec) if spec else CODE_VERSION
        if e.source and spec and spec.name == "adaptive":
            made_on = f"{made_on}+{e.source.autoencoder}"
        bfloat16 = in_bfloat16(e.attack, evaluation)
        key = content_hash(
            version,
            made_on,
            e.attack,
            e.early_leaving,
            test_address,
            ends_within_a_chunk,
            evaluation.chunk_size,
            evaluation.seed,
            *([evaluation.search_precision] if bfloat16 else []),
        )
        judged = f"judged/{content_hash(CODE_VERSION, key, e.model.identity)}"
        one = sets.setdefault(
            key,
            _Examples(
                address=f"examples/{key}",
                source=e.source,
                attack=e.attack,
                early_leaving=e.early_leaving,
                bfloat16=bfloat16,
            ),
        )
        one.judges[judged] = e.model
        addresses[e] = (one.address, judged)
    return list(sets.values()), addresses


def job_basis(experiment: Experiment, root: Storage, test: shards.ShardSet) -> dict[str, Any]:
    """Return what every task's job begins with: its data, and how its process is set up (:func:`prepare_task`)."""
    return {
        "root": root.full_uri,
        "test": test.address,
        "seed": experiment.evaluation.seed,
        "device": "cuda" if experiment.scaling.gpus_per_attack else "cpu",
        "threads": experiment.scaling.threads_per_worker,
        "trusted": sorted({config.arch for config in experiment.variants().values()}),
    }


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
    # else 0, not n: whole chunks do not depend on how many follow, and an evaluation on more images goes on from those of one on fewer
    ends_within_a_chunk = n if n % config.chunk_size else 0
    sets, addresses = _example_sets(evaluations, test.address, ends_within_a_chunk, config)
    chunks = [(i, start, min(start + config.chunk_size, n)) for i, start in enumerate(range(0, n, config.chunk_size))]
    for one in sets:
        said = {
            "attack": one.attack,
            "early_leaving": one.early_leaving,
            "search_precision": "bfloat16" if one.bfloat16 else "float32",
            "source": one.source.address if one.source else None,
            "test": test.address,
            "ends_within_a_chunk": ends_within_a_chunk,
            "chunk_size": config.chunk_size,
            "seed": config.seed,
        }
        if one.attack != "none":
            _once(root, f"{one.address}/spec.json", said)
        for judged, model in one.judges.items():
            _once(root, f"{judged}/spec.json", {**said, "examples": one.address, "model": model.address})

    # a listing per directory, not a question per chunk: on an object store each question is a round trip
    directories = [a for one in sets for a in (one.address, *one.judges)]
    for directory in directories:
        root.delete_stale(directory, HALF_WRITTEN_S)
    present = {a: set(root.list(a)) for a in directories}
    todo: list[tuple[_Examples, list[tuple[int, int, int]]]] = []
    for one in sets:
        lacking = [c for c in chunks if any(_chunk(c[0]) not in present[judged] for judged in one.judges)]
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
                "early_leaving": one.early_leaving,
                "bfloat16": one.bfloat16,
                "judges": {judged: model.weights for judged, model in one.judges.items()},
                "chunks": batch,
            },
            (one, batch),
        )
        for one, batch in todo
    )

    def named(tag: tuple[_Examples, list[tuple[int, int, int]]]) -> str:
        return f", {_task_name(tag[0])}"

    slow = ""

    def still(note: str) -> None:
        tell(total - sum(left.values()), total, f"chunks{note}{slow}")

    def straggler(note: str) -> None:
        nonlocal slow
        slow = note  # until the next look: it is not to vanish with the next chunk of another task
        still("")

    running = run_tasks(
        _attack_chunks, jobs, attack_bundle(scaling), name="attack", named=named, on_straggler=straggler
    )
    for one, batch in running:
        left[one.address] -= len(batch)
        still(named((one, batch)))
        if left[one.address] == 0:
            finish_ready()
    return [entries[e] for e in evaluations]


T = TypeVar("T")


def run_tasks(
    function: Callable[[dict[str, Any]], Any],
    jobs: Iterable[tuple[dict[str, Any], T]],
    bundle: dict[str, float],
    *,
    name: str,
    on_straggler: Callable[[str], None],
    named: Callable[[T], str] = str,
) -> Iterator[T]:
    """Run Ray tasks, a bounded number of them at a time, and give back what each job was tagged with as it ends.

    Args:
        function: called with a job; what it returns is not looked at.
        jobs: (job, tag); read only as far as there is room for.
        bundle: what Ray reserves for each.
        name: of the tasks, in Ray's own displays.
        on_straggler: told at most every LOOK_S seconds which task takes much longer than the others; once with "" when none does
            any more.
        named: what a task is called there, by its tag: ", ATTACK on MODEL".

    Raises:
        UserError: what a task raised; the others are cancelled.
    """
    task = ray.remote(function).options(
        num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), max_retries=TASK_RETRIES, name=name
    )
    slots = max(1, room_for(bundle))
    waiting: dict[Any, T] = {}
    watch = _Stragglers(on_straggler)
    queue = iter(jobs)
    try:
        while True:
            while len(waiting) < max(TASKS_IN_FLIGHT, 2 * slots) and (item := next(queue, None)) is not None:
                waiting[task.remote(item[0])] = item[1]
            if not waiting:
                return
            # Ray starts tasks in the order in which they are submitted
            watch.running({ref: named(tag) for ref, tag in itertools.islice(waiting.items(), slots)})
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            for ref in ready:
                tag = waiting.pop(ref)
                ray.get(ref)
                watch.ended(ref)
                yield tag
            watch.look()
    except Exception as e:
        for ref in waiting:
            ray.cancel(ref)
        mine = unwrap(e)
        if mine is not None and mine is not e:
            raise mine from e
        raise


class _Stragglers:
    """Which task takes much longer than the others.

    Args:
        tell: told of it, at most every LOOK_S seconds.
        clock: seconds from any moment on.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.tell, self.clock = tell, clock
        self.started: dict[Any, tuple[float, str]] = {}
        self.seconds: list[float] = []
        self.looked = clock()
        self.told = ""

    def running(self, tasks: Mapping[Any, str]) -> None:
        """These tasks, each with its name, run by now."""
        for ref, name in tasks.items():
            self.started.setdefault(ref, (self.clock(), name))

    def ended(self, ref: Any) -> None:
        now = self.clock()
        self.seconds.append(now - self.started.pop(ref, (now, ""))[0])

    def look(self) -> None:
        """Tell what there is to tell, unless that was just done."""
        if self.clock() - self.looked < LOOK_S:
            return
        self.looked = self.clock()
        note = self._slowest()
        if note or self.told:
            self.tell(note)
        self.told = note

    def _slowest(self) -> str:
        if not self.started or not self.seconds:
            return ""
        begin, name = min(self.started.values())
        longest, usual = self.clock() - begin, statistics.median(self.seconds)
        if longest < max(STRAGGLER * usual, STRAGGLER_S):
            return ""
        return f"; the slowest of {len(self.started)} tasks{name}, has run for {longest:.0f} s, {usual:.0f} s is usual"


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
    seconds, micro_batches, in_float32 = 0.0, 0, 0
    if e.attack != "none":
        for i in range(chunks):
            metadata = _metadata(root / examples, i)
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
    with directory.open(_chunk(i)) as file:  # for its footer alone: the images are large
        schema = pq.read_schema(file)
    found: dict[str, Any] = json.loads(schema.metadata[b"defendpp"])
    return found


def _write_table(directory: Storage, i: int, columns: dict[str, pa.Array], metadata: dict[str, Any]) -> None:
    table = pa.table(columns)
    # beside what Arrow itself keeps there
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"defendpp": json.dumps(metadata).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    # A task that Ray took for dead may still live: what others have read by now stays as it is.
    directory.write_if_absent(_chunk(i), sink.getvalue())


def read_examples(directory: Storage, i: int) -> np.ndarray:
    """float32 [n,C,H,W]: the adversarial examples of one chunk.

    Raises:
        DataError: the file is corrupt.
    """
    return shards.to_numpy(_read_table(directory, i).column("adversarial"))


# what follows runs in the tasks


@functools.lru_cache(maxsize=8)
def load_model(root: str, weights: str, device: str) -> nn.Module:
    """Load what :attr:`Model.weights` names, in eval mode.

    Raises:
        DataError: the weights are not those any more that the records name.
    """
    parts = [part.partition("#") for part in weights.split("+")]
    (path, _, sha256), *behind = ((join_uri(root, path), mark, sha256) for path, mark, sha256 in parts)
    if not behind:
        return exports.load_classifier(path, device, sha256=sha256)
    ((classifier, _, second),) = behind
    return exports.load_reformed(path, classifier, device, sha256=(sha256, second))


@functools.lru_cache(maxsize=2)
def _test_set(root: str, address: str) -> shards.ShardSet:
    return shards.load(Storage(root), address)


def load_images(job: dict[str, Any], start: int, stop: int) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """Rows of a job's test set, and their images in [0,1] and labels on its device."""
    rows = _test_set(job["root"], job["test"]).read_rows(start, stop)
    images = torch.from_numpy(rows["image"]).to(job["device"]).float().div_(255)
    return rows, images, torch.from_numpy(rows["label"]).to(job["device"]).long()


def named_seed(seed: int, chunk: int, name: str) -> int:
    """Return the seed of one of the random streams of a chunk.

    Args:
        seed: ``evaluation.seed``.
        chunk: its number.
        name: an attack's canonical text, for what the attack draws, so that attacks differ in their random starts and
            models do not. Or an address, for torch's global stream, from which a randomised network draws.
    """
    return stream_seed(seed, chunk, int(content_hash(name)[:15], 16))


def prepare_task(job: dict[str, Any]) -> None:
    """Set up a task's process for a job that :func:`job_basis` begins."""
    torch.set_num_threads(job["threads"])
    exports.trust(job.get("trusted", ()))


def _attack_chunks(job: dict[str, Any]) -> None:
    prepare_task(job)
    for i, start, stop in job["chunks"]:
        _attack_chunk(job, i, start, stop)


def _attack_chunk(job: dict[str, Any], i: int, start: int, stop: int) -> None:
    root, device = Storage(job["root"]), job["device"]
    rows, clean, labels = load_images(job, start, stop)
    if job["attack"] == "none":
        adversarial = clean
    else:
        directory = root / job["examples"]
        if not directory.exists(_chunk(i)):
            _make_examples(job, i, directory, clean, labels, rows)
        # from the file in any case, so that a continued run judges what an unbroken one judged
        adversarial = torch.tensor(read_examples(directory, i), device=device)  # a copy: Arrow's memory is read-only
    for judged, weights in job["judges"].items():
        directory = root / judged
        if directory.exists(_chunk(i)):
            continue
        model = load_model(job["root"], weights, device)
        torch.manual_seed(named_seed(job["seed"], i, judged))
        columns, micro_batch = _judge(model, clean, adversarial, labels)
        records = {"index": pa.array(rows["index"]), **{k: pa.array(v) for k, v in columns.items()}}
        _write_table(directory, i, records, {"micro_batch": micro_batch})


@functools.lru_cache(maxsize=8)
def load_stand_in(root: str, weights: str, device: str, shape: tuple[int, ...], bfloat16: bool) -> nn.Module | None:
    """The faster copy on which attacks search, if the network of ``weights`` (:attr:`Model.weights`) has one."""
    images = torch.rand(STAND_IN_IMAGES, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    model = load_model(root, weights, device)
    # made once in a task, while a chunk is attacked: what the network draws meanwhile must not count
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device == "cuda" else ()):
        return stand_in(model, images, bfloat16=bfloat16)


@functools.lru_cache(maxsize=2)
def _autoencoder(root: str, weights: str, device: str) -> nn.Module:
    path, _, sha256 = weights.partition("#")
    return exports.load_autoencoder(join_uri(root, path), device, sha256=sha256)


def _make_examples(
    job: dict[str, Any], i: int, directory: Storage, clean: Tensor, labels: Tensor, rows: dict[str, np.ndarray]
) -> None:
    spec = AttackSpec.parse(job["attack"])
    model = load_model(job["root"], job["source"], job["device"]) if job["source"] else nn.Identity()
    begin = time.perf_counter()
    autoencoder = _autoencoder(job["root"], job["autoencoder"], job["device"]) if spec.name == "adaptive" else None

    def copied() -> nn.Module | None:
        if not job["source"]:
            return None
        return load_stand_in(job["root"], job["source"], job["device"], clean.shape[1:], job["bfloat16"])

    torch.manual_seed(named_seed(job["seed"], i, job["examples"]))
    seed = named_seed(job["seed"], i, str(spec))
    adversarial, micro_batch = _craft(
        spec, model, copied, autoencoder, clean, labels, early=job["early_leaving"], seed=seed
    )
    seconds = time.perf_counter() - begin
    bfloat16 = job["bfloat16"] and computes_in_bfloat16(copied())
    verify_examples(clean, adversarial, rows["index"], spec)
    images = shards.tensor_array(adversarial.cpu().numpy())
    _write_table(
        directory,
        i,
        {"index": pa.array(rows["index"]), "label": pa.array(rows["label"]), "adversarial": images},
        {"seconds": seconds, "micro_batch": micro_batch, "bfloat16": bfloat16, "attack": job["attack"]},
    )


def _knowledge(autoencoder: nn.Module, clean: Tensor, spec: AttackSpec) -> Callable[[Tensor, Tensor], Tensor]:
    assert spec.objective is not None
    assert spec.weight is not None
    return adaptive_objective(autoencoder, clean, spec.objective, spec.weight)


def _craft(
    spec: AttackSpec,
    model: nn.Module,
    copied: Callable[[], nn.Module | None],
    autoencoder: nn.Module | None,
    clean: Tensor,
    labels: Tensor,
    *,
    early: bool,
    seed: int,
) -> tuple[Tensor, int]:
    """The examples of a chunk, and 0, or the size of the micro-batches that memory allowed (recorded: another result)."""

    def attempt(micro_batches: list[slice]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        fast = copied()
        parts = []
        for rows in micro_batches:
            knows = None if autoencoder is None else _knowledge(autoencoder, clean[rows], spec)
            parts.append(
                search(
                    spec,
                    model,
                    fast,
                    clean[rows],
                    labels[rows],
                    early_leaving=early,
                    generator=generator,
                    auxiliary=knows,
                )
            )
        return torch.cat(parts)

    return as_memory_allows(len(clean), attempt, f"{spec} on")


def _judge(model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor) -> tuple[Columns, int]:
    """:func:`judge`, in smaller batches where memory is short, and of how many samples (0: all). Recorded, since a randomised
    network draws otherwise then; another's verdict does not depend on them."""

    def attempt(micro_batches: list[slice]) -> Columns:
        parts = [judge(model, clean[rows], adversarial[rows], labels[rows]) for rows in micro_batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return as_memory_allows(len(clean), attempt, "judging")


def as_memory_allows(n: int, attempt: Callable[[list[slice]], T], what: str) -> tuple[T, int]:
    """``attempt`` on all of n samples at once, else on half as many at a time, and so on.

    Returns:
        Its result, and 0, or how many samples at a time it came from.

    Raises:
        ResourceError: there is no room for a single one.
    """
    size = n
    while True:
        try:
            return attempt([slice(start, start + size) for start in range(0, n, size)]), 0 if size == n else size
        except torch.OutOfMemoryError as e:
            if size == 1:
                raise ResourceError(
                    f"{what} a single image does not fit the memory ({e}). Raise scaling.gpus_per_attack, so that fewer tasks share a "
                    "GPU, or attack on the CPU with scaling.gpus_per_attack=0"
                ) from e
        # here, where the error is gone, and with it all that it held
        size = (size + 1) // 2
        torch.cuda.empty_cache()
