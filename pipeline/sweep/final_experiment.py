"""The experiment that tests a sweep's choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.evaluation.metrics import standard_eps
from components.fields import parse_spec, replace_typed
from components.search_space import Point
from components.threat_models import BLACK_BOX, TRANSFER, WHITE_BOX, split_threat_model
from pipeline.recipes.suites import full_suite


def final_experiment(
    experiment: Experiment, model: str, point: Point, suite: Literal["full", "recipe"] = "full"
) -> Experiment:
    """Return the evaluation of the choice beside an undefended network and its control.

    Beside Defend++ on adversarial examples stands the same training without the auto-encoder, too.
    Images and chunks are the recipe's.

    Args:
        model: the recipe's name of the model that was varied.
        suite: the attacks and threat models. ``full``: :func:`pipeline.recipes.suites.full_suite`
            at the budget of the recipe's first attack that has one, else at the field's standard.
            ``recipe``: the recipe's own.
    """
    texts = {parse_spec(text)[0]: text for text in experiment.models}
    name, fields = parse_spec(texts[model])
    best = "best:" + ",".join(f"{k}={v}" for k, v in {**fields, **_as_text(point)}.items())
    models = experiment.first_replicates()
    chosen = replace_typed(models[name], _as_text(point), "space")
    undefended = [
        texts[n]
        for n, c in models.items()
        # A choice without a defense may be the recipe's undefended model, then no control of it.
        if c.defense == "none"
        and (c.arch, c.width) == (chosen.arch, chosen.width)
        and c.canonical() != chosen.canonical()
    ][:2]
    taken = {models[_name_of(text)].seed for text in undefended}
    taken |= {chosen.seed} if chosen.defense == "none" else set()
    free = (seed for seed in range(3) if seed not in taken)
    names = (n for n in ("no_defense", "control") if n not in map(_name_of, undefended))
    while len(undefended) < 2:
        undefended.append(f"{next(names)}:defense=none,seed={next(free)},arch={chosen.arch},width={chosen.width}")
    beside = [*undefended]
    if chosen.on_examples and chosen.defense == "defend++":
        same = {**fields, **_as_text(point), "defense": "adversarial"}
        same.pop("adversarial_training", None)
        beside.append("adversarial:" + ",".join(f"{k}={v}" for k, v in same.items()))
    names_left = {*map(_name_of, beside), "best", "*"}
    evaluation = experiment.evaluation
    if suite == "full":
        evaluation = replace(
            evaluation, attacks=_full_suite(experiment), threat_models=(WHITE_BOX, BLACK_BOX, TRANSFER)
        )
    threats = [t for t in evaluation.threat_models if split_threat_model(t)[1] in ("", *names_left)]
    source = evaluation.transfer_source
    return replace(
        experiment,
        name=f"{experiment.name}-best",
        description=f"{experiment.name}: the configuration that a sweep chose, beside undefended and control",
        models=(*beside, best),
        evaluation=replace(
            evaluation,
            threat_models=tuple(threats) or (WHITE_BOX,),
            transfer_source=source if source in names_left else "",
        ),
        figures=(),
        paper="",
        scale="",
        allow_diverged=False,
        register=False,  # The sweep registers its choice.
    )


def _full_suite(experiment: Experiment) -> tuple[str, ...]:
    data = experiment.data
    specs = map(AttackSpec.parse, experiment.evaluation.attacks)
    standard = standard_eps(data.channels, data.image_size, "linf"), "linf"
    eps, norm = next(((s.eps, str(s.norm)) for s in specs if s.eps is not None), standard)
    return full_suite(f"{eps}", norm, data.channels)


def _as_text(point: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in point.items()}


def _name_of(text: str) -> str:
    return parse_spec(text)[0]
