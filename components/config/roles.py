"""The role of each model of an experiment, and the models that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from components.config.experiment import Experiment
from components.config.train import TrainConfig


def first_replicates(names: Iterable[str], bases: Mapping[str, str]) -> list[str]:
    """Return the first of ``names`` for each model of the recipe.

    Args:
        names: models.
        bases: model -> name in the recipe.
    """
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(bases[name], name)
    return list(first.values())


def roles_of(experiment: Experiment) -> dict[str, str]:
    """Return model -> source, control, defended or given (not trained here), in config order."""
    configs = experiment.model_configs()
    sources = {experiment.transfer_source_of(name) for name in configs}

    def role(name: str, config: TrainConfig) -> str:
        if config.defense != "none":
            return "defended"
        if name in sources:
            return "source"
        return "control" if config.epochs else "given"

    return {name: role(name, config) for name, config in configs.items()}


def without_autoencoder(experiment: Experiment) -> dict[str, str]:
    """Return Defend++ on examples -> the same adversarial training without the auto-encoder.

    Both are names in the recipe. It is the control of that model: only the auto-encoder differs.
    """
    configs = experiment.first_replicates()
    adversarial = {config.canonical(): base for base, config in configs.items() if config.defense == "adversarial"}
    pairs = {}
    for base, config in configs.items():
        if config.defense == "defend++" and config.on_examples:
            bare = dataclasses.replace(config, defense="adversarial").canonical()
            if bare in adversarial:
                pairs[base] = adversarial[bare]
    return pairs


def references(experiment: Experiment) -> list[str]:
    """Return the models, as named in the recipe, that all others are compared with.

    For each architecture, these are the first control, the models of :func:`without_autoencoder`,
    and the model that the paper calls ours: ``defend``, or ``defend-ARCH`` where a table has
    several. If no model has that name, it is the first Defend++, or the first defended model, but
    none beside models of :func:`without_autoencoder`.
    """
    roles = roles_of(experiment)
    role = {base: roles[name] for name, base in experiment.base_names().items()}
    configs = experiment.first_replicates()
    bare = without_autoencoder(experiment)
    references = []
    for arch in dict.fromkeys(config.arch for config in configs.values()):
        models = [base for base, config in configs.items() if config.arch == arch]
        defended = [base for base in models if role[base] == "defended"]
        ours = [base for base in defended if configs[base].defense == "defend++"]
        named = [base for base in ours if base.partition("-")[0] == "defend"]
        references += [base for base in models if role[base] == "control"][:1]
        controls = list(dict.fromkeys(bare[base] for base in models if base in bare))
        references += controls + (named if controls else named or ours or defended)[:1]
    return references


def pairs(experiment: Experiment) -> list[tuple[str, str]]:
    """Return (model, reference) for each model and the :func:`references` of its architecture.

    Both are of the same replicate.
    """
    configs, replicates = experiment.model_configs(), experiment.replicates()
    names = {replicate: name for name, replicate in replicates.items()}
    compared = references(experiment)
    pairs = []
    for i, reference in enumerate(compared):
        for name, (base, replicate) in replicates.items():
            against = names[reference, replicate]
            # A pair of references is compared once.
            if base not in compared[: i + 1] and configs[name].arch == configs[against].arch:
                pairs.append((name, against))
    return pairs
