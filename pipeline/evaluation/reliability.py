"""Ray tasks of the reliability tests (docs/reliability.md): probes and active tests.

Each result is one file under ``reliability/``, so a finished test is never run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.active_test import active_test
from components.evaluation.flags import Judged, flags
from components.evaluation.metrics import standard_eps
from components.evaluation.probe import POINTS_AT_ONCE, probe
from components.fields import content_hash
from components.random_streams import stream_seed
from components.threat_models import DIRECT
from pipeline.evaluation import addresses, attack_tasks
from pipeline.evaluation.attack_progress import Progress
from pipeline.evaluation.plan import Model
from pipeline.evaluation.worst_case import Columns, EvaluationRecords
from pipeline.runtime import tasks
from pipeline.runtime.cluster import attack_bundle
from pipeline.runtime.storage import Storage

RELIABILITY_VERSION = 3
"""Part of every address here. Raise it when the same settings would measure something else."""
UNTESTED = ("noise", "fgsm", "adaptive")
"""Attacks without an active test.

Noise searches for nothing, and a single step may fail on an honest network. The adaptive attack's
own term knows nothing of the planted point; apart from that term it is PGD, which is tested."""


def reliability(
    models: Sequence[Model],
    test: attack_tasks.TestSet,
    experiment: Experiment,
    root: Storage,
    judgements: EvaluationRecords,
    progress: Progress,
    run: tasks.RunTasks = tasks.run_tasks,
) -> dict[str, dict[str, Any]]:
    """Probe every model, run the active test of every attack on it, and raise the flags.

    Args:
        run: runs the tests, by default as Ray tasks.

    Returns:
        model -> {probe, active: {attack: ...}, flags: [...]} (docs/records.md); empty with
        ``evaluation.reliability_images=0``.
    """
    images = min(experiment.evaluation.reliability_images, test.num_rows)
    if not images:
        return {}
    jobs = {m.name: reliability_jobs(m, test, experiment, root, judgements.of(m.name), images) for m in models}
    pending = {job["file"]: job for per_model in jobs.values() for job in per_model if not root.exists(job["file"])}
    total = done = len({job["file"] for per_model in jobs.values() for job in per_model})
    done -= len(pending)

    def report(note: str = "") -> None:
        progress(done, total, f"reliability tests{note}")

    report()
    tagged_jobs = ((job, f", {job['attack'] or 'probe'} on {job['name']}") for job in pending.values())
    bundle = attack_bundle(experiment.scaling)
    for note in run(measure, tagged_jobs, bundle, name="reliability", on_straggler=report):
        done += 1
        report(note)
    return {model.name: _entry(jobs[model.name], judgements.of(model.name), root) for model in models}


def _entry(
    jobs: Sequence[dict[str, Any]], judged: Sequence[tuple[dict[str, Any], Columns]], root: Storage
) -> dict[str, Any]:
    results = {job["attack"]: root.read_json(job["file"]) for job in jobs}
    probe_result = results.pop("")
    evaluations = [
        Judged(threat_model=e["threat_model"], spec=AttackSpec.parse(e["attack"]), columns=columns)
        for e, columns in judged
    ]
    raised = flags(probe_result, evaluations, list(results.values()))
    return {"probe": probe_result, "active": results, "flags": [flag.to_dict() for flag in raised]}


def reliability_jobs(
    model: Model,
    test: attack_tasks.TestSet,
    experiment: Experiment,
    root: Storage,
    judged: Sequence[tuple[dict[str, Any], Columns]],
    images: int,
) -> list[dict[str, Any]]:
    """List the jobs of a model: the probe (whose ``attack`` is empty) and the active tests."""
    basis = attack_tasks.job_basis(experiment, root, test)
    tests = [("", *_probe_budget(experiment)), *_active_tests(experiment, judged)]
    return [
        {
            "file": _result_file(model, text, norm, eps, test.address, images, experiment),
            **basis,
            "model": model.weights,
            "name": model.name,
            "attack": text,
            "bfloat16": addresses.searches_in_bfloat16(text, experiment.evaluation),
            "norm": norm,
            "eps": eps,
            "images": images,
        }
        for text, norm, eps in tests
    ]


def _active_tests(
    experiment: Experiment, judged: Sequence[tuple[dict[str, Any], Columns]]
) -> list[tuple[str, str, float]]:
    """List attack, norm and eps of each active test."""
    attacks = dict.fromkeys(e["attack"] for e, _ in judged if e["threat_model"] in DIRECT)
    tests = []
    for text, spec in ((text, AttackSpec.parse(text)) for text in attacks):
        if spec.name not in UNTESTED:
            norm = str(spec.norm)
            tests.append((text, norm, spec.eps if spec.eps is not None else _standard_eps(experiment, norm)))
    return tests


def _result_file(
    model: Model, text: str, norm: str, eps: float, test_address: str, images: int, experiment: Experiment
) -> str:
    """Return the file of a test's result, named by everything that the result follows from."""
    spec = AttackSpec.parse(text) if text else None
    name = spec.name if spec else "pgd"  # The probe runs PGD.
    parts = [
        RELIABILITY_VERSION,
        model.identity,
        text,
        norm,
        eps,
        test_address,
        images,
        experiment.evaluation.seed,
        *(["bfloat16"] if addresses.searches_in_bfloat16(text, experiment.evaluation) else []),
        # These three mark results that earlier versions measured wrongly. Those versions aimed at
        # classes that cannot be reached, let the norms of gradients below 1e-19 underflow, and
        # probed without passes of other batches.
        *(["runner_up"] if spec and spec.target in ("random", "least_likely") else []),
        *(["l2_norms"] if norm == "l2" and name in addresses.UNDERFLOWED_IN_L2 else []),
        *([] if text else ["batch_dependence"]),
    ]
    return f"reliability/{content_hash(*parts)}.json"


def _probe_budget(experiment: Experiment) -> tuple[str, float]:
    """Return the probe's norm and eps: of the first attack with an eps, else the usual ones."""
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    own = next(((str(s.norm), s.eps) for s in specs if s.eps is not None and s.name != "noise"), None)
    return own or ("linf", _standard_eps(experiment, "linf"))


def _standard_eps(experiment: Experiment, norm: str) -> float:
    return standard_eps(experiment.data.channels, experiment.data.image_size, norm)


def measure(job: dict[str, Any]) -> None:
    """Run one test in a Ray task and write its result."""
    attack_tasks.prepare_task(job)
    _, images, labels = attack_tasks.load_images(job, 0, job["images"])
    networks, device = attack_tasks.networks_of(job), job["device"]
    model = attack_tasks.load_model(networks, job["model"], device)
    fast = None
    if job["attack"]:
        fast = attack_tasks.load_fast_copy(networks, job["model"], device, images.shape[1:], job["bfloat16"])

    def attempt(micro_batches: list[slice]) -> dict[str, Any]:
        batch = micro_batches[0].stop
        generator = torch.Generator().manual_seed(stream_seed(job["seed"], job["images"]))
        torch.manual_seed(attack_tasks.named_seed(job["seed"], 0, job["file"]))
        if job["attack"]:
            spec = AttackSpec.parse(job["attack"])
            return active_test(model, images, spec, eps=job["eps"], fast=fast, generator=generator, batch=batch)
        return probe(model, images, labels, eps=job["eps"], norm=job["norm"], generator=generator, batch=batch)

    # The probe takes all images at once, an active test all of its points.
    largest = max(job["images"], POINTS_AT_ONCE)
    result, micro_batch = attack_tasks.as_memory_allows(largest, attempt, f"the reliability of {job['name']} on")
    if micro_batch:
        result["micro_batch"] = micro_batch
    Storage(job["root"]).write_json(job["file"], result)
