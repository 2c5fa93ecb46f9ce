"""Settings of a whole experiment: its models, attacks, scaling and storage."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Literal

from components.config.data import DataConfig, PyramidConfig, level_sizes
from components.config.train import TrainConfig
from components.errors import ConfigError
from components.fields import check, check_name, check_values, parse_spec, replace_typed

FIGURES = ("fig2", "fig5", "fig6", "fig7", "fig8")
PRINTED_IN = (*(f"table{i}" for i in range(1, 9)), "sec4.2", "sec4.3", "sec4.5")
"""Where the paper prints numbers: its tables and three sections of its text."""
SEED_STRIDE = 1000
"""Between the seeds of two replicates of a model: far more than a recipe has models."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What attacks what. No accuracy leaves this project without its threat model."""

    attacks: tuple[str, ...] = (
        "noise:eps=0.2",
        "fgsm:eps=0.2",
        "bim:eps=0.2,steps=100",
        "pgd:eps=0.2,steps=100",
        "cw",
        "ddn:steps=100",
    )
    """Attack specs, NAME or NAME:FIELD=VALUE,... (see components/attacks/spec.py)."""
    threat_models: tuple[str, ...] = ("white_box", "transfer")
    """white_box: examples made on the very model under test. black_box: the same from its scores alone (the attacks that need no
    gradients). transfer: made on transfer_source (for a model behind a reformer whose classifier that is, it is called
    grey_box). transfer:NAME: made on the model NAME; transfer:*: on each of them in turn, but for what transfer has already."""
    transfer_source: str = ""
    """The undefended model on which transferred examples are made. Empty: for each model, the first undefended one of the same
    architecture and width."""
    test_images: int = 0
    """Attack so many test images, drawn over the whole test split by data.subset_seed. 0: all."""
    chunk_size: int = 50
    """Images per chunk: the unit of random stream, record and resumption. Another value is another result."""
    seed: int = 0
    """Seed of the attacks' random streams."""
    search_precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: BIM, PGD and adaptive search on a bfloat16 copy of the network, in less time where the hardware has such
    arithmetic. Every verdict is float32 either way. Another value is another result (docs/evaluation.md)."""
    reliability_images: int = 32
    """How many of the attacked images the reliability probe and the active test of each attack use (docs/reliability.md). 0: neither
    is done."""

    def __post_init__(self) -> None:
        from components.attacks.spec import AttackSpec

        check_values(self, "evaluation")
        texts: dict[str, str] = {}
        for attack in self.attacks:
            canonical = str(AttackSpec.parse(attack))
            if canonical in texts:
                raise ConfigError(
                    f"evaluation.attacks must have each attack once; {texts[canonical]} and {attack} are both {canonical}: "
                    "leave one out"
                )
            texts[canonical] = attack
        check(bool(self.attacks), "evaluation.attacks", self.attacks, "at least one attack, e.g. pgd:eps=0.2")
        check(
            len(set(self.threat_models)) == len(self.threat_models) > 0,
            "evaluation.threat_models",
            self.threat_models,
            "at least one threat model, and each of them once",
        )
        for threat in self.threat_models:
            check(
                threat in ("white_box", "black_box", "transfer")
                or (threat.startswith("transfer:") and len(threat) > 9),
                "evaluation.threat_models",
                threat,
                "one of white_box, black_box, transfer, transfer:NAME and transfer:*",
            )
        check(self.test_images >= 0, "evaluation.test_images", self.test_images, "0 (all) or more")
        check(self.chunk_size >= 1, "evaluation.chunk_size", self.chunk_size, "at least 1")
        images = self.reliability_images
        check(images >= 0, "evaluation.reliability_images", images, "0 (no such test) or more")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What the run may use of the cluster. Only ``workers`` changes a result (batch norm is per worker)."""

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
    """GPUs (a fraction is allowed) that Ray reserves for an attack task; 0: CPU."""
    chunks_per_attack: int = 1
    """Chunks that one attack task computes one after the other; more of them spare a GPU the start of so many tasks."""
    parallel_models: int = 0
    """Models trained side by side, each on its own workers. 0: as many as there is room for."""
    wait_s: float = 0.0
    """On a cluster that grows: seconds to wait for nodes that the run needs and that are not there yet."""
    max_failures: int = 3
    """How often a training run is started again from its last checkpoint after a worker or node died."""

    def __post_init__(self) -> None:
        check_values(self, "scaling")
        check(self.workers >= 1, "scaling.workers", self.workers, "at least 1")
        check(self.chunks_per_attack >= 1, "scaling.chunks_per_attack", self.chunks_per_attack, "at least 1")
        check(self.threads_per_worker >= 1, "scaling.threads_per_worker", self.threads_per_worker, "at least 1")
        for name in ("cpus_per_worker", "cpus_per_attack"):
            check(0 < getattr(self, name) < math.inf, f"scaling.{name}", getattr(self, name), "above 0")
        check(0 <= self.gpus_per_attack < math.inf, "scaling.gpus_per_attack", self.gpus_per_attack, "0 or more")
        check(0 <= self.wait_s < math.inf, "scaling.wait_s", self.wait_s, "0 or more seconds")
        check(self.parallel_models >= 0, "scaling.parallel_models", self.parallel_models, "0 (room decides) or more")
        check(self.max_failures >= 0, "scaling.max_failures", self.max_failures, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete run: data, targets, models, attacks, resources and where everything is kept."""

    name: str
    """Name of the recipe; also names the MLflow parent run."""
    description: str = ""
    """One line: what it shows."""
    data: DataConfig = field(default_factory=DataConfig)
    pyramids: PyramidConfig = field(default_factory=PyramidConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """What all models have in common."""
    models: tuple[str, ...] = (
        "no_defense:defense=none,seed=0",
        "control:defense=none,seed=1",
        "defend:defense=defend++,seed=1",
    )
    """The models compared, NAME or NAME:FIELD=VALUE,... where FIELD is one of train's."""
    seeds: int = 1
    """How many replicates of each model, from seeds that are SEED_STRIDE apart; above 1, the report gives mean and spread."""
    allow_diverged: bool = False
    """Go on without a model whose loss was not finite, and say so in the report, instead of stopping before the attacks."""
    paper: str = ""
    """The table of the paper (table1 ... table8) whose values the report prints beside; model names are its rows'."""
    figures: tuple[str, ...] = ()
    """Figures of the paper that the report draws from this run: fig2, fig5, fig6, fig7, fig8."""
    scale: str = ""
    """smoke, fast or paper, where the recipe is one of a table's; stands beside its numbers."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    storage: str = "~/defendpp"
    """Where shards, models and records are kept: an absolute path or a URI (s3://bucket/path) that every node reaches."""
    tracking_uri: str = ""
    """MLflow server (http://...) or database (sqlite:///...). Empty: $MLFLOW_TRACKING_URI, or mlflow.db in a local storage."""
    experiment_name: str = ""
    """MLflow experiment that the run is published in. Empty: $MLFLOW_EXPERIMENT_NAME, or defendpp."""

    def __post_init__(self) -> None:
        from components.attacks.spec import AttackSpec

        check_name("name", self.name)
        check_values(self, "")
        check(bool(self.models), "models", self.models, "at least one model, e.g. --models undefended:defense=none")
        check(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        check(self.paper in ("", *PRINTED_IN), "paper", self.paper, f"empty or one of {', '.join(PRINTED_IN)}")
        for figure in self.figures:
            check(figure in FIGURES, "figures", figure, f"one of {', '.join(FIGURES)}")
        for attack in self.evaluation.attacks:
            AttackSpec.parse(attack).check_fits(self.data.channels, self.data.image_size)
        sizes = level_sizes(self.data.image_size, self.pyramids.levels)
        variants = self.model_configs()
        longest = math.sqrt(self.data.channels) * self.data.image_size
        for name, config in variants.items():
            check(
                config.adversarial_max_norm <= longest,
                f"models[{name}].adversarial_max_norm",
                config.adversarial_max_norm,
                f"at most {longest:.4g}, the longest L2 perturbation of these images in [0,1]",
            )
            if config.normalize_mean:
                check(
                    len(config.normalize_mean) == self.data.channels,
                    f"models[{name}].normalize_mean",
                    config.normalize_mean,
                    f"one value per channel ({self.data.channels})",
                )
            if config.defense == "defend++" and len(sizes) < 2:
                if self.pyramids.levels == 1:
                    raise ConfigError.of("pyramids.levels", 1, "0 or at least 2 for Defend++")
                raise ConfigError.of(
                    "data.image_size", self.data.image_size, "at least 14 pixels for Defend++ (two levels)"
                )
            # PyTorch 2.14.1 on an AVX2 processor: the weight gradient of a stride-2 1x1 convolution (every ResNet's
            # downsampling) writes outside its memory in this format; bfloat16, plain format and GPU do not
            check(
                not config.channels_last or config.precision != "float32" or self.scaling.gpu,
                f"models[{name}].channels_last",
                config.channels_last,
                "False in float32 on a CPU, where PyTorch's channels-last gradients corrupt memory: "
                "use --train.precision bfloat16 or --scaling.gpu",
            )
            check(
                config.batch_size % self.scaling.workers == 0,
                f"models[{name}].batch_size",
                config.batch_size,
                f"a multiple of scaling.workers ({self.scaling.workers})",
            )
        for name, config in variants.items():
            check(
                config.epochs > 0 or self.seeds == 1,
                f"models[{name}].epochs",
                0,
                "at least 1 where seeds is above 1: weights that are given have no other seed",
            )
        self._check_seeds()
        bases = set(self.base_names().values())
        explicit = self.evaluation.transfer_source
        if explicit and "transfer" in self.evaluation.threat_models:
            undefended = {base for base, config in self.first_replicates().items() if config.defense == "none"}
            check(
                explicit in undefended,
                "evaluation.transfer_source",
                explicit,
                f"the name of an undefended model out of models ({', '.join(sorted(undefended)) or 'there is none'})",
            )
        for threat in self.evaluation.threat_models:
            _, _, named = threat.partition(":")
            check(
                not named or named == "*" or named in bases,
                "evaluation.threat_models",
                threat,
                f"transfer: and one of the models {', '.join(sorted(bases))}",
            )
        for name, config in variants.items():
            needs = "transfer" in self.evaluation.threat_models or config.defense == "comdefend"
            if needs and config.defense != "none" and self.transfer_source_of(name) is None:
                raise ConfigError(
                    f"models: {name} needs an undefended model beside it, "
                    + ("which stands behind the reformer" if config.defense == "comdefend" else "for transfer")
                    + f": add one, e.g. undefended:defense=none,arch={config.arch},width={config.width}"
                )
        self._check_threat_models()

    def _check_threat_models(self) -> None:
        """Refuse threat models under none of which a model would be attacked."""
        remedies = [self._idle(threat) for threat in self.evaluation.threat_models]
        if all(remedies):
            raise ConfigError.of("evaluation.threat_models", ", ".join(self.evaluation.threat_models), remedies[0])

    def _idle(self, threat: str) -> str:
        """Return what a threat model lacks to attack any model; empty where it does."""
        from components.attacks.spec import AttackSpec

        kind, _, base = threat.partition(":")
        if kind == "black_box":
            specs = [AttackSpec.parse(attack) for attack in self.evaluation.attacks]
            if not any(not spec.needs_gradients and spec.name != "noise" for spec in specs):
                return (
                    "left out, or --evaluation.attacks must have an attack that needs no gradients, e.g. square:eps=0.2"
                )
        elif kind == "transfer":
            sources = set(self.base_names().values()) if base == "*" else {base}
            if not any(self.transfer_source_of(name, source) for name in self.model_configs() for source in sources):
                return "left out, or --models must have a second model to make the examples on"
        return ""

    def _check_seeds(self) -> None:
        """Refuse a control that is its own source, replicates that are one network, and a seed without influence."""
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
        """The complete training config of each model, by name, in the order of ``models``; replicates end in -s0, -s1, ...

        Raises:
            ConfigError: a model is named twice, or names a field or value that ``train`` does not have.
        """
        return {name: config for name, (_, _, config) in self._expanded().items()}

    def replicates(self) -> dict[str, tuple[str, int]]:
        """Name of each model -> its name in ``models``, and which replicate of it this is."""
        return {name: (base, replicate) for name, (base, replicate, _) in self._expanded().items()}

    def base_names(self) -> dict[str, str]:
        """Name of each model -> its name in ``models``."""
        return {name: base for name, (base, _, _) in self._expanded().items()}

    @property
    def trains(self) -> bool:
        """Tell whether any model is trained; those that are given need the test images alone."""
        return any(config.epochs for config in self.model_configs().values())

    def first_replicates(self) -> dict[str, TrainConfig]:
        """Each name in ``models`` -> the config of its first replicate."""
        return {base: config for base, replicate, config in self._expanded().values() if replicate == 0}

    def transfer_source_of(self, name: str, base: str = "") -> str | None:
        """The model on which examples are made that are then shown to ``name``; of the same replicate. None: itself or none.

        Args:
            base: a name out of ``models`` (of ``transfer:NAME``). Empty: as ``evaluation.transfer_source`` says.
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
    """Name of each model -> its name in ``models``, which replicate of it this is, and its config. Not to be changed."""
    out: dict[str, tuple[str, int, TrainConfig]] = {}
    for text in models:
        base, overrides = parse_spec(text)
        config = replace_typed(train, overrides, f"models[{base}]")
        for replicate in range(seeds):
            name = base if seeds == 1 else f"{base}-s{replicate}"
            if name in out:
                raise ConfigError(f"models: two models have the name {name!r}: give each a name of its own")
            out[name] = base, replicate, dataclasses.replace(config, seed=config.seed + SEED_STRIDE * replicate)
    return out


@functools.lru_cache(maxsize=64)  # a report makes its experiment out of the record again and again
def _check_twins(models: tuple[str, ...], train: TrainConfig, seeds: int) -> None:
    """Refuse one network under two names, unless both are defended and of one replicate: then it is merely trained once."""
    seen: dict[TrainConfig, tuple[str, int]] = {}
    for name, (base, replicate, config) in _expand(models, train, seeds).items():
        twin, of = seen.setdefault(config.canonical(), (name, replicate))
        if twin != name and (config.defense == "none" or replicate != of):
            raise ConfigError(
                f"models: {name} is the same network as {twin}, which would count as an independent one; "
                + (
                    f"give models[{base}] another seed (replicates are {SEED_STRIDE} apart)"
                    if config.epochs
                    else "remove one of them: both are the weights of train.pretrained"
                )
            )
