"""Content addresses of examples and of judgements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig
from components.fields import content_hash
from pipeline.evaluation.plan import Evaluation, Model

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


@dataclass(kw_only=True)
class ExampleSet:
    """A set of examples and who is to judge it."""

    address: str
    source: Model | None
    attack: str
    stop_on_success: bool
    bfloat16: bool
    judges: dict[str, Model] = field(default_factory=dict)
    """Address of the judged records -> the model that judges."""


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


def example_sets(
    evaluations: Sequence[Evaluation], test_address: str, ends_within_a_chunk: int, evaluation: EvaluationConfig
) -> tuple[list[ExampleSet], dict[Evaluation, tuple[str, str]]]:
    sets: dict[str, ExampleSet] = {}
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
            e.stop_on_success,
            test_address,
            ends_within_a_chunk,
            evaluation.chunk_size,
            evaluation.seed,
            *([evaluation.search_precision] if bfloat16 else []),
        )
        judged = f"judged/{content_hash(CODE_VERSION, key, e.model.identity)}"
        one = sets.setdefault(
            key,
            ExampleSet(
                address=f"examples/{key}",
                source=e.source,
                attack=e.attack,
                stop_on_success=e.stop_on_success,
                bfloat16=bfloat16,
            ),
        )
        one.judges[judged] = e.model
        addresses[e] = (one.address, judged)
    return list(sets.values()), addresses
