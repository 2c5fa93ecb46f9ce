"""Our APGD, APGD-T, FAB-T, Square, DDN and C&W against figures of the authors' code, iterate by iterate.

The figures were made once by ``tests/support/authors_reference.py``; none of the authors' code is needed here.
Inputs, weights and random draws follow from seeds. Each test compares the image of every forward pass,
as a fingerprint that depends on every pixel: a changed step changes the fingerprints after it.

Of 119 mutants of our attacks (constants, schedules, losses, projections, acceptance) these tests kill 115.
The other four change nothing here: Square's last halving (the square has one pixel before it, too; see
``test_squares_shrink_on_the_schedule_of_the_authors``), its acceptance of an equal margin, its L2 rescaling
to eps of what has that norm already, and a factor of C&W's gradient, which Adam divides out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from authors_reference import (
    APGD_STEPS,
    APGD_T_SAMPLES,
    APGD_T_STEPS,
    CW,
    DDN,
    EPS,
    FAB_STEPS,
    FIGURES,
    QUERIES,
    SAMPLES,
    SQUARE_EPS,
    TARGETS,
    Network,
    SquareDraws,
    aims,
    inputs,
    norms,
    start_draws,
    starting_from,
)
from torch import Tensor

from components.attacks.apgd import apgd, apgd_t
from components.attacks.cw import cw
from components.attacks.ddn import ddn
from components.attacks.fab import fab_t
from components.attacks.square import square

# Fingerprints are sums of 578 pixels times numbers up to 1, so an error of 0.001 in one pixel shows.
TOLERANCE = 2e-4
# Our code keeps the norm 7e-7 below eps, for rounding. A bump in an unperturbed window takes the rest of the
# norm: 5e-4 of it where the authors' code has none.
SQUARE_L2_TOLERANCE = 1e-3
# At black and white pixels the gradient is no larger than Adam's 1e-8, so its rounding shows.
CW_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(FIGURES.read_text())
    return contents


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def batch(network: Network) -> tuple[Tensor, Tensor]:
    x, y = inputs(network)
    network.seen.clear()
    return x, y


def assert_same_passes(ours: list[Tensor], authors: list[list[float]], tolerance: float = TOLERANCE) -> None:
    assert [len(row) for row in ours] == [len(row) for row in authors]
    for number, (row, expected) in enumerate(zip(ours, authors, strict=True)):
        np.testing.assert_allclose(row.numpy(), expected, rtol=0, atol=tolerance, err_msg=f"pass {number}")


def still_right(network: Network, x: Tensor, y: Tensor) -> list[int]:
    with torch.no_grad():
        return (network(x).argmax(dim=1) == y).int().tolist()


def test_inputs_are_those_of_the_figures(
    figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, _ = batch
    np.testing.assert_allclose(network.fingerprints(x).numpy(), figures["inputs"]["images"], rtol=0, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(network(x).numpy(), figures["inputs"]["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_takes_the_steps_of_the_authors(
    loss: str, norm: str, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    authors = figures[f"apgd-{loss}-{norm}"]
    with starting_from(lambda: start_draws(0)):
        examples = apgd(network, x, y, eps=EPS[norm], norm=norm, steps=APGD_STEPS, loss=loss)
    assert_same_passes(network.seen, authors["passes"])
    np.testing.assert_allclose(network.fingerprints(examples).numpy(), authors["best"], rtol=0, atol=TOLERANCE)
    assert still_right(network, examples, y) == authors["robust"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_t_takes_the_steps_of_the_authors(
    norm: str, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = (tensor[:APGD_T_SAMPLES] for tensor in batch)
    authors = figures[f"apgd-t-{norm}"]
    runs = itertools.count()
    options = {"eps": EPS[norm], "norm": norm, "steps": APGD_T_STEPS, "targets": TARGETS}
    with starting_from(lambda: start_draws(next(runs))[:APGD_T_SAMPLES]):
        examples = apgd_t(network, x, y, **options)
    assert len(network.seen) == 1 + TARGETS * (APGD_T_STEPS + 1)
    for target, run in enumerate(authors["runs"]):
        # In the authors' code, a broken sample takes part in no further run.
        begin = 1 + target * (APGD_T_STEPS + 1)
        ours = [row[run["rows"]] for row in network.seen[begin : begin + APGD_T_STEPS + 1]]
        assert_same_passes(ours, run["passes"])
    assert still_right(network, examples, y) == authors["robust"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_t_takes_the_steps_of_the_authors(
    norm: str, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    authors = figures[f"fab-t-{norm}"]
    examples = fab_t(network, x, y, norm=norm, steps=FAB_STEPS, targets=TARGETS)
    assert_same_passes(network.seen[1:], [row for run in authors["runs"] for row in run["passes"]])
    smallest = np.min([run["norms"] for run in authors["runs"]], axis=0)
    np.testing.assert_allclose(norms(examples - x, norm).numpy(), smallest, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_restart_of_fab_t_takes_the_steps_of_the_authors(
    norm: str, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    authors = figures[f"fab-t-{norm}"]
    with starting_from(lambda: start_draws(0)):
        examples = fab_t(network, x, y, norm=norm, steps=FAB_STEPS, targets=1, restarts=2)
    assert_same_passes(network.seen[1:], authors["runs"][0]["passes"] + authors["restart"]["passes"])
    smallest = np.minimum(authors["runs"][0]["norms"], authors["restart"]["norms"])
    np.testing.assert_allclose(norms(examples - x, norm).numpy(), smallest, rtol=0, atol=2e-5)


def supplied_randint(norm: str) -> Callable[..., Tensor]:
    """Return a torch.randint that gives the figures' draws in the order of our Square."""
    kinds = square_kinds(norm)
    draws = SquareDraws().of

    def randint(low: int, high: int, shape: tuple[int, ...], **options: Any) -> Tensor:
        return draws[next(kinds)].integers(low, high, shape)

    return randint


def square_kinds(norm: str) -> Iterator[str]:
    if norm == "linf":
        yield "signs"
        while True:
            yield from ("corners", "corners", "signs")
    for _ in range(25):  # These are the tiles of the first perturbation.
        yield from ("signs", "orientations")
    while True:
        yield from ("signs", "corners", "corners", "corners", "corners", "orientations")


@pytest.mark.parametrize(("norm", "rescale"), [("linf", True), ("linf", False), ("l2", True)])
def test_square_proposes_and_accepts_as_the_authors(
    norm: str,
    rescale: bool,
    figures: dict[str, Any],
    network: Network,
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = batch
    authors = figures[f"square-{norm}" if rescale else f"square-unrescaled-{norm}"]
    monkeypatch.setattr(torch, "randint", supplied_randint(norm))
    examples = square(network, x, y, eps=SQUARE_EPS[norm], norm=norm, queries=QUERIES, rescale=rescale)
    # Our code counts the first proposal among the queries, and evaluates the clean images first.
    assert len(network.seen) - 1 == min(QUERIES, len(authors["passes"]))
    tolerance = SQUARE_L2_TOLERANCE if norm == "l2" else TOLERANCE
    assert_same_passes(network.seen[1:], authors["passes"][:QUERIES], tolerance)
    assert len(network.seen[1]) == SAMPLES
    assert still_right(network, examples, y) == authors["robust"]


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn_takes_the_steps_of_its_author(
    targeted: bool, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    author = figures["ddn-targeted" if targeted else "ddn"]
    examples = ddn(network, x, aims(y, targeted), targeted=targeted, **DDN)
    assert_same_passes(network.seen[:-1], author["passes"])
    # Our code also evaluates the last iterate.
    smaller = norms(examples - x, "l2").numpy() < np.array(author["norms"]) - 2e-5
    last = (network.fingerprints(examples) - network.seen[-1]).abs().numpy() < 1e-9
    np.testing.assert_allclose(
        norms(examples - x, "l2").numpy()[~smaller], np.array(author["norms"])[~smaller], atol=2e-5
    )
    assert last[smaller].all()


@pytest.mark.parametrize("targeted", [False, True])
def test_cw_takes_the_steps_of_the_reference(
    targeted: bool, figures: dict[str, Any], network: Network, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    authors = figures["cw-targeted" if targeted else "cw"]
    examples = cw(network, x, aims(y, targeted), targeted=targeted, **CW)
    clean, *steps = network.seen
    # Our code evaluates the clean images once, the authors' at the beginning of each search step.
    per_search = len(steps) // CW["binary_search_steps"]
    searches = [steps[i : i + per_search] for i in range(0, len(steps), per_search)]
    ours = [row for search in searches for row in [clean, *search]]
    assert_same_passes(ours, authors["passes"], CW_TOLERANCE)
    np.testing.assert_allclose(norms(examples - x, "l2").numpy(), authors["norms"], rtol=0, atol=1e-4)
