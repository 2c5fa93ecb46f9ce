"""Attack suites of the recipes."""

from __future__ import annotations


def cw(channels: int) -> str:
    """C&W of 5 x 20 steps (sec. 4.1); its step size goes by the images (docs/LOG.md)."""
    return "cw:steps=20,binary_search_steps=5" + (",lr=0.01" if channels == 3 else "")


def attacks(eps: float, *, steps: int, ddn_steps: int, channels: int = 1, pgd: bool = False) -> tuple[str, ...]:
    """Sec. 4.1: FGSM, BIM and PGD of one eps, C&W of 5 x 20 steps, DDN; and noise of the same size as a floor."""
    return (
        f"noise:eps={eps}",
        f"fgsm:eps={eps}",
        f"bim:eps={eps},steps={steps}",
        *([f"pgd:eps={eps},steps={steps}"] if pgd else []),
        cw(channels),
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
        cw(channels),
        "ddn:steps=100",
        # 20 steps fail the active test on a network trained against PGD (docs/LOG.md). Every sample, 9 targets x 40 steps: 360
        # passes forward and backward, and as many forward
        *(("fab-t:norm=linf,steps=40",) if norm == "linf" else ()),
    )
