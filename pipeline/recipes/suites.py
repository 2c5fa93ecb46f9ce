"""Attack suites of the recipes."""

from __future__ import annotations

SHORT_AUTOATTACK = "steps=20,queries=500"
"""AutoAttack's short form: a fifth of the steps and a tenth of the queries of the standard one."""


def cw(channels: int) -> str:
    """Return C&W of 5 x 20 steps (sec. 4.1), with a step size for the images (docs/LOG.md)."""
    return "cw:steps=20,binary_search_steps=5" + (",lr=0.01" if channels == 3 else "")


def attacks(eps: float, *, steps: int, ddn_steps: int, channels: int = 1, autoattack: str = "") -> tuple[str, ...]:
    """Return the attacks of sec. 4.1, noise of the same eps as a floor, and AutoAttack.

    Args:
        channels: of the images; C&W's step size depends on them.
        autoattack: settings of AutoAttack beside its eps; empty: none.
    """
    return (
        f"noise:eps={eps}",
        f"fgsm:eps={eps}",
        f"bim:eps={eps},steps={steps}",
        cw(channels),
        f"ddn:steps={ddn_steps}",
        *((f"autoattack:eps={eps},{autoattack}",) if autoattack else ()),
    )


def full_suite(eps: str, norm: str = "linf", channels: int = 1) -> tuple[str, ...]:
    """Return the attacks that together say how robust a model is within a budget.

    They reach from noise and a single step to AutoAttack, with and without gradients, and with
    knowledge of the auto-encoder. Attacks of minimal norm are part of it: in L2 always, in Linf if
    that is the budget's norm.

    Args:
        norm: ``linf`` or ``l2``.
        channels: of the images; C&W's step size depends on them.
    """
    budget = f"eps={eps}" if norm == "linf" else f"eps={eps},norm={norm}"
    return (
        f"noise:{budget}",
        f"fgsm:{budget}",
        f"bim:{budget},steps=40",
        f"pgd:{budget},steps=40,restarts=3",
        f"autoattack:{budget}",
        f"square:{budget}",
        # These have the steps of PGD above, so a difference is due to the knowledge of the
        # auto-encoder. With all blocks shared the latent is the classifier's own last map: only the
        # reconstruction passes through the decoder.
        f"adaptive:{budget},steps=40,restarts=3",
        f"adaptive:{budget},objective=reconstruction,steps=40,restarts=3",
        cw(channels),
        "ddn:steps=100",
        # With 20 steps it fails the active test on a network trained against PGD (docs/LOG.md). 9
        # targets x 40 steps cost 360 passes forward and backward for each sample, and 360 forward.
        *(("fab-t:norm=linf,steps=40",) if norm == "linf" else ()),
    )
