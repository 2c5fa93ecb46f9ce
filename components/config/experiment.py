"""Settings of an experiment: models, attacks, scaling and storage."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Literal

from components.attacks.spec import AttackSpec
from components.config.data import DataConfig, PyramidConfig, level_sizes
from components.config.train import TrainConfig
from components.errors import ConfigError, did_you_mean
from components.fields import AT_LEAST_1, Rule, check, check_choice, check_name, check_values, parse_spec, replace_typed
from components.threat_models import BLACK_BOX, TRANSFER, WHITE_BOX, split_threat_model

FIGURES = ("fig2", "fig5", "fig6", "fig7", "fig8")
PRINTED_IN = (*(f"table{i}" for i in range(1, 9)), "sec4.2", "sec4.3", "sec4.5")
"""Tables and sections of the paper that print numbers."""
SEED_STRIDE = 1000
"""Distance between the seeds of two replicates of a model: far more than a recipe has models."""

_EVALUATION_RULES: dict[str, Rule] = {
    "attacks": (bool, "at least one attack, e.g. pgd:eps=0.2"),
    "threat_models": (lambda v: len(set(v)) == len(v) > 0, "at least one threat model, and each of them once"),
    "test_images": (lambda v: v >= 0, "0 (all) or more"),
    "chunk_size": AT_LEAST_1,
    "reliability_images": (lambda v: v >= 0, "0 (no such test) or more"),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of the attacks. Every accuracy that this project reports names its threat model."""

    attacks: tuple[str, ...] = (
        "noise:eps=0.2",
        "fgsm:eps=0.2",
        "bim:eps=0.2,steps=100",
        "pgd:eps=0.2,steps=100",
        "cw",
        "ddn:steps=100",
    )
    """Attack specs, NAME or NAME:FIELD=VALUE,... (see components/attacks/spec.py)."""
    threat_models: tuple[str, ...] = (WHITE_BOX, TRANSFER)
    """white_box: examples made on the model under test itself. black_box: the same from its scores
    alone (attacks that need no gradients). transfer: made on transfer_source; called grey_box for a
    model with a reformer in front of that source. transfer:NAME: made on the model NAME.
    transfer:*: made on each model in turn, without the sources that transfer has already."""
    transfer_source: str = ""
    """Undefended model on which transferred examples are made. Empty: for each model, the first
    undefended one of the same architecture and width."""
    test_images: int = 0
    """Number of attacked test images, drawn from the whole test split by data.subset_seed. 0:
    all."""
    chunk_size: int = 50
    """Images per chunk, the unit of random stream, record and resumption. It changes the
    results."""
    seed: int = 0
    """Seed of the attacks' random streams."""
    search_precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: BIM, PGD and adaptive search on a bfloat16 copy of the network, which is faster on
    hardware with such arithmetic. Every verdict is float32. It changes the results
    (docs/evaluation.md)."""
    reliability_images: int = 32
    """Attacked images that the reliability probe and the active tests use (docs/reliability.md). 0:
    none of them is run."""

    def __post_init__(self) -> None:
        check_values(self, "evaluation", _EVALUATION_RULES)
        texts: dict[str, str] = {}
        for attack in self.attacks:
            canonical = str(AttackSpec.parse(attack))
            if canonical in texts:
                raise ConfigError(
                    f"evaluation.attacks must have each attack once; {texts[canonical]} and {attack} "
                    f"are both {canonical}: leave one out"
                )
            texts[canonical] = attack
        for threat_model in self.threat_models:
            kind, source = split_threat_model(threat_model)
            check(
                threat_model in (WHITE_BOX, BLACK_BOX, TRANSFER) or (kind == TRANSFER and source != ""),
                "evaluation.threat_models",
                threat_model,
                "one of white_box, black_box, transfer, transfer:NAME and transfer:*"
                + did_you_mean(threat_model, (WHITE_BOX, BLACK_BOX, TRANSFER)),
            )


_SCALING_RULES: dict[str, Rule] = {
    "workers": AT_LEAST_1,
    "cpus_per_worker": (lambda v: 0 < v < math.inf, "above 0"),
    "threads_per_worker": AT_LEAST_1,
    "cpus_per_attack": (lambda v: 0 < v < math.inf, "above 0"),
    "gpus_per_attack": (lambda v: 0 <= v < math.inf, "0 or more"),
    "chunks_per_attack": AT_LEAST_1,
    "parallel_models": (lambda v: v >= 0, "0 (room decides) or more"),
    "wait_s": (lambda v: 0 <= v < math.inf, "0 or more seconds"),
    "max_failures": (lambda v: v >= 0, "0 or more"),
}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Resources of the cluster that a run may use.

    Only ``workers`` changes a result, since batch norm is per worker.
    """

    workers: int = 1
    """Data-parallel training workers (DDP ranks)."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that Ray reserves for a training worker."""
    threads_per_worker: int = 1
    """PyTorch threads of a training worker and of an attack task."""
    gpu: bool = False
    """Give each training worker one GPU (NCCL); otherwise CPU (gloo)."""
    cpus_per_attack: float = 1.0
    """Logical CPUs that Ray reserves for an attack task."""
    gpus_per_attack: float = 0.0
    """GPUs, or a fraction of one, that Ray reserves for an attack task. 0: attacks run on the
    CPU."""
    chunks_per_attack: int = 1
    """Chunks that one attack task computes one after the other. More chunks mean fewer task
    starts."""
    parallel_models: int = 0
    """Models trained side by side, each on its own workers. 0: as many as the cluster has room
    for."""
    wait_s: float = 0.0
    """Seconds to wait for nodes that the run needs, on a cluster that grows."""
    max_failures: int = 3
    """How often a training run restarts from its last checkpoint after a worker or node died."""

    def __post_init__(self) -> None:
        check_values(self, "scaling", _SCALING_RULES)


_EXPERIMENT_RULES: dict[str, Rule] = {
    "models": (bool, "at least one model, e.g. --models undefended:defense=none"),
    "seeds": AT_LEAST_1,
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings of a complete run: data, targets, models, attacks, resources and storage."""

    name: str
    """Name of the recipe and of the MLflow parent run."""
    description: str = ""
    """One line that says what the experiment shows."""
    data: DataConfig = field(default_factory=DataConfig)
    pyramids: PyramidConfig = field(default_factory=PyramidConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings that all models have in common."""
    models: tuple[str, ...] = (
        "no_defense:defense=none,seed=0",
        "control:defense=none,seed=1",
        "defend:defense=defend++,seed=1",
    )
    """The models, NAME or NAME:FIELD=VALUE,... with fields of train."""
    seeds: int = 1
    """Number of replicates of each model, with seeds that are 1000 apart. With several, the report
    gives mean and spread."""
    allow_diverged: bool = False
    """Continue without a model whose loss was not finite, which the report says, instead of
    stopping before the attacks."""
    paper: str = ""
    """Table of the paper (table1 ... table8) whose values the report shows beside the run's. Its
    rows are the names of the models."""
    figures: tuple[str, ...] = ()
    """Figures of the paper that the report draws from this run: fig2, fig5, fig6, fig7, fig8."""
    scale: str = ""
    """Scale of a table's recipe: smoke, slim, fast or paper. The report shows it beside the
    numbers."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    storage: str = "~/defendpp"
    """Storage of shards, models and records: an absolute path or a URI (s3://bucket/path) that
    every node reaches."""
    tracking_uri: str = ""
    """MLflow server (http://...) or database (sqlite:///...). Empty: $MLFLOW_TRACKING_URI, or
    mlflow.db in a local storage."""
    experiment_name: str = ""
    """MLflow experiment that the run is published in. Empty: $MLFLOW_EXPERIMENT_NAME, or
    defendpp."""
    register: bool = False
    """Make the models versions of registered models in MLflow, RECIPE-MODEL; of a sweep, the choice
    as RECIPE-SPACE."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_values(self, "", _EXPERIMENT_RULES)
        check_choice(self.paper, ("", *PRINTED_IN), "paper")
        for figure in self.figures:
            check_choice(figure, FIGURES, "figures")
        for attack in self.evaluation.attacks:
            AttackSpec.parse(attack).check_fits(self.data.channels, self.data.image_size)
        for name, config in self.model_configs().items():
            self._check_model(name, config)
        self._check_seeds()
        self._check_sources()
        self._check_threat_models()

    def _check_model(self, name: str, config: TrainConfig) -> None:
        """Check the fields of one model against data and scaling."""
        longest = math.sqrt(self.data.channels) * self.data.image_size
        # PyTorch 2.14.1 on an AVX2 processor writes outside its memory in this format: in the
        # weight gradient of a stride-2 1x1 convolution, which every ResNet has. bfloat16, the plain
        # format and GPUs do not.
        corrupts_memory = config.channels_last and config.precision == "float32" and not self.scaling.gpu
        channels = self.data.channels
        rules: dict[str, tuple[bool, str]] = {
            "adversarial_max_norm": (
                config.adversarial_max_norm <= longest,
                f"at most {longest:.4g}, the longest L2 perturbation of these images in [0,1]",
            ),
            "normalize_mean": (
                len(config.normalize_mean) in (0, channels),
                f"one value per channel ({channels})",
            ),
            "channels_last": (
                not corrupts_memory,
                "False in float32 on a CPU, where PyTorch's channels-last gradients corrupt memory: "
                "use --train.precision bfloat16 or --scaling.gpu",
            ),
            "batch_size": (
                config.batch_size % self.scaling.workers == 0,
                f"a multiple of scaling.workers ({self.scaling.workers})",
            ),
            "epochs": (
                config.epochs > 0 or self.seeds == 1,
                "at least 1 where seeds is above 1: weights that are given have no other seed",
            ),
        }
        for setting, (ok, allowed) in rules.items():
            check(ok, f"models[{name}].{setting}", getattr(config, setting), allowed)
        levels = len(level_sizes(self.data.image_size, self.pyramids.levels))
        if config.defense == "defend++" and levels < 2:
            if self.pyramids.levels == 1:
                raise ConfigError.of("pyramids.levels", 1, "0 or at least 2 for Defend++")
            raise ConfigError.of(
                "data.image_size", self.data.image_size, "at least 14 pixels for Defend++ (two levels)"
            )

    def _check_sources(self) -> None:
        """Check that every model has the transfer source or the classifier that it needs."""
        threat_models, explicit = self.evaluation.threat_models, self.evaluation.transfer_source
        if explicit and TRANSFER in threat_models:
            undefended = {base for base, config in self.first_replicates().items() if config.defense == "none"}
            check(
                explicit in undefended,
                "evaluation.transfer_source",
                explicit,
                f"the name of an undefended model out of models ({', '.join(sorted(undefended)) or 'there is none'})"
                + did_you_mean(explicit, undefended),
            )
        bases = set(self.base_names().values())
        for threat_model in threat_models:
            _, base = split_threat_model(threat_model)
            check(
                base in ("", "*") or base in bases,
                "evaluation.threat_models",
                threat_model,
                f"transfer: and one of the models {', '.join(sorted(bases))}" + did_you_mean(base, bases),
            )
        for name, config in self.model_configs().items():
            needs_source = TRANSFER in threat_models or config.defense == "comdefend"
            if needs_source and config.defense != "none" and self.transfer_source_of(name) is None:
                raise ConfigError(
                    f"models: {name} needs an undefended model beside it, "
                    + ("which stands behind the reformer" if config.defense == "comdefend" else "for transfer")
                    + f": add one, e.g. undefended:defense=none,arch={config.arch},width={config.width}"
                )

    def _check_threat_models(self) -> None:
        """Refuse threat models if none of them attacks any model."""
        remedies = [self._remedy(threat_model) for threat_model in self.evaluation.threat_models]
        if all(remedies):
            raise ConfigError.of("evaluation.threat_models", ", ".join(self.evaluation.threat_models), remedies[0])

    def _remedy(self, threat_model: str) -> str:
        """Return what a threat model lacks to attack any model; empty if it lacks nothing."""
        kind, base = split_threat_model(threat_model)
        if kind == BLACK_BOX:
            specs = [AttackSpec.parse(attack) for attack in self.evaluation.attacks]
            if not any(not spec.needs_gradients and spec.name != "noise" for spec in specs):
                return (
                    "left out, or --evaluation.attacks must have an attack that needs no gradients, e.g. square:eps=0.2"
                )
        elif kind == TRANSFER:
            sources = set(self.base_names().values()) if base == "*" else {base}
            if not any(self.transfer_source_of(name, source) for name in self.model_configs() for source in sources):
                return "left out, or --models must have a second model to make the examples on"
        return ""

    def _check_seeds(self) -> None:
        """Refuse a control that is its own source, equal replicates, and an unused seed."""
        _check_twins(self.models, self.train, self.seeds)
        named = all("seed" in parse_spec(text)[1] for text in self.models)
        check(
            self.train.seed == 0 or not named,
            "train.seed",
            self.train.seed,
            "0 where each of models names a seed of its own, as the recipes' do: "
            "set it there (--models NAME:seed=7,...), or ask for replicates (--seeds N)",
        )

    def _expanded(self) -> dict[str, tuple[str, int, TrainConfig]]:
        return _expand(self.models, self.train, self.seeds)

    def model_configs(self) -> dict[str, TrainConfig]:
        """Return the training config of each model by name, in the order of ``models``.

        Names of replicates end in -s0, -s1, ...

        Raises:
            ConfigError: two models have one name, or a model has a field or value that ``train``
                lacks.
        """
        return {name: config for name, (_, _, config) in self._expanded().items()}

    def replicates(self) -> dict[str, tuple[str, int]]:
        """Return name of each model -> its name in ``models`` and the number of the replicate."""
        return {name: (base, replicate) for name, (base, replicate, _) in self._expanded().items()}

    def base_names(self) -> dict[str, str]:
        """Return name of each model -> its name in ``models``."""
        return {name: base for name, (base, _, _) in self._expanded().items()}

    @property
    def trains(self) -> bool:
        """Tell whether any model is trained. External models need only the test images."""
        return any(config.epochs for config in self.model_configs().values())

    def first_replicates(self) -> dict[str, TrainConfig]:
        """Return each name in ``models`` -> the config of its first replicate."""
        return {base: config for base, replicate, config in self._expanded().values() if replicate == 0}

    def transfer_source_of(self, name: str, base: str = "") -> str | None:
        """Return the source, of the same replicate, of examples that are transferred to a model.

        Args:
            base: a name in ``models``, as in ``transfer:NAME``. Empty: as
                ``evaluation.transfer_source``.

        Returns:
            The name of the source, or None if it is the model itself or there is none.
        """
        models = self._expanded()
        _, replicate, config = models[name]
        base = base or self.evaluation.transfer_source
        for other, (other_base, other_replicate, other_config) in models.items():
            if other_replicate != replicate:
                continue
            same_network = (other_config.arch, other_config.width) == (config.arch, config.width)
            if other_base == base or (not base and other_config.defense == "none" and same_network):
                return None if other == name else other
        return None


@functools.lru_cache(maxsize=64)
def _expand(models: tuple[str, ...], train: TrainConfig, seeds: int) -> dict[str, tuple[str, int, TrainConfig]]:
    """Return name of each model -> its name in ``models``, number of the replicate, and config.

    The dictionary is cached, so callers must not change it.
    """
    expanded: dict[str, tuple[str, int, TrainConfig]] = {}
    for text in models:
        base, overrides = parse_spec(text)
        config = replace_typed(train, overrides, f"models[{base}]")
        for replicate in range(seeds):
            name = base if seeds == 1 else f"{base}-s{replicate}"
            if name in expanded:
                raise ConfigError(f"models: two models have the name {name!r}: give each a name of its own")
            expanded[name] = base, replicate, dataclasses.replace(config, seed=config.seed + SEED_STRIDE * replicate)
    return expanded


@functools.lru_cache(maxsize=64)  # A report builds its experiment from the record many times.
def _check_twins(models: tuple[str, ...], train: TrainConfig, seeds: int) -> None:
    """Refuse one network under two names, which would count as two independent models.

    Two defended models of one replicate may be one network, which is then trained once.
    """
    seen: dict[TrainConfig, tuple[str, int]] = {}
    for name, (base, replicate, config) in _expand(models, train, seeds).items():
        twin, twin_replicate = seen.setdefault(config.canonical(), (name, replicate))
        if twin != name and (config.defense == "none" or replicate != twin_replicate):
            raise ConfigError(
                f"models: {name} is the same network as {twin}, which would count as an independent one; "
                + (
                    f"give models[{base}] another seed (replicates are {SEED_STRIDE} apart)"
                    if config.epochs
                    else "remove one of them: both are the weights of train.pretrained"
                )
            )
