"""Which attack meets which model under which threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.attacks.spec import AttackSpec
from components.config import Experiment
from components.threat_models import BLACK_BOX, CLEAN, EVERY_SOURCE, GREY_BOX, RANDOM, WHITE_BOX


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained model as attacks see it: its name in the run, its address and the checksum of its weights."""

    name: str
    path: str
    sha256: str
    autoencoder: str = ""
    """Checksum of the auto-encoder beside it, or empty."""
    classifier: Model | None = None
    """What stands behind it, where it is a reformer."""

    @property
    def identity(self) -> str:
        """Names the weights of all its parts."""
        return self.sha256 if self.classifier is None else f"{self.sha256}+{self.classifier.sha256}"

    @property
    def address(self) -> str:
        """What a task loads: a path, or the reformer's and the classifier's with a plus between."""
        return self.path if self.classifier is None else f"{self.path}+{self.classifier.path}"

    @property
    def weights(self) -> str:
        """:attr:`address` with the checksum of the weights behind each path and a # between, for :func:`load_model`."""
        own = f"{self.path}#{self.sha256}"
        return own if self.classifier is None else f"{own}+{self.classifier.weights}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One cell of a table: examples of ``attack`` made on ``source``, judged on ``model``."""

    model: Model
    source: Model | None
    """None: the examples do not depend on a model (clean images, noise)."""
    threat_model: str
    attack: str
    """Attack spec; "none" for clean images."""
    stop_on_success: bool = False


def plan_evaluations(models: Sequence[Model], experiment: Experiment) -> list[Evaluation]:
    """Every evaluation of an experiment, table order.

    White-box examples are judged on the very model they were made on, so there a broken sample may leave its batch. Examples
    that another model will judge run all their steps: leaving early, they would stop just over the border of the model
    they were made on and hardly transfer (docs/evaluation.md; tests/components/attacks/test_gradient_attacks.py shows it).
    """
    by_name = {m.name: m for m in models}
    specs = [AttackSpec.parse(text) for text in experiment.evaluation.attacks]
    out = []
    for model in models:
        out.append(Evaluation(model=model, source=None, threat_model=CLEAN, attack="none"))
        for spec in specs:
            if spec.name == "noise":  # the floor: no model, no attacker
                out.append(Evaluation(model=model, source=None, threat_model=RANDOM, attack=str(spec)))
        for source, threat in _sources(model, by_name, experiment):
            for spec in specs:
                if _applies(spec, source, threat):
                    early = spec.can_stop_on_success and source == model
                    out.append(
                        Evaluation(
                            model=model, source=source, threat_model=threat, attack=str(spec), stop_on_success=early
                        )
                    )
    return out


def _sources(model: Model, by_name: dict[str, Model], experiment: Experiment) -> list[tuple[Model, str]]:
    """The models on which examples for ``model`` are made, each with what the threat model is called.

    ``transfer:*`` comes last, and adds the sources that no other threat model has.
    """
    found: dict[tuple[Model, str], None] = {}
    for threat in sorted(experiment.evaluation.threat_models, key=lambda threat: threat == EVERY_SOURCE):
        every = threat == EVERY_SOURCE
        taken = {source for source, _ in found} if every else set()
        for one in [f"transfer:{base}" for base in experiment.first_replicates()] if every else [threat]:
            source, said = _source(model, one, by_name, experiment)
            if source is not None and source not in taken:
                found[source, said] = None
    return list(found)


def _applies(spec: AttackSpec, source: Model, threat: str) -> bool:
    """Whether an attack belongs to a threat model: one that reads scores alone is black-box, one whose examples mean nothing to
    another model is not transferred, and an adaptive one needs the auto-encoder of the model that it knows."""
    if spec.name == "noise":
        return False
    if threat == BLACK_BOX:
        return not spec.needs_gradients
    if not spec.needs_gradients:
        return False
    if spec.name == "adaptive":
        return threat == WHITE_BOX and bool(source.autoencoder)
    return threat == WHITE_BOX or not spec.judged_on_source_only


def _source(model: Model, threat: str, by_name: dict[str, Model], experiment: Experiment) -> tuple[Model | None, str]:
    """The model on which a threat model's examples are made (None: it does not apply), and what the threat model is called."""
    if threat in (WHITE_BOX, BLACK_BOX):
        return model, threat
    base = threat.partition(":")[2]
    source = by_name.get(experiment.transfer_source_of(model.name, base) or "")
    if source is not None and source == model.classifier:
        return source, GREY_BOX  # the attacker knows the classifier, not the reformer in front of it
    return source, threat
