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


def _roles_of_bases(experiment: Experiment) -> dict[str, str]:
    bases = experiment.base_names()
    return {bases[name]: role for name, role in roles_of(experiment).items()}


def control_of(experiment: Experiment) -> dict[str, str]:
    """Return each defended model -> its control, both as named in the recipe.

    A control differs from its model by the defense alone, as far as the recipe has one like that:

    - Defend++ on adversarial examples: the same adversarial training without the auto-encoder.
    - otherwise: the undefended model of the same training and seed, or else the first undefended
      control of the architecture.

    A model without either has no entry.
    """
    configs = experiment.first_replicates()
    role = _roles_of_bases(experiment)
    same: dict[TrainConfig, str] = {}
    for base, config in configs.items():
        if config.defense == "adversarial" or role[base] == "control":
            same.setdefault(config.canonical(), base)
    controls = {}
    for base, config in configs.items():
        if role[base] != "defended":
            continue
        equal = None
        if config.defense == "defend++":
            bare = dataclasses.replace(config, defense="adversarial" if config.on_examples else "none")
            equal = bare.canonical()
        of_arch = [b for b, c in configs.items() if role[b] == "control" and c.arch == config.arch]
        found = [same[equal]] if equal in same else of_arch
        if found:
            controls[base] = found[0]
    return controls


def references(experiment: Experiment) -> list[str]:
    """Return the models, as named in the recipe, that all others are compared with.

    For each architecture, these are its controls (:func:`control_of`) and the model that the paper
    calls ours: ``defend``, or ``defend-ARCH`` where a table has several. If no model has that name,
    it is the first Defend++, or the first defended model. Where a defended model is itself a
    control, no such model is added.
    """
    role = _roles_of_bases(experiment)
    controls, configs = control_of(experiment), experiment.first_replicates()
    references: list[str] = []
    for arch in dict.fromkeys(config.arch for config in configs.values()):
        models = [base for base, config in configs.items() if config.arch == arch]
        defended = [base for base in models if role[base] == "defended"]
        ours = [base for base in defended if configs[base].defense == "defend++"]
        named = [base for base in ours if base.partition("-")[0] == "defend"]
        used = [controls[base] for base in models if base in controls]
        used += [base for base in models if role[base] == "control"][:1]
        first = named if any(role[base] == "defended" for base in used) else named or ours or defended
        references += dict.fromkeys([*used, *first[:1]])
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
