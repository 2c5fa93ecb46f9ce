"""Complete named experiments. Each is a function, derived from another where it can be; the command line overrides any field.

The tables and figures of the paper come at the scales of :data:`SCALES`, ``table1-smoke`` and so on: the same models, threat models
and attacks, at sizes for another purpose. ``table1`` alone is ``table1-fast``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from components.config import DataConfig, EvaluationConfig, Experiment, PyramidConfig, ScalingConfig, TrainConfig

SCALES = {
    "smoke": "a minute or two on 2 cores, on the bundled sample whatever the table's data set: to see that it runs; its numbers mean nothing",
    "slim": "10,000 images of MNIST, width 16, on a CPU: hours",
    "fast": "about the paper's clean accuracy in a tenth of its epochs, for one GPU",
    "paper": "the paper's own hyper-parameters (sec. 4.1) and, where it has none, ours (docs/method.md), for one GPU",
}
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mnist_demo() -> Experiment:
    """The main job on the bundled sample: undefended, control and Defend++; white-box and transferred attacks."""
    return Experiment(
        name="mnist-demo",
        description="Defend++ against an undefended network and its control, on the bundled MNIST sample",
        data=DataConfig(source="sample:mnist"),
        train=TrainConfig(
            width=16,
            epochs=3,
            batch_size=64,
            lr=0.05,
            clip_norm=1.0,
            reconstruction_weight=10.0,
        ),
        evaluation=EvaluationConfig(
            attacks=(
                "noise:eps=0.2",
                "fgsm:eps=0.2",
                "bim:eps=0.2,steps=20",
                "pgd:eps=0.2,steps=20",
                "cw:steps=20,binary_search_steps=5",
                "ddn:steps=40",
            ),
            test_images=200,
            chunk_size=50,
            reliability_images=8,
        ),
        scaling=ScalingConfig(workers=2),
    )


def mnist_smoke() -> Experiment:
    """Every stage in about a minute: for tests and for a first look at a new machine. Its numbers mean nothing."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist-smoke",
        description="Every stage on a few images, to see that a machine works; the numbers mean nothing",
        data=replace(base.data, train_limit=600, test_limit=60),
        pyramids=PyramidConfig(rows_per_shard=200),
        train=replace(base.train, width=4, epochs=2),
        evaluation=EvaluationConfig(
            attacks=("noise:eps=0.2", "fgsm:eps=0.2", "bim:eps=0.2,steps=5", "ddn:steps=10"),
            test_images=20,
            chunk_size=10,
            reliability_images=8,
        ),
        scaling=ScalingConfig(workers=1),
    )


def mnist_slim() -> Experiment:
    """The setting of the design's prototype: 10,000 training images, width 16. Hours on a CPU, minutes on a GPU."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist-slim",
        description="10,000 images of full MNIST, width 16, 300 attacked images",
        data=DataConfig(source="torchvision:mnist", download=True, train_limit=10_000),
        train=replace(base.train, epochs=4, batch_size=128, lr=0.1),
        # the prototype's steps (docs/evaluation.md); the paper's 100 would be half as much again for the same column
        evaluation=EvaluationConfig(
            attacks=_attacks(0.2, steps=40, ddn_steps=60), test_images=300, reliability_images=16
        ),
        # two models at once on two cores, as in the tables, with which it shares them
        scaling=ScalingConfig(workers=1),
    )


def mnist() -> Experiment:
    """Full MNIST at the paper's width in a tenth of its epochs (one-cycle), for one GPU."""
    base = mnist_demo()
    return replace(
        base,
        name="mnist",
        description="Full MNIST, ResNet-18 at width 64, one-cycle over 25 epochs, for one GPU",
        data=DataConfig(source="torchvision:mnist", download=True),
        train=TrainConfig(
            epochs=25,
            reconstruction_weight=10.0,
            clip_norm=1.0,
            precision="bfloat16",
            channels_last=True,
        ),
        evaluation=EvaluationConfig(test_images=1000, chunk_size=250),
        scaling=ScalingConfig(workers=1, gpu=True, gpus_per_attack=0.5),
    )


# -- the paper's tables and figures ----------------------------------------------------------------------------------------


def _cw(channels: int) -> str:
    """C&W of 5 x 20 steps (sec. 4.1); its step size goes by the images (docs/LOG.md)."""
    return "cw:steps=20,binary_search_steps=5" + (",lr=0.01" if channels == 3 else "")


def _attacks(eps: float, *, steps: int, ddn_steps: int, channels: int = 1, pgd: bool = False) -> tuple[str, ...]:
    """Sec. 4.1: FGSM, BIM and PGD of one eps, C&W of 5 x 20 steps, DDN; and noise of the same size as a floor."""
    return (
        f"noise:eps={eps}",
        f"fgsm:eps={eps}",
        f"bim:eps={eps},steps={steps}",
        *([f"pgd:eps={eps},steps={steps}"] if pgd else []),
        _cw(channels),
        f"ddn:steps={ddn_steps}",
    )


def full_suite(eps: str, norm: str = "linf", channels: int = 1) -> tuple[str, ...]:
    """All that says how robust a model is within a budget: from noise and one step to AutoAttack, without gradients, and with
    what the attacker knows of the auto-encoder; and the minimal norms, L2 always, and Linf where that is the budget's."""
    budget = f"eps={eps}" if norm == "linf" else f"eps={eps},norm={norm}"
    return (
        f"noise:{budget}",
        f"fgsm:{budget}",
        f"bim:{budget},steps=40",
        f"pgd:{budget},steps=40,restarts=3",
        f"autoattack:{budget}",
        f"square:{budget}",
        # as strong as PGD above, so that a difference is owed to what this attacker knows. With all blocks shared the latent is
        # the classifier's own last map: only the reconstruction goes through the decoder
        f"adaptive:{budget},steps=40,restarts=3",
        f"adaptive:{budget},objective=reconstruction,steps=40,restarts=3",
        _cw(channels),
        "ddn:steps=100",
        # 20 steps fail the active test on a network trained against PGD (docs/LOG.md). Every sample, 9 targets x 40 steps: 360
        # passes forward and backward, and as many forward
        *(("fab-t:norm=linf,steps=40",) if norm == "linf" else ()),
    )


def _smoke(name: str, scale: str) -> Experiment:
    return Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(source="sample:mnist", train_limit=300, test_limit=20),
        pyramids=PyramidConfig(rows_per_shard=200),
        train=TrainConfig(
            width=4, epochs=1, batch_size=64, lr=0.05, clip_norm=1.0, reconstruction_weight=10.0, adversarial_steps=2
        ),
        evaluation=EvaluationConfig(
            attacks=_attacks(0.2, steps=2, ddn_steps=3), test_images=8, chunk_size=8, reliability_images=0
        ),
        # the start of a Ray Train run costs more than all models of this size
        scaling=ScalingConfig(parallel_models=1),
    )


def _mnist(name: str, scale: str) -> Experiment:
    """MNIST at one scale; joint training, all four blocks shared (sec. 4.2)."""
    base = _smoke(name, scale)
    if scale == "smoke":
        return base
    if scale == "slim":
        return replace(mnist_slim(), name=base.name, scale=scale, description="", seeds=3)
    if scale == "fast":
        return replace(mnist(), name=base.name, scale=scale, description="")
    return replace(
        mnist(),
        name=base.name,
        scale=scale,
        description="",
        data=DataConfig(source="torchvision:mnist", download=True, validation_fraction=0.0),
        train=TrainConfig(
            epochs=250, lr=0.01, lr_schedule="step", batch_size=256, reconstruction_weight=10.0, adversarial_steps=40
        ),
        evaluation=EvaluationConfig(attacks=_attacks(0.2, steps=100, ddn_steps=100), chunk_size=250),
    )


def _scheduled(train: TrainConfig, scale: str, *, fast_lr: float) -> TrainConfig:
    """CIFAR-10's and ImageNet's training at one scale: the paper's steps of the learning rate, or a tenth of it in one cycle."""
    if scale == "paper":
        return replace(train, lr=0.1, lr_schedule="step")
    return replace(
        train,
        epochs=30,
        autoencoder_epochs=1,
        classifier_epochs=1,
        lr=fast_lr,
        clip_norm=1.0,
        precision="bfloat16",
        channels_last=True,
    )


def _cifar10(name: str, scale: str) -> Experiment:
    """CIFAR-10 at one scale; alternating, then joint training, three blocks shared (sec. 3.4, 4.2)."""
    if scale == "smoke":
        base = _smoke(name, scale)
        return replace(
            base,
            data=replace(base.data, image_size=32, channels=3, resize="crop"),
            train=replace(
                base.train,
                shared_blocks=3,
                augment="crop_flip",
                schedule="alternating",
                epochs=3,
                cycles=1,
                autoencoder_epochs=1,
                classifier_epochs=1,
                adversarial_eps=0.05,
            ),
            evaluation=replace(base.evaluation, attacks=_attacks(0.05, steps=2, ddn_steps=3, channels=3)),
        )
    train = TrainConfig(
        shared_blocks=3,
        augment="crop_flip",
        schedule="alternating",
        epochs=300,
        batch_size=256,
        reconstruction_weight=10.0,
        normalize_mean=CIFAR10_MEAN,
        normalize_std=CIFAR10_STD,
        adversarial_eps=0.05,
    )
    train = _scheduled(train, scale, fast_lr=0.2)
    return Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(
            source="torchvision:cifar10",
            download=True,
            image_size=32,
            channels=3,
            validation_fraction=0.1 if scale == "fast" else 0.0,
        ),
        train=train,
        evaluation=EvaluationConfig(
            attacks=_attacks(0.05, steps=100, ddn_steps=100, channels=3),
            test_images=1000 if scale == "fast" else 0,
            chunk_size=250,
        ),
        scaling=ScalingConfig(gpu=True, gpus_per_attack=0.5),
    )


def _imagenet(name: str, scale: str) -> Experiment:
    """ImageNet-like images at 224x224 from pretrained weights (the paper's clean accuracy out of 10,000 images implies them)."""
    if scale == "smoke":
        base = _cifar10(name, scale)
        return replace(
            base,
            # 64 pixels: torchvision's own stem and four levels, as at 224, at a tenth of the cost
            data=replace(base.data, image_size=64, train_limit=64, test_limit=8),
            train=replace(base.train, augment="flip", batch_size=16),
            evaluation=replace(base.evaluation, attacks=_attacks(0.01, steps=2, ddn_steps=3, channels=3), chunk_size=4),
        )
    train = TrainConfig(
        shared_blocks=3,
        augment="flip",
        schedule="alternating",
        epochs=300,
        reconstruction_weight=10.0,
        pretrained="torchvision:IMAGENET1K_V1",
        normalize_mean=IMAGENET_MEAN,
        normalize_std=IMAGENET_STD,
        adversarial_eps=0.01,
    )
    train = _scheduled(train, scale, fast_lr=0.02)
    return Experiment(
        name=f"{name}-{scale}",
        scale=scale,
        data=DataConfig(
            source="folder:/data/imagenet",
            image_size=224,
            channels=3,
            num_classes=1000,
            allow_empty_classes=True,  # the 1,000 test images of NIPS 2017 are not of every class
            resize="crop",
            train_limit=10_000,
            validation_fraction=0.1 if scale == "fast" else 0.0,
        ),
        train=train,
        evaluation=EvaluationConfig(
            attacks=_attacks(0.01, steps=100, ddn_steps=100, channels=3), test_images=1000, chunk_size=50
        ),
        scaling=ScalingConfig(gpu=True, gpus_per_attack=0.5),
    )


UNDEFENDED = ("no_defense:defense=none,seed=0", "control:defense=none,seed=1")
ABLATIONS = (
    "shared1:seed=1,shared_blocks=1",
    "shared2:seed=1,shared_blocks=2",
    "shared3:seed=1,shared_blocks=3",
    "defend:seed=1",
    "without_lowpass:seed=1,targets=none",
    "linear:seed=1,targets=linear",
    "hourglass:seed=1,decoder=hourglass",
    "hourglass_concat:seed=1,decoder=hourglass_concat",
    "hourglass_add:seed=1,decoder=hourglass_add",
)
# Goodfellow et al. 2015 train on both halves; Madry et al. and Rony et al. on examples alone
ADV_FGSM = "adv_fgsm:defense=adversarial,seed=1,adversarial_attack=fgsm,adversarial_share=0.5"
ADV_PGD = "adv_pgd:defense=adversarial,seed=1,adversarial_attack=pgd"
COMDEFEND = "comdefend:defense=comdefend,seed=1,optimizer=adam,lr=0.001,weight_decay=0"
GN = "defend_gn:seed=1,noise_location=latent"


def _adv_ddn(scale: str, max_norm: float, epochs: int = 0) -> str:
    """Rony et al. 2019: the perturbation shortened; on CIFAR-10 only the last 30 epochs are adversarial."""
    said = f"adversarial_attack=ddn,adversarial_max_norm={max_norm},adversarial_epochs={epochs}"
    # the steps of their own training; at the other scales those of PGD, a tenth of the cost
    steps = ",adversarial_steps=100" if scale == "paper" else ""
    return f"adv_ddn:defense=adversarial,seed=1,{said}{steps}"


def _last_tenth(base: Experiment) -> int:
    return max(1, base.train.epochs // 10)


def table1(scale: str) -> Experiment:
    """Ablations on MNIST: shared blocks, targets, decoders."""
    return replace(_mnist("table1", scale), models=(*UNDEFENDED, *ABLATIONS), paper="table1")


def table2(scale: str) -> Experiment:
    """Defenses on MNIST."""
    models = (*UNDEFENDED, ADV_FGSM, _adv_ddn(scale, 2.4), COMDEFEND, "defend:seed=1", GN)
    return replace(_mnist("table2", scale), models=models, paper="table2")


def table2_pgd(scale: str) -> Experiment:
    """The PGD figures that stand in the text of sec. 4.2 alone, with Adv. PGD's row."""
    base = _mnist("table2-pgd", scale)
    models = (*UNDEFENDED, ADV_FGSM, ADV_PGD, _adv_ddn(scale, 2.4), COMDEFEND, "defend:seed=1", GN)
    bim = next(a for a in base.evaluation.attacks if a.startswith("bim"))
    attacks = tuple(a for a in base.evaluation.attacks if not a.startswith("pgd"))
    where = attacks.index(bim) + 1
    attacks = (*attacks[:where], bim.replace("bim", "pgd", 1), *attacks[where:])
    return replace(base, models=models, paper="sec4.2", evaluation=replace(base.evaluation, attacks=attacks))


def table3(scale: str) -> Experiment:
    """Defenses on CIFAR-10."""
    base = _cifar10("table3", scale)
    models = (*UNDEFENDED, ADV_FGSM, _adv_ddn(scale, 1.0, _last_tenth(base)), COMDEFEND, "defend:seed=1", GN)
    return replace(base, models=models, paper="table3")


def table4(scale: str) -> Experiment:
    """Defenses on ImageNet; give your images with --data.source. On Imagenette and the like, not comparable with the paper."""
    return replace(_imagenet("table4", scale), models=(*UNDEFENDED, ADV_FGSM, "defend:seed=1"), paper="table4")


# sec. 4.5: two shared blocks of VGG16's five, four of ResNet-50's. With batch norm, without which VGG16 does not train from
# scratch at these learning rates (docs/networks.md)
NETWORKS = {"vgg16": ("vgg16_bn", 2), "resnet50": ("resnet50", 4)}


def _networks(base: Experiment, table: str) -> Experiment:
    models = []
    for short, (arch, shared) in NETWORKS.items():
        models += [
            f"no_defense-{short}:defense=none,seed=0,arch={arch}",
            f"control-{short}:defense=none,seed=1,arch={arch}",
            f"defend-{short}:seed=1,arch={arch},shared_blocks={shared}",
        ]
    return replace(base, models=tuple(models), paper=table)


def table5(scale: str) -> Experiment:
    """VGG16 and ResNet-50 on MNIST."""
    return _networks(_mnist("table5", scale), "table5")


def table6(scale: str) -> Experiment:
    """VGG16 and ResNet-50 on CIFAR-10."""
    return _networks(_cifar10("table6", scale), "table6")


def _across(base: Experiment, table: str, shared: int) -> Experiment:
    """FGSM examples made on one network, judged on another; made on the undefended and on the defended one."""
    base = _networks(base, table)
    models = (
        *base.models,
        "no_defense-resnet18:defense=none,seed=0",
        "control-resnet18:defense=none,seed=1",
        f"defend-resnet18:seed=1,shared_blocks={shared}",
    )
    attacks = tuple(a for a in base.evaluation.attacks if a.startswith(("noise", "fgsm")))
    made_on = tuple(f"transfer:{row}-{arch}" for arch in ("resnet18", "vgg16") for row in ("no_defense", "defend"))
    evaluation = replace(base.evaluation, attacks=attacks, threat_models=("white_box", "transfer", *made_on))
    return replace(base, models=models, evaluation=evaluation)


def table7(scale: str) -> Experiment:
    """FGSM from one network to another, on MNIST."""
    return _across(_mnist("table7", scale), "table7", 4)


def table8(scale: str) -> Experiment:
    """FGSM from one network to another, on CIFAR-10."""
    return _across(_cifar10("table8", scale), "table8", 3)


def fig2(scale: str) -> Experiment:
    """Low-pass and pyramid images with their frequency maps; of the images alone."""
    base = _mnist("fig2", scale)
    evaluation = replace(base.evaluation, attacks=("noise:eps=0.2",), threat_models=("white_box",))
    train = replace(base.train, epochs=1)
    return replace(base, models=UNDEFENDED[:1], figures=("fig2",), evaluation=evaluation, train=train, seeds=1)


def fig5(scale: str) -> Experiment:
    """Adversarial examples of each attack, on ImageNet."""
    base = _imagenet("fig5", scale)
    evaluation = replace(base.evaluation, threat_models=("white_box",), test_images=8, chunk_size=8)
    return replace(base, models=UNDEFENDED[:1], figures=("fig5",), evaluation=evaluation)


def _mnist_fgsm(name: str, scale: str, *eps: float) -> Experiment:
    base = _mnist(name, scale)
    evaluation = replace(base.evaluation, attacks=tuple(f"fgsm:eps={e:g}" for e in eps))
    return replace(base, models=(*UNDEFENDED, "defend:seed=1"), evaluation=evaluation)


def fig6(scale: str) -> Experiment:
    """Clean and adversarial MNIST images, and what the auto-encoder makes of them."""
    return replace(_mnist_fgsm("fig6", scale, 0.2), figures=("fig6",), seeds=1)


def fig7(scale: str) -> Experiment:
    """Accuracy against FGSM's eps from 0.1 to 1."""
    return replace(_mnist_fgsm("fig7", scale, *(i / 10 for i in range(1, 11))), figures=("fig7",))


def fig8(scale: str) -> Experiment:
    """Histogram of R = D_rc / D_ra: is a reconstruction nearer to the clean image than to the attacked one?"""
    return replace(_mnist_fgsm("fig8", scale, 0.2), figures=("fig8",), seeds=1)


def eq3(scale: str) -> Experiment:
    """The readings of eq. 3: mean or sum over pixels, w = 1, 10, 100; what diverges is told, and the rest goes on."""
    base = _mnist("eq3", scale)
    models = [
        f"{r}{w}:seed=1,reconstruction_reduction={r},reconstruction_weight={w}"
        for r in ("mean", "sum")
        for w in (1, 10, 100)
    ]
    return replace(base, models=(*UNDEFENDED, *models), allow_diverged=True)


def robustness(scale: str) -> Experiment:
    """What the defense is worth: no defense, control, Defend++ and adversarial training under every threat model, with flags."""
    base = _mnist("robustness", scale)
    models = (*UNDEFENDED, "defend:seed=1", ADV_FGSM, ADV_PGD)
    if scale == "smoke":
        attacks: tuple[str, ...] = (
            "noise:eps=0.2",
            "fgsm:eps=0.2",
            "pgd:eps=0.2,steps=3,restarts=2",
            "autoattack:eps=0.2,steps=3,queries=5",
            "square:eps=0.2,queries=5",
            "adaptive:eps=0.2,steps=3",
            "adaptive:eps=0.2,objective=reconstruction,steps=3",
            "ddn:steps=5",
            "fab-t:norm=linf,steps=2,targets=2",
        )
        images, reliability_images, chunk_size = 8, 2, 8
    else:
        # sec. 4.1's eps, and half of it, where BIM leaves something to compare
        attacks = (*full_suite("0.2"), "bim:eps=0.1,steps=40")
        images, reliability_images, chunk_size = 1000, 32, 100
    evaluation = replace(
        base.evaluation,
        attacks=attacks,
        threat_models=("white_box", "black_box", "transfer", "transfer:*"),
        test_images=images,
        chunk_size=chunk_size,
        reliability_images=reliability_images,
    )
    return replace(base, models=models, evaluation=evaluation, seeds=1)


PAPER: dict[str, tuple[Callable[[str], Experiment], tuple[str, ...]]] = {
    **{
        f"table{i}": (make, ("smoke", "slim", "fast", "paper"))
        for i, make in ((1, table1), (2, table2), (5, table5), (7, table7))
    },
    "table2-pgd": (table2_pgd, ("smoke", "slim", "fast", "paper")),
    **{
        f"table{i}": (make, ("smoke", "fast", "paper"))
        for i, make in ((3, table3), (4, table4), (6, table6), (8, table8))
    },
    "fig5": (fig5, ("smoke", "fast", "paper")),
    **{
        name: (make, ("smoke", "slim", "fast", "paper"))
        for name, make in (("fig2", fig2), ("fig6", fig6), ("fig7", fig7), ("fig8", fig8))
    },
    "eq3": (eq3, ("smoke", "slim", "fast", "paper")),
    "robustness": (robustness, ("smoke", "slim", "fast", "paper")),
}
"""The paper's tables and figures and the questions that it leaves, and the scales they come at."""


def _described(make: Callable[[str], Experiment], name: str, scale: str) -> Experiment:
    """The recipe with its function's docstring as its description."""
    said = (make.__doc__ or "").partition("\n")[0]
    return replace(make(scale), name=f"{name}-{scale}", description=f"{said} Scale {scale}: {SCALES[scale]}.")


@dataclass(frozen=True)
class Recipe:
    """A recipe and what it costs, as measured or, where it was not run, as counted."""

    make: Callable[[], Experiment]
    cost: str


RECIPES: dict[str, Recipe] = {
    "mnist-smoke": Recipe(mnist_smoke, "2 to 4 minutes on 2 cores"),
    "mnist-demo": Recipe(mnist_demo, "6 to 8 minutes on 2 quiet cores without a GPU"),
    "mnist-slim": Recipe(mnist_slim, "8 minutes a seed on 2 cores"),
    "mnist": Recipe(mnist, "not measured yet: needs a GPU"),
}
_COSTS = {
    **dict.fromkeys(("table1-smoke", "table3-smoke", "table6-smoke"), "2 minutes"),
    **dict.fromkeys(("table5-smoke", "table7-smoke"), "1 minute"),
    "table1-slim": "40 minutes a seed",
    "eq3-slim": "30 minutes a seed",
    "robustness-slim": "about 4 hours",
}
"""Measured on 2 cores of an AMD EPYC without a GPU, 2026-11-23."""

for _name, (_make, _scales) in sorted(PAPER.items()):
    for _scale in _scales:
        _full = f"{_name}-{_scale}"
        RECIPES[_full] = Recipe(functools.partial(_described, _make, _name, _scale), _COSTS.get(_full, SCALES[_scale]))
    RECIPES[_name] = Recipe(RECIPES[f"{_name}-fast"].make, SCALES["fast"])
