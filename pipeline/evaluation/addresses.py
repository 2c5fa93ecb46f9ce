"""Content addresses of examples and of judgements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from components.attacks.spec import AttackSpec
from components.config import EvaluationConfig
from components.fields import content_hash
from pipeline.evaluation.plan import Evaluation, Model

ADDRESS_VERSION = 2
"""Part of every address here. Raise it when the same settings would give other results."""
UNDERFLOWED_IN_L2 = ("fgsm", "bim", "pgd", "ddn", "apgd", "apgd-t", "adaptive", "autoattack")
"""Attacks whose L2 steps once divided by a norm that underflowed. No new attack belongs here."""
ATTACK_VERSIONS = {
    ("noise", "l2"): 3,  # Noise is no longer shortened by clipping.
    ("autoattack", "linf"): 3,  # A sample's draws no longer depend on which samples remain.
    **{(name, "l2"): 4 for name in UNDERFLOWED_IN_L2},  # Gradients below 1e-19 do not underflow any more.
}
"""Versions, by attack and norm, of attacks whose own examples have changed."""
SEEDED_BY_NAME = 5
"""Version since which each attack that draws has its own random numbers in a chunk."""


@dataclass(kw_only=True)
class ExampleSet:
    """A set of examples and the models that judge it."""

    address: str
    source: Model | None
    attack: str
    stop_on_success: bool
    bfloat16: bool
    judges: dict[str, Model] = field(default_factory=dict)
    """Address of the judged records -> the model that judges."""


def searches_in_bfloat16(attack: str, evaluation: EvaluationConfig) -> bool:
    """Tell whether an attack's search runs in bfloat16. The probe ("") and clean images never do."""
    return (
        evaluation.search_precision == "bfloat16"
        and attack not in ("", "none")
        and AttackSpec.parse(attack).may_search_in_bfloat16
    )


def _attack_version(spec: AttackSpec) -> int:
    version = ATTACK_VERSIONS.get((spec.name, str(spec.norm)), ADDRESS_VERSION)
    return max(version, SEEDED_BY_NAME) if spec.draws else version


def example_sets(
    evaluations: Sequence[Evaluation], test_address: str, ends_within_a_chunk: int, config: EvaluationConfig
) -> tuple[list[ExampleSet], dict[Evaluation, tuple[str, str]]]:
    """Group evaluations by the examples that they judge.

    Args:
        ends_within_a_chunk: number of images if the last chunk is not full, else 0. Full chunks
            do not depend on the number of images, so an evaluation on more images reuses them.

    Returns:
        The sets, and for each evaluation the addresses of its examples and of its judgements.
    """
    sets: dict[str, ExampleSet] = {}
    addresses: dict[Evaluation, tuple[str, str]] = {}
    for e in evaluations:
        spec = None if e.attack == "none" else AttackSpec.parse(e.attack)
        source_identity = e.source.identity if e.source else None
        if e.source and spec and spec.name == "adaptive":
            source_identity = f"{source_identity}+{e.source.autoencoder}"
        bfloat16 = searches_in_bfloat16(e.attack, config)
        key = content_hash(
            _attack_version(spec) if spec else ADDRESS_VERSION,
            source_identity,
            e.attack,
            e.stop_on_success,
            test_address,
            ends_within_a_chunk,
            config.chunk_size,
            config.seed,
            *([config.search_precision] if bfloat16 else []),
        )
        examples = sets.setdefault(
            key,
            ExampleSet(
                address=f"examples/{key}",
                source=e.source,
                attack=e.attack,
                stop_on_success=e.stop_on_success,
                bfloat16=bfloat16,
            ),
        )
        judged = f"judged/{content_hash(ADDRESS_VERSION, key, e.model.identity)}"
        examples.judges[judged] = e.model
        addresses[e] = (examples.address, judged)
    return list(sets.values()), addresses
