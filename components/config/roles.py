"""The part that each model of an experiment plays: source, control, defended or external."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from components.config.experiment import Experiment
from components.config.train import TrainConfig


def first_replicates(names: Iterable[str], bases: Mapping[str, str]) -> list[str]:
    """Of each model as the recipe names it, the first replicate in ``names``. ``bases``: model -> name in the recipe."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(bases[name], name)
    return list(first.values())


def roles_of(experiment: Experiment) -> dict[str, str]:
    """Model -> source, control, defended or given (not trained here), in the order of the config."""
    variants = experiment.model_configs()
    sources = {experiment.transfer_source_of(name) for name in variants}

    def role(name: str, config: TrainConfig) -> str:
        if config.defense != "none":
            return "defended"
        if name in sources:
            return "source"
        return "control" if config.epochs else "given"

    return {name: role(name, config) for name, config in variants.items()}


def references(experiment: Experiment) -> list[str]:
    """Models that others of their architecture are compared with, as named in the recipe: of each architecture the first
    control, and what the paper calls ours (``defend``, or ``defend-ARCH`` where a table has several); where no model is named
    so, the first Defend++, or the first defended one."""
    roles = roles_of(experiment)
    role = {base: roles[name] for name, base in experiment.base_names().items()}
    firsts = experiment.first_replicates()
    out = []
    for arch in dict.fromkeys(config.arch for config in firsts.values()):
        here = [base for base, config in firsts.items() if config.arch == arch]
        defended = [base for base in here if role[base] == "defended"]
        ours = [base for base in defended if firsts[base].defense == "defend++"]
        named = [base for base in ours if base.partition("-")[0] == "defend"]
        out += [base for base in here if role[base] == "control"][:1]
        out += (named or ours or defended)[:1]
    return out


def pairs(experiment: Experiment) -> list[tuple[str, str]]:
    """(model, what it is compared with): each model and the :func:`references` of its architecture, of the same replicate."""
    variants, replicates = experiment.model_configs(), experiment.replicates()
    named = {found: name for name, found in replicates.items()}
    compared = references(experiment)
    out = []
    for i, reference in enumerate(compared):
        for name, (base, replicate) in replicates.items():
            against = named[reference, replicate]
            # a pair of references is told once
            if base not in compared[: i + 1] and variants[name].arch == variants[against].arch:
                out.append((name, against))
    return out
