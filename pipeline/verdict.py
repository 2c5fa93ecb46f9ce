"""What the evaluations of a model say together: the worst case per sample, and whether the attacks could find anything at all.

Both come from records; what is measured besides (the probe and the active test of docs/reliability.md) runs as Ray tasks, one file
each under ``reliability/``, so that what is done is never done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.active_test import active_test
from components.evaluation.flags import Judged, flags
from components.evaluation.metrics import usual_budgets, usual_eps, worst_case
from components.evaluation.probe import POINTS_AT_ONCE, probe
from components.evaluation.statistics import mcnemar, wilson_interval
from components.fields import content_hash
from components.random_streams import stream_seed
from pipeline import attack
from pipeline.attack import BLACK_BOX, WHITE_BOX, Model, read_chunks
from pipeline.data import shards
from pipeline.runtime.cluster import attack_bundle
from pipeline.runtime.storage import Storage

CODE_VERSION = 3
"""Part of every address here. Raise it when the same settings would measure something else."""
ANY = "any"
"""The threat model of a worst case over all that was made, also on other models."""
DIRECT = (WHITE_BOX, BLACK_BOX)
"""Threat models whose examples were made on the very model under test."""
UNTESTED = ("noise", "fgsm", "adaptive")
"""No active test: noise searches for nothing, a single step may fail on an honest network, and the adaptive attack's own term
knows nothing of the planted point (it is PGD otherwise, which is tested)."""

Columns = dict[str, Any]


class Judgements:
    """The records of a run's evaluations, each read once."""

    def __init__(self, root: Storage, evaluations: Sequence[dict[str, Any]], chunk_size: int) -> None:
        self.root, self.evaluations, self.chunk_size = root, evaluations, chunk_size
        self._read: dict[str, Columns] = {}

    def of(self, model: str) -> list[tuple[dict[str, Any], Columns]]:
        """(evaluation, its columns) for every attack that a model was judged under; clean images are none."""
        return [(e, self._columns(e)) for e in self.evaluations if e["model"] == model and e["attack"] != "none"]

    def _columns(self, e: dict[str, Any]) -> Columns:
        if e["path"] not in self._read:
            chunks = -(-e["n"] // self.chunk_size)
            self._read[e["path"]] = read_chunks(self.root / e["path"], chunks)
        return self._read[e["path"]]


def budgets(experiment: Experiment) -> list[tuple[str, float]]:
    """(norm, eps) at which a worst case is told: the attacks' own, and the usual one of a norm that a minimal-norm attack has."""
    usual = usual_budgets(experiment.data.channels, experiment.data.image_size)
    found: dict[tuple[str, float], None] = {}
    for text in experiment.evaluation.attacks:
        spec = AttackSpec.parse(text)
        assert spec.norm is not None
        if spec.name == "noise":
            continue
        for eps in usual.get(spec.norm, ()) if spec.eps is None else (spec.eps,):
            found[spec.norm, eps] = None
    return sorted(found)


def worst_cases(models: Iterable[str], experiment: Experiment, judgements: Judgements) -> list[dict[str, Any]]:
    """Accuracy when, for every sample, the most harmful example of all attacks counts whose norm is within the budget.

    Returns:
        For each model and budget {model, threat_model, norm, eps, n, accuracy, accuracy_low, accuracy_high, attacks}: "white_box"
        over what was made on the model itself (with or without gradients), "any" over transferred examples too.
    """
    out = []
    for model in models:
        for norm, eps in budgets(experiment):
            for threat in (WHITE_BOX, ANY):
                robust, attacks = _withstands(model, norm, eps, threat, judgements)
                if robust is None:
                    continue
                low, high = wilson_interval(int(robust.sum()), len(robust))
                out.append(
                    {
                        "model": model,
                        "threat_model": threat,
                        "norm": norm,
                        "eps": eps,
                        "n": len(robust),
                        "accuracy": float(robust.mean()),
                        "accuracy_low": low,
                        "accuracy_high": high,
                        "attacks": attacks,
                    }
                )
    return out


def paired_worst_cases(
    pairs: Iterable[tuple[str, str]], experiment: Experiment, judgements: Judgements
) -> list[dict[str, Any]]:
    """Whether one model withstands more samples than another in the worst case (exact McNemar test over the samples).

    Args:
        pairs: (model, the one that it is compared with), both of the run.

    Returns:
        {model, against, threat_model, norm, eps, n, only_model, only_against, p} for each pair, budget and threat model that
        both have.
    """
    out = []
    for model, against in pairs:
        for norm, eps in budgets(experiment):
            for threat in (WHITE_BOX, ANY):
                first, second = (_withstands(m, norm, eps, threat, judgements)[0] for m in (model, against))
                if first is None or second is None:
                    continue
                out.append(
                    {
                        "model": model,
                        "against": against,
                        "threat_model": threat,
                        "norm": norm,
                        "eps": eps,
                        "n": len(first),
                        "only_model": int((first & ~second).sum()),
                        "only_against": int((second & ~first).sum()),
                        "p": mcnemar(first, second),
                    }
                )
    return out


def _withstands(
    model: str, norm: str, eps: float, threat: str, judgements: Judgements
) -> tuple[np.ndarray[Any, Any] | None, int]:
    """Bool [N]: the samples that no example of a threat model breaks, and over how many evaluations; None where there is none."""
    judged = judgements.of(model)
    taken = [(e, c) for e, c in judged if threat == ANY or e["threat_model"] in DIRECT]
    if not taken or (threat == ANY and all(e["threat_model"] in DIRECT for e, _ in taken)):
        return None, 0
    # transfer and transfer:NAME may be the same examples on the same model, judged once
    return worst_case([c for _, c in taken], norm, eps), len({e["path"] for e, _ in taken})


def reliability(
    models: Sequence[Model],
    test: shards.ShardSet,
    experiment: Experiment,
    root: Storage,
    judgements: Judgements,
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
    jobs = {m.name: _jobs(m, test, experiment, root, judgements.of(m.name), images) for m in models}
    todo = {job["file"]: job for per_model in jobs.values() for job in per_model if not root.exists(job["file"])}
    total = done = len({job["file"] for per_model in jobs.values() for job in per_model})
    done -= len(todo)

    def tell(note: str = "") -> None:
        if progress is not None:
            progress(done, total, f"reliability tests{note}")

    tell()
    work = ((job, f", {job['attack'] or 'probe'} on {job['name']}") for job in todo.values())
    for note in attack.run_tasks(
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


def _jobs(
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
    basis, out = attack.job_basis(experiment, root, test), []
    for text, norm, eps in wanted:
        bfloat16 = bool(text) and attack.in_bfloat16(text, experiment.evaluation)
        name = AttackSpec.parse(text).name if text else "pgd"  # the probe runs PGD
        said = [
            CODE_VERSION,
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
            *(["l2_norms"] if norm == "l2" and name in attack.FOLLOW_L2_GRADIENTS else []),
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
    attack.prepare_task(job)
    _, images, labels = attack.load_images(job, 0, job["images"])
    model = attack.load_model(job["root"], job["model"], job["device"])
    fast = None
    if job["attack"]:
        fast = attack.load_stand_in(job["root"], job["model"], job["device"], images.shape[1:], job["bfloat16"])

    def attempt(micro_batches: list[slice]) -> dict[str, Any]:
        batch = micro_batches[0].stop
        generator = torch.Generator().manual_seed(stream_seed(job["seed"], job["images"]))
        torch.manual_seed(attack.named_seed(job["seed"], 0, job["file"]))
        if job["attack"]:
            spec = AttackSpec.parse(job["attack"])
            return active_test(model, images, spec, eps=job["eps"], fast=fast, generator=generator, batch=batch)
        return probe(model, images, labels, eps=job["eps"], norm=job["norm"], generator=generator, batch=batch)

    # a probe of all images, or all points of an active test, at once
    most = max(job["images"], POINTS_AT_ONCE)
    found, micro_batch = attack.as_memory_allows(most, attempt, f"the reliability of {job['name']} on")
    if micro_batch:
        found["micro_batch"] = micro_batch
    Storage(job["root"]).write_json(job["file"], found)
