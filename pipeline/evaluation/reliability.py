"""The probe of every model and the active test of every attack, as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.active_test import active_test
from components.evaluation.flags import Judged, flags
from components.evaluation.metrics import usual_eps
from components.evaluation.probe import POINTS_AT_ONCE, probe
from components.fields import content_hash
from components.random_streams import stream_seed
from components.threat_models import DIRECT
from pipeline.data import shards
from pipeline.evaluation import addresses, attack_tasks
from pipeline.evaluation.plan import Model
from pipeline.evaluation.worst_case import Columns, EvaluationRecords
from pipeline.runtime import tasks
from pipeline.runtime.cluster import attack_bundle
from pipeline.runtime.storage import Storage

RELIABILITY_VERSION = 3
"""Part of every address here. Raise it when the same settings would measure something else."""
UNTESTED = ("noise", "fgsm", "adaptive")
"""No active test: noise searches for nothing, a single step may fail on an honest network, and the adaptive attack's own term
knows nothing of the planted point (it is PGD otherwise, which is tested)."""


def reliability(
    models: Sequence[Model],
    test: shards.ShardSet,
    experiment: Experiment,
    root: Storage,
    judgements: EvaluationRecords,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Probe every model, run the active test of every attack on it, and raise the flags.

    Returns:
        model -> {probe, active: {attack: ...}, flags: [...]} (docs/records.md); empty with ``evaluation.reliability_images=0``.
    """
    images = min(experiment.evaluation.reliability_images, test.num_rows)
    if not images:
        return {}
    jobs = {m.name: reliability_jobs(m, test, experiment, root, judgements.of(m.name), images) for m in models}
    todo = {job["file"]: job for per_model in jobs.values() for job in per_model if not root.exists(job["file"])}
    total = done = len({job["file"] for per_model in jobs.values() for job in per_model})
    done -= len(todo)

    def tell(note: str = "") -> None:
        if progress is not None:
            progress(done, total, f"reliability tests{note}")

    tell()
    work = ((job, f", {job['attack'] or 'probe'} on {job['name']}") for job in todo.values())
    for note in tasks.run_tasks(
        _measure, work, attack_bundle(experiment.scaling), name="reliability", on_straggler=tell
    ):
        done += 1
        tell(note)
    out = {}
    for model in models:
        found = {job["attack"]: root.read_json(job["file"]) for job in jobs[model.name]}
        probed = found.pop("")
        judged = [
            Judged(threat_model=e["threat_model"], spec=AttackSpec.parse(e["attack"]), columns=columns)
            for e, columns in judgements.of(model.name)
        ]
        raised = flags(probed, judged, list(found.values()))
        out[model.name] = {"probe": probed, "active": found, "flags": [f.to_dict() for f in raised]}
    return out


def reliability_jobs(
    model: Model,
    test: shards.ShardSet,
    experiment: Experiment,
    root: Storage,
    judged: Sequence[tuple[dict[str, Any], Columns]],
    images: int,
) -> list[dict[str, Any]]:
    """The probe (attack "") and the active tests of a model."""
    norm, eps = _probe_budget(experiment)
    attacks = {e["attack"]: AttackSpec.parse(e["attack"]) for e, _ in judged if e["threat_model"] in DIRECT}
    wanted: list[tuple[str, str, float]] = [("", norm, eps)]
    for text, spec in attacks.items():
        if spec.name not in UNTESTED:
            budget = spec.eps if spec.eps is not None else _usual(experiment, str(spec.norm))
            wanted.append((text, str(spec.norm), budget))
    basis, out = attack_tasks.job_basis(experiment, root, test), []
    for text, norm, eps in wanted:
        bfloat16 = bool(text) and addresses.in_bfloat16(text, experiment.evaluation)
        name = AttackSpec.parse(text).name if text else "pgd"  # the probe runs PGD
        said = [
            RELIABILITY_VERSION,
            model.identity,
            text,
            norm,
            eps,
            test.address,
            images,
            basis["seed"],
            *(["bfloat16"] if bfloat16 else []),
            # found nothing at first: it aimed at classes that cannot be reached there
            *(["runner_up"] if text and AttackSpec.parse(text).target in ("random", "least_likely") else []),
            # the norms of gradients below 1e-19 underflowed at first
            *(["l2_norms"] if norm == "l2" and name in addresses.FOLLOW_L2_GRADIENTS else []),
            # the probe had no passes of other batches at first
            *([] if text else ["batch_dependence"]),
        ]
        out.append(
            {
                "file": f"reliability/{content_hash(*said)}.json",
                **basis,
                "model": model.weights,
                "name": model.name,
                "attack": text,
                "bfloat16": bfloat16,
                "norm": norm,
                "eps": eps,
                "images": images,
            }
        )
    return out


def _probe_budget(experiment: Experiment) -> tuple[str, float]:
    """The budget that the probe starts from: the first attack's that has one, else the usual one."""
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    own = next(((str(s.norm), s.eps) for s in specs if s.eps is not None and s.name != "noise"), None)
    return own or ("linf", _usual(experiment, "linf"))


def _usual(experiment: Experiment, norm: str) -> float:
    return usual_eps(experiment.data.channels, experiment.data.image_size, norm)


def _measure(job: dict[str, Any]) -> None:
    attack_tasks.prepare_task(job)
    _, images, labels = attack_tasks.load_images(job, 0, job["images"])
    model = attack_tasks.load_model(job["root"], job["model"], job["device"])
    fast = None
    if job["attack"]:
        fast = attack_tasks.load_fast_copy(job["root"], job["model"], job["device"], images.shape[1:], job["bfloat16"])

    def attempt(micro_batches: list[slice]) -> dict[str, Any]:
        batch = micro_batches[0].stop
        generator = torch.Generator().manual_seed(stream_seed(job["seed"], job["images"]))
        torch.manual_seed(attack_tasks.named_seed(job["seed"], 0, job["file"]))
        if job["attack"]:
            spec = AttackSpec.parse(job["attack"])
            return active_test(model, images, spec, eps=job["eps"], fast=fast, generator=generator, batch=batch)
        return probe(model, images, labels, eps=job["eps"], norm=job["norm"], generator=generator, batch=batch)

    # a probe of all images, or all points of an active test, at once
    most = max(job["images"], POINTS_AT_ONCE)
    found, micro_batch = attack_tasks.as_memory_allows(most, attempt, f"the reliability of {job['name']} on")
    if micro_batch:
        found["micro_batch"] = micro_batch
    Storage(job["root"]).write_json(job["file"], found)
