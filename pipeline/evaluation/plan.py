"""Plan of an evaluation: which attack meets which model under which threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.threat_models import (
    BLACK_BOX,
    CLEAN,
    EVERY_SOURCE,
    GREY_BOX,
    RANDOM,
    WHITE_BOX,
    split_threat_model,
    transfer_from,
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model as attacks see it: name in the run, address, and checksum of its weights."""

    name: str
    path: str
    sha256: str
    autoencoder: str = ""
    """Checksum of the model's auto-encoder, or empty."""
    classifier: Model | None = None
    """Classifier behind a reformer; None for any other model."""

    @property
    def identity(self) -> str:
        """Checksums of the weights of all its parts."""
        return self.sha256 if self.classifier is None else f"{self.sha256}+{self.classifier.sha256}"

    @property
    def address(self) -> str:
        """Path of the model, or the paths of reformer and classifier with a plus between them."""
        return self.path if self.classifier is None else f"{self.path}+{self.classifier.path}"

    @property
    def weights(self) -> str:
        """:attr:`address` with #CHECKSUM behind each path, as a task loads it."""
        own = f"{self.path}#{self.sha256}"
        return own if self.classifier is None else f"{own}+{self.classifier.weights}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One cell of a table: examples of ``attack`` made on ``source``, judged on ``model``."""

    model: Model
    source: Model | None
    """None if the examples do not depend on a model (clean images, noise)."""
    threat_model: str
    attack: str
    """Attack spec; "none" for clean images."""
    stop_on_success: bool = False


def plan_evaluations(models: Sequence[Model], experiment: Experiment) -> list[Evaluation]:
    """List every evaluation of an experiment, in table order.

    White-box examples are judged on the model they were made on. There an attack may drop a sample
    once it is misclassified. Examples for another model run all their steps: an example that stops
    just over the decision boundary of its source hardly transfers (docs/evaluation.md).
    """
    by_name = {m.name: m for m in models}
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    evaluations = []
    for model in models:
        evaluations.append(Evaluation(model=model, source=None, threat_model=CLEAN, attack="none"))
        for spec in specs:
            if spec.name == "noise":
                evaluations.append(Evaluation(model=model, source=None, threat_model=RANDOM, attack=str(spec)))
        for source, threat_model in _sources(model, by_name, experiment):
            evaluations += [
                Evaluation(
                    model=model,
                    source=source,
                    threat_model=threat_model,
                    attack=str(spec),
                    stop_on_success=spec.can_stop_on_success and source == model,
                )
                for spec in specs
                if _applies(spec, source, threat_model)
            ]
    return evaluations


def _sources(model: Model, by_name: dict[str, Model], experiment: Experiment) -> list[tuple[Model, str]]:
    """List the models on which examples for ``model`` are made, each with its threat model.

    ``transfer:*`` comes last and adds the sources that no other threat model has.
    """
    sources: dict[tuple[Model, str], None] = {}
    for threat_model in sorted(experiment.evaluation.threat_models, key=lambda name: name == EVERY_SOURCE):
        every = threat_model == EVERY_SOURCE
        present = {source for source, _ in sources} if every else set()
        names = map(transfer_from, experiment.first_replicates()) if every else [threat_model]
        for name in names:
            source, recorded_name = _source(model, name, by_name, experiment)
            if source is not None and source not in present:
                sources[source, recorded_name] = None
    return list(sources)


def _applies(spec: AttackSpec, source: Model, threat_model: str) -> bool:
    """Tell whether an attack belongs to a threat model.

    Attacks without gradients are black-box. Some examples are meaningful only on their source and
    are not transferred. The adaptive attack needs the auto-encoder of the model that it knows.
    """
    if spec.name == "noise":
        return False
    if threat_model == BLACK_BOX:
        return not spec.needs_gradients
    if not spec.needs_gradients:
        return False
    if spec.name == "adaptive":
        return threat_model == WHITE_BOX and bool(source.autoencoder)
    return threat_model == WHITE_BOX or not spec.judged_on_source_only


def _source(
    model: Model, threat_model: str, by_name: dict[str, Model], experiment: Experiment
) -> tuple[Model | None, str]:
    """Return the source of a threat model's examples and the threat model's name in the records.

    The source is None if the threat model does not apply to ``model``.
    """
    if threat_model in (WHITE_BOX, BLACK_BOX):
        return model, threat_model
    _, base = split_threat_model(threat_model)
    source = by_name.get(experiment.transfer_source_of(model.name, base) or "")
    if source is not None and source == model.classifier:
        return source, GREY_BOX
    return source, threat_model
