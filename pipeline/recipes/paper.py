"""Recipes of the paper's tables and figures, and of the questions that it leaves.

Each comes at every scale of :data:`SCALES`, as ``table1-smoke`` and so on: the same models,
threat models and attacks, at sizes for another purpose. The first line of a function's docstring is
the recipe's description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from components.config import Experiment
from components.threat_models import BLACK_BOX, EVERY_SOURCE, TRANSFER, WHITE_BOX, transfer_from
from pipeline.recipes.scales import cifar10, imagenet, mnist_scale
from pipeline.recipes.suites import full_suite

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
# Goodfellow et al. 2015 train on clean images, too; Madry et al. and Rony et al. on examples alone.
ADV_FGSM = "adv_fgsm:defense=adversarial,seed=1,adversarial_attack=fgsm,adversarial_share=0.5"
ADV_PGD = "adv_pgd:defense=adversarial,seed=1,adversarial_attack=pgd"
COMDEFEND = "comdefend:defense=comdefend,seed=1,optimizer=adam,lr=0.001,weight_decay=0"
GN = "defend_gn:seed=1,noise_location=latent"


def _adv_ddn(scale: str, max_norm: float, epochs: int = 0) -> str:
    """Return the model of Rony et al. 2019, which shortens the perturbation.

    On CIFAR-10 only the last 30 epochs are adversarial.
    """
    fields = f"adversarial_attack=ddn,adversarial_max_norm={max_norm},adversarial_epochs={epochs}"
    # At scale "paper" the steps are the authors'. Elsewhere they are PGD's, at a tenth of the cost.
    steps = ",adversarial_steps=100" if scale == "paper" else ""
    return f"adv_ddn:defense=adversarial,seed=1,{fields}{steps}"


def _last_tenth(base: Experiment) -> int:
    return max(1, base.train.epochs // 10)


def table1(scale: str) -> Experiment:
    """Compare ablations on MNIST: shared blocks, targets, decoders."""
    return replace(mnist_scale("table1", scale), models=(*UNDEFENDED, *ABLATIONS), paper="table1")


def table2(scale: str) -> Experiment:
    """Compare defenses on MNIST."""
    models = (*UNDEFENDED, ADV_FGSM, _adv_ddn(scale, 2.4), COMDEFEND, "defend:seed=1", GN)
    return replace(mnist_scale("table2", scale), models=models, paper="table2")


def table2_pgd(scale: str) -> Experiment:
    """Compare defenses under PGD, as in the text of sec. 4.2, with a row for Adv. PGD."""
    base = mnist_scale("table2-pgd", scale)
    models = (*UNDEFENDED, ADV_FGSM, ADV_PGD, _adv_ddn(scale, 2.4), COMDEFEND, "defend:seed=1", GN)
    bim = next(a for a in base.evaluation.attacks if a.startswith("bim"))
    attacks = tuple(a for a in base.evaluation.attacks if not a.startswith("pgd"))
    where = attacks.index(bim) + 1
    attacks = (*attacks[:where], bim.replace("bim", "pgd", 1), *attacks[where:])
    return replace(base, models=models, paper="sec4.2", evaluation=replace(base.evaluation, attacks=attacks))


def table3(scale: str) -> Experiment:
    """Compare defenses on CIFAR-10."""
    base = cifar10("table3", scale)
    models = (
        *UNDEFENDED,
        ADV_FGSM,
        ADV_PGD + (",adversarial_steps=5,adversarial_epochs=4" if scale == "slim" else ""),
        _adv_ddn(scale, 1.0, _last_tenth(base)),
        COMDEFEND,
        "defend:seed=1",
        GN,
    )
    return replace(base, models=models, paper="table3")


def table4(scale: str) -> Experiment:
    """Compare defenses on ImageNet: name your images with --data.source.

    Results on Imagenette and the like cannot be compared with the paper's.
    """
    return replace(imagenet("table4", scale), models=(*UNDEFENDED, ADV_FGSM, "defend:seed=1"), paper="table4")


# Sec. 4.5: two of VGG16's five blocks are shared, and four of ResNet-50's. Without batch norm VGG16
# does not train from scratch at these learning rates (docs/method.md).
NETWORKS = {"vgg16": ("vgg16_bn", 2), "resnet50": ("resnet50", 4)}


def _networks(base: Experiment, table: str) -> Experiment:
    models = []
    # A ResNet-50 of width 8 trains on colour images as fast as a ResNet-18 of width 16.
    narrow = ",width=8" if base.scale == "slim" and base.data.channels == 3 else ""
    for short, (arch, shared) in NETWORKS.items():
        fields = f"arch={arch}" + (narrow if arch == "resnet50" else "")
        models += [
            f"no_defense-{short}:defense=none,seed=0,{fields}",
            f"control-{short}:defense=none,seed=1,{fields}",
            f"defend-{short}:seed=1,{fields},shared_blocks={shared}",
        ]
    return replace(base, models=tuple(models), paper=table)


def table5(scale: str) -> Experiment:
    """Compare VGG16 and ResNet-50 on MNIST."""
    return _networks(mnist_scale("table5", scale), "table5")


def table6(scale: str) -> Experiment:
    """Compare VGG16 and ResNet-50 on CIFAR-10."""
    return _networks(cifar10("table6", scale), "table6")


def _across_networks(base: Experiment, table: str, shared: int) -> Experiment:
    """Return an experiment with FGSM examples of some networks, judged on others."""
    base = _networks(base, table)
    models = (
        *base.models,
        "no_defense-resnet18:defense=none,seed=0",
        "control-resnet18:defense=none,seed=1",
        f"defend-resnet18:seed=1,shared_blocks={shared}",
    )
    attacks = tuple(a for a in base.evaluation.attacks if a.startswith(("noise", "fgsm", "autoattack")))
    made_on = tuple(
        transfer_from(f"{row}-{arch}") for arch in ("resnet18", "vgg16") for row in ("no_defense", "defend")
    )
    evaluation = replace(base.evaluation, attacks=attacks, threat_models=(WHITE_BOX, TRANSFER, *made_on))
    return replace(base, models=models, evaluation=evaluation)


def table7(scale: str) -> Experiment:
    """Transfer FGSM examples from one network to another, on MNIST."""
    return _across_networks(mnist_scale("table7", scale), "table7", 4)


def table8(scale: str) -> Experiment:
    """Transfer FGSM examples from one network to another, on CIFAR-10."""
    return _across_networks(cifar10("table8", scale), "table8", 3)


def fig2(scale: str) -> Experiment:
    """Show low-pass and pyramid images with their frequency maps."""
    base = mnist_scale("fig2", scale)
    evaluation = replace(base.evaluation, attacks=("noise:eps=0.2",), threat_models=(WHITE_BOX,))
    train = replace(base.train, epochs=1)
    return replace(base, models=UNDEFENDED[:1], figures=("fig2",), evaluation=evaluation, train=train, seeds=1)


def fig5(scale: str) -> Experiment:
    """Show adversarial examples of each attack, on ImageNet."""
    base = imagenet("fig5", scale)
    evaluation = replace(base.evaluation, threat_models=(WHITE_BOX,), test_images=8, chunk_size=8)
    return replace(base, models=UNDEFENDED[:1], figures=("fig5",), evaluation=evaluation)


def _mnist_fgsm(name: str, scale: str, *eps: float) -> Experiment:
    base = mnist_scale(name, scale)
    evaluation = replace(base.evaluation, attacks=tuple(f"fgsm:eps={e:g}" for e in eps))
    return replace(base, models=(*UNDEFENDED, "defend:seed=1"), evaluation=evaluation)


def fig6(scale: str) -> Experiment:
    """Show clean and adversarial MNIST images and their reconstructions by the auto-encoder."""
    return replace(_mnist_fgsm("fig6", scale, 0.2), figures=("fig6",), seeds=1)


def fig7(scale: str) -> Experiment:
    """Plot accuracy over FGSM's eps from 0.1 to 1."""
    return replace(_mnist_fgsm("fig7", scale, *(i / 10 for i in range(1, 11))), figures=("fig7",))


def fig8(scale: str) -> Experiment:
    """Plot R = D_rc / D_ra: is a reconstruction nearer to the clean or to the attacked image?"""
    return replace(_mnist_fgsm("fig8", scale, 0.2), figures=("fig8",), seeds=1)


def eq3(scale: str) -> Experiment:
    """Compare readings of eq. 3: mean or sum over pixels, w = 1, 10, 100. Models may diverge."""
    base = mnist_scale("eq3", scale)
    models = [
        f"{r}{w}:seed=1,reconstruction_reduction={r},reconstruction_weight={w}"
        for r in ("mean", "sum")
        for w in (1, 10, 100)
    ]
    return replace(base, models=(*UNDEFENDED, *models), allow_diverged=True)


_BIM_READINGS = (
    # Number and size of the steps: ours (2.5 eps / steps); eps / steps; 1/255 as in early code, whose
    # number of steps is min(255 eps + 4, 1.25 * 255 eps) = 55 (Kurakin et al. 2017) or simply 10,
    # which reach 10/255 alone.
    "bim:eps=0.2,steps=10",
    "bim:eps=0.2,steps=40",
    "bim:eps=0.2,steps=100",
    "bim:eps=0.2,steps=10,step_size=0.02",
    "bim:eps=0.2,steps=100,step_size=0.002",
    "bim:eps=0.2,steps=55,step_size=1/255",
    "bim:eps=0.2,steps=10,step_size=1/255",
    # eps: in units of images that are normalised by MNIST's deviation 0.3081; half; and 0.3.
    "bim:eps=0.06162,steps=100",
    "bim:eps=0.1,steps=100",
    "bim:eps=0.3,steps=100",
)


def bim_readings(scale: str) -> Experiment:
    """Look for the reading under which the paper's BIM column (55.37 %) appears, on MNIST."""
    base = mnist_scale("bim-readings", scale)
    longer = f",epochs={5 * base.train.epochs}"
    models = (
        *UNDEFENDED,
        "defend:seed=1",
        # It starts from the source's initial weights and sees the images in the same order.
        "defend_same_start:seed=0",
        "defend_sum:seed=1,reconstruction_reduction=sum,reconstruction_weight=1",
        ADV_FGSM,
        f"no_defense_longer:defense=none,seed=0{longer}",
        f"control_longer:defense=none,seed=1{longer}",
        f"defend_longer:seed=1{longer}",
    )
    attacks = ("fgsm:eps=0.2", *_BIM_READINGS, *(a for a in base.evaluation.attacks if a.startswith(("cw", "ddn"))))
    if scale == "smoke":
        attacks = ("fgsm:eps=0.2", "bim:eps=0.2,steps=2", "bim:eps=0.2,steps=2,step_size=1/255")
    threat_models = (WHITE_BOX, TRANSFER, transfer_from("no_defense_longer"))
    evaluation = replace(base.evaluation, attacks=attacks, threat_models=threat_models)
    return replace(base, models=models, evaluation=evaluation, seeds=min(base.seeds, 2), allow_diverged=True)


def robustness(scale: str) -> Experiment:
    """Compare Defend++ with adversarial training and no defense under every threat model."""
    base = mnist_scale("robustness", scale)
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
        # The eps of sec. 4.1, and half of it, under which BIM leaves differences to compare.
        attacks = (*full_suite("0.2"), "bim:eps=0.1,steps=40")
        images, reliability_images, chunk_size = 1000, 32, 100
    evaluation = replace(
        base.evaluation,
        attacks=attacks,
        threat_models=(WHITE_BOX, BLACK_BOX, TRANSFER, EVERY_SOURCE),
        test_images=images,
        chunk_size=chunk_size,
        reliability_images=reliability_images,
    )
    return replace(base, models=models, evaluation=evaluation, seeds=1)


def _robust(base: Experiment, eps: str) -> Experiment:
    """Return adversarial training and TRADES, each without and with the auto-encoder, within Linf eps."""
    models = []
    for loss in ("ce", "trades"):
        fields = f"seed=1,adversarial_loss={loss}"
        models += [f"adv_{loss}:defense=adversarial,{fields}"]
        models += [f"defend{n}_{loss}:adversarial_training=true,{fields},shared_blocks={n}" for n in range(1, 5)]
    steps, queries = (2, 5) if base.scale == "smoke" else (20, 500)
    budget = f"eps={eps}"
    attacks = (
        f"noise:{budget}",
        # Three restarts, since the two adaptive attacks are two more on models with an auto-encoder.
        f"pgd:{budget},steps={2 * steps},restarts=3",
        f"autoattack:{budget},steps={steps},queries={queries}",
        f"square:{budget},queries={2 * queries}",
        f"adaptive:{budget},steps={2 * steps}",
        f"adaptive:{budget},objective=reconstruction,steps={2 * steps}",
    )
    return replace(
        base,
        models=tuple(models),
        evaluation=replace(base.evaluation, attacks=attacks, threat_models=(WHITE_BOX, BLACK_BOX)),
        seeds=1 if base.scale == "smoke" else 3,
    )


def robust(scale: str) -> Experiment:
    """Ask whether the auto-encoder helps adversarial training, on MNIST at Linf 0.3."""
    base = mnist_scale("robust", scale)
    train = replace(base.train, adversarial_attack="pgd", adversarial_eps=0.3, adversarial_beta=1.0)
    if scale == "slim":
        train = replace(train, epochs=8, adversarial_steps=7, precision="bfloat16", channels_last=True)
    return _robust(replace(base, train=train), "0.3")


def robust_cifar10(scale: str) -> Experiment:
    """Ask whether the auto-encoder helps adversarial training, on CIFAR-10 at Linf 8/255."""
    base = cifar10("robust-cifar10", scale)
    train = replace(base.train, adversarial_attack="pgd", adversarial_eps=8 / 255, schedule="joint")
    if scale == "slim":  # N-FGSM takes a fifth of the time of ten steps of PGD.
        train = replace(train, adversarial_attack="n-fgsm", epochs=6)
        base = replace(base, data=replace(base.data, train_limit=15_000))
    return _robust(replace(base, train=train), "8/255")


PAPER: dict[str, Callable[[str], Experiment]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        *(table1, table2, table2_pgd, table3, table4, table5, table6, table7, table8),
        *(fig2, fig5, fig6, fig7, fig8, eq3, bim_readings, robustness, robust, robust_cifar10),
    )
}
"""Name -> function of the scale."""
