"""Inputs of the frozen comparison with the authors' attacks, and the script that freezes their figures.

``tests/components/attacks/test_authors_reference.py`` runs our attacks on these inputs and compares
them with the figures in ``tests/support/authors_reference.json``. Those come from the authors' own code,
which is not part of this repository. To make them again, clone
https://github.com/fra31/auto-attack (APGD, FAB and Square) and
https://github.com/jeromerony/adversarial-library (DDN, by its author, and C&W), and run, from the root,

    PYTHONPATH=.:CLONE:OTHER_CLONE python tests/support/authors_reference.py

The script imports the two packages and changes nothing in how they search. It only supplies the random
numbers (their code and ours draw in different orders) and records the model's inputs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

FIGURES = Path(__file__).with_suffix(".json")
POOL, CHANNELS, SIDE, CLASSES, HIDDEN = 60, 2, 17, 6, 24
# On these images of the pool, rounding decides no step of APGD. Relative noise of 3e-7 in the pixels shows it.
CHOSEN = (6, 21, 22, 24, 26, 35, 37, 40, 46, 47)
SAMPLES = len(CHOSEN)
# A documented difference matters on the last image: whether APGD-T's first checkpoint counts the first step.
APGD_T_SAMPLES = SAMPLES - 1
PIXELS = CHANNELS * SIDE * SIDE
TARGETS = 3
APGD_STEPS, APGD_T_STEPS, FAB_STEPS, QUERIES = 50, 30, 12, 120
EPS = {"linf": 0.005, "l2": 0.1}
SQUARE_EPS = {"linf": 0.02, "l2": 0.4}
DDN = {"steps": 25, "gamma": 0.05, "initial_norm": 0.15}
CW = {"steps": 12, "binary_search_steps": 4, "lr": 0.05, "initial_const": 0.02, "confidence": 8.0}


class Draws:
    """Uniform float32 numbers in [0,1), by seed.

    They are taken from the raw bits of PCG64. NumPy guarantees those for all versions and machines,
    unlike its distributions and unlike torch's generators.
    """

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def __call__(self, *shape: int) -> Tensor:
        raw = self.bits.random_raw(int(np.prod(shape, dtype=int)))
        return torch.from_numpy(((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32)).view(shape)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return low + (self(*shape).double() * (high - low)).long()


def of_the_chosen(draw: Draws) -> Tensor:
    return draw(POOL, CHANNELS, SIDE, SIDE)[list(CHOSEN)]


class Network(nn.Module):
    """A smooth network with weights by seed. It computes in float64.

    Its logits and gradients are rounded to float32 last, so that they do not depend on the order in
    which a machine sums. ``seen`` holds a fingerprint of every image of every forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        draw = Draws(1)
        self.first = (2 * draw(PIXELS, HIDDEN).double() - 1) * 0.5
        self.second = 2 * draw(HIDDEN, CLASSES).double() - 1
        self.direction = 2 * draw(PIXELS).double() - 1
        self.seen: list[Tensor] = []

    def fingerprints(self, x: Tensor) -> Tensor:
        """Project each image onto one fixed direction: float64 [N]. Every pixel counts."""
        return x.detach().flatten(1).double() @ self.direction

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.fingerprints(x))
        hidden = torch.sin((x.flatten(1).double() - 0.5) @ self.first)
        return (2 * hidden @ self.second).float()


def inputs(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Return images float32 [N,C,H,W], two sevenths of their pixels 0 or 1, and their predictions."""
    x = (1.4 * of_the_chosen(Draws(2)) - 0.2).clamp(0, 1)
    with torch.no_grad():
        return x, network(x).argmax(dim=1)


def aims(y: Tensor, targeted: bool) -> Tensor:
    """Return the classes for DDN and C&W: the targets of a targeted attack, else the labels."""
    return (y + 1) % CLASSES if targeted else y


def start_draws(run: int) -> Tensor:
    """Draw the numbers of a random start, for a run of APGD or a restart of FAB."""
    return of_the_chosen(Draws(100 + run))


class SquareDraws:
    """Random numbers of one run of Square: signs, corners of windows, and orientations of bumps."""

    def __init__(self) -> None:
        self.of = {kind: Draws(10 + i) for i, kind in enumerate(("signs", "corners", "orientations"))}


@contextlib.contextmanager
def starting_from(draw: Callable[[], Tensor]) -> Iterator[None]:
    """Let torch.rand and torch.randn return ``draw()``, whatever their arguments."""
    supplied = lambda *shape, **options: draw()  # noqa: E731
    with mock.patch.object(torch, "rand", supplied), mock.patch.object(torch, "randn", supplied):
        yield


# --- the authors' figures


def numbers(passes: list[Tensor]) -> list[list[float]]:
    return [[round(value, 5) for value in row.tolist()] for row in passes]


def norms(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)


def freeze_apgd(network: Network, x: Tensor, y: Tensor, norm: str, loss: str) -> dict[str, Any]:
    """Freeze every iterate, the iterate of the highest loss, and which samples withstand."""
    from autoattack.autopgd_base import APGDAttack

    attack = APGDAttack(network, n_iter=APGD_STEPS, norm=norm.capitalize(), eps=EPS[norm], loss=loss, device="cpu")
    attack.init_hyperparam(x)
    network.seen.clear()
    with starting_from(lambda: start_draws(0)):
        best, robust, _, _ = attack.attack_single_run(x, y)
    passes = numbers(network.seen)
    return {
        "passes": passes,
        "best": numbers([network.fingerprints(best)])[0],
        "robust": robust.int().tolist(),
    }


def freeze_apgd_t(network: Network, x: Tensor, y: Tensor, norm: str) -> dict[str, Any]:
    """Freeze the remaining samples and their iterates for each target, and which samples withstand all."""
    from autoattack.autopgd_base import APGDAttack_targeted

    runs: list[dict[str, Any]] = []
    x, y = x[:APGD_T_SAMPLES], y[:APGD_T_SAMPLES]

    class Watched(APGDAttack_targeted):
        def attack_single_run(self, inputs: Tensor, labels: Tensor, x_init: Tensor | None = None) -> Any:
            rows = [int((x == image).flatten(1).all(1).nonzero()) for image in inputs]
            network.seen.clear()
            with starting_from(lambda: start_draws(len(runs))[rows]):
                result = super().attack_single_run(inputs, labels, x_init)
            runs.append({"rows": rows, "passes": numbers(network.seen)})
            return result

    options = {"n_iter": APGD_T_STEPS, "norm": norm.capitalize(), "eps": EPS[norm], "device": "cpu"}
    examples = Watched(network, n_target_classes=TARGETS, **options).perturb(x, y)
    return {"runs": runs, "robust": (network(examples).argmax(1) == y).int().tolist()}


def freeze_fab_t(network: Network, x: Tensor, y: Tensor, norm: str) -> dict[str, Any]:
    """Freeze the iterates and norms towards each target, and of a restart towards the first.

    The restart begins within half the smallest norm so far, as in the paper. The authors' ``perturb``
    forgets that norm, so this passes it as the radius.
    """
    from autoattack.fab_pt import FABAttack_PT

    attack = FABAttack_PT(network, n_iter=FAB_STEPS, targeted=True, norm=norm.capitalize(), device="cpu")
    default_radius = attack.eps

    def run(target: int, restart: bool) -> dict[str, Any]:
        attack.target_class = target
        network.seen.clear()
        with starting_from(lambda: start_draws(0)):
            examples = attack.attack_single_run(x, y, use_rand_start=restart, is_targeted=True)
        passes = numbers(network.seen[2:])  # The first two passes are those of the clean images.
        fooled = network(examples).argmax(1) != y
        sizes = torch.where(fooled, norms(examples - x, norm), torch.inf)
        return {"passes": passes, "norms": numbers([sizes])[0]}

    runs = [run(target, restart=False) for target in range(2, TARGETS + 2)]
    attack.eps = torch.tensor(runs[0]["norms"]).clamp_max(default_radius)
    return {"runs": runs, "restart": run(2, restart=True)}


def freeze_square(network: Network, x: Tensor, y: Tensor, norm: str, rescale: bool) -> dict[str, Any]:
    """Freeze every proposal for the remaining samples, and which samples withstand.

    The authors' code never puts a square at the lower and right edges. The paper allows it, and our
    code does it. Here the draw of the corners allows it too; nothing else differs from their code.
    """
    from autoattack.square import SquareAttack

    draws = SquareDraws().of

    class Supplied(SquareAttack):
        remaining = torch.arange(SAMPLES)

        def random_choice(self, shape: list[int]) -> Tensor:
            own = shape[0] == len(self.remaining) and len(shape) == 4
            drawn = 2.0 * draws["signs"].integers(0, 2, (SAMPLES, *shape[1:]) if own else tuple(shape)) - 1
            return drawn[self.remaining] if own else drawn

        def random_int(self, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
            return draws["corners"].integers(low, high + 1, tuple(shape))

        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            margin, loss = super().margin_and_loss(x, y)
            self.remaining = self.remaining[margin > 0]
            return margin, loss

        def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
            network.seen.clear()
            queries, examples = super().attack_single_run(x, y)
            self.queries, self.passes = queries, numbers(network.seen)
            return queries, examples

    options = {"n_queries": QUERIES, "norm": norm.capitalize(), "eps": SQUARE_EPS[norm], "device": "cpu"}
    attack = Supplied(network, resc_schedule=rescale, **options)
    with starting_from(lambda: draws["orientations"](1)):
        examples = attack.perturb(x, y)
    return {"passes": attack.passes, "robust": (network(examples).argmax(1) == y).int().tolist()}


def freeze_ddn(network: Network, x: Tensor, y: Tensor, targeted: bool) -> dict[str, Any]:
    """Freeze every iterate but the last, which their code does not evaluate, and the smallest norm."""
    from adv_lib.attacks import ddn

    network.seen.clear()
    options = {"steps": DDN["steps"], "γ": DDN["gamma"], "init_norm": DDN["initial_norm"], "levels": None}
    examples = ddn(network, x, aims(y, targeted), targeted=targeted, **options)
    return {"passes": numbers(network.seen), "norms": numbers([norms(examples - x, "l2")])[0]}


def freeze_cw(network: Network, x: Tensor, y: Tensor, targeted: bool) -> dict[str, Any]:
    """Freeze every iterate of every search step, and the smallest norm."""
    from adv_lib.attacks import carlini_wagner_l2

    network.seen.clear()
    options = {
        "confidence": CW["confidence"],
        "learning_rate": CW["lr"],
        "initial_const": CW["initial_const"],
        "binary_search_steps": CW["binary_search_steps"],
        "max_iterations": CW["steps"] + 1,  # Their code evaluates an iterate before its step, not after.
        "abort_early": False,
    }
    examples = carlini_wagner_l2(network, x, aims(y, targeted), targeted=targeted, **options)
    return {"passes": numbers(network.seen), "norms": numbers([norms(examples - x, "l2")])[0]}


def source(package: Any, repository: str) -> str:
    """Name a repository and the revision of the clone that a package was imported from."""
    command = ["git", "-C", Path(package.__file__).parent, "rev-parse", "HEAD"]
    return f"{repository} {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"


def freeze() -> dict[str, Any]:
    """Run all attacks of the authors and return their figures."""
    sys.modules["visdom"] = mock.Mock()  # adversarial-library imports visdom for plots.
    import adv_lib
    import autoattack

    torch.set_num_threads(1)
    network = Network()
    x, y = inputs(network)
    figures: dict[str, Any] = {
        "sources": [
            source(autoattack, "github.com/fra31/auto-attack"),
            source(adv_lib, "github.com/jeromerony/adversarial-library"),
        ],
        "made_by": "tests/support/authors_reference.py",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
        "inputs": {"images": numbers([network.fingerprints(x)])[0], "logits": numbers(list(network(x)))},
    }
    for norm in ("linf", "l2"):
        figures[f"apgd-ce-{norm}"] = freeze_apgd(network, x, y, norm, "ce")
        figures[f"apgd-dlr-{norm}"] = freeze_apgd(network, x, y, norm, "dlr")
        figures[f"apgd-t-{norm}"] = freeze_apgd_t(network, x, y, norm)
        figures[f"fab-t-{norm}"] = freeze_fab_t(network, x, y, norm)
        figures[f"square-{norm}"] = freeze_square(network, x, y, norm, rescale=True)
    for targeted in (False, True):
        suffix = "-targeted" if targeted else ""
        figures[f"ddn{suffix}"] = freeze_ddn(network, x, y, targeted)
        figures[f"cw{suffix}"] = freeze_cw(network, x, y, targeted)
    figures["square-unrescaled-linf"] = freeze_square(network, x, y, "linf", rescale=False)
    return figures


def as_text(figures: dict[str, Any]) -> str:
    """Write JSON with one line for each list of numbers."""
    text = json.dumps(figures, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text) + "\n"


if __name__ == "__main__":
    FIGURES.write_text(as_text(freeze()))
