"""The probe measures gradients, randomness and accuracy as they were constructed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flagged_networks import (
    ALIVE,
    Table,
    grey,
    seeded,
    small_linear,
)
from torch import Tensor

from components.evaluation.flags import flags
from components.evaluation.probe import probe


def probed(rows: Callable[[Tensor], Tensor], n: int = 20, eps: float = 0.1, norm: Any = "linf") -> dict[str, Any]:
    return probe(Table(rows), *grey(n), eps=eps, norm=norm, generator=seeded())


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ([0.3, 0.7], "probabilities"),
        ([0.0, 1.0], "probabilities"),
        ([0.3, 0.70005], "probabilities"),
        ([0.3, 0.703], "logits"),
        ([-0.1, 1.1], "logits"),
        ([math.log(0.3), math.log(0.7)], "log_probabilities"),
        ([math.log(0.3), math.log(0.703)], "logits"),
        ([-3.0, -2.0], "logits"),
        ([4.0, 0.5], "logits"),
    ],
)
def test_kind_of_output(row: list[float], kind: str) -> None:
    assert probed(lambda m: torch.tensor([row]) + 0 * m[:, None])["output"] == kind


def test_radii_reach_the_whole_range() -> None:
    def radii(eps: float, norm: str) -> list[float]:
        runs = probed(lambda m: torch.stack([m, 1 - m], dim=1), eps=eps, norm=norm)["accuracy_by_eps"]
        return [run["eps"] for run in runs]

    assert radii(0.3, "linf") == [0.3, 0.6, 1.0]
    assert radii(0.25, "linf") == [0.25, 0.5, 1.0]
    assert radii(1.0, "linf") == [1.0]
    assert radii(0.6, "l2") == [0.6, 1.2, 2.0]


def test_accuracy_falls_where_the_boundary_is() -> None:
    """Class 0 up to a mean of 0.75, which takes 0.25 (linf)."""
    measured = probed(lambda m: torch.stack([0.75 - m, m - 0.75], dim=1), n=3)
    assert [(run["eps"], run["correct"]) for run in measured["accuracy_by_eps"]] == [
        (0.1, [True] * 3),
        (0.2, [True] * 3),
        (0.4, [False] * 3),
        (0.8, [False] * 3),
        (1.0, [False] * 3),
    ]
    assert measured["unbounded_accuracy"] == 0
    assert [(run["steps"], run["correct"]) for run in measured["accuracy_by_steps"]] == [
        (steps, [True] * 3) for steps in (5, 20, 50)
    ]
    assert (measured["n"], measured["clean_correct"]) == (3, 3)


def test_what_was_wrong_before_is_neither_correct_nor_counted() -> None:
    """Wrong at first, right everywhere else and without a gradient."""
    measured = probed(lambda m: torch.stack([(m != 0.5).float() + 0 * m, 0 * m + 0.5], dim=1))
    assert measured["clean_correct"] == measured["zero_gradients"]["n"] == 0
    assert not any(any(run["correct"]) for run in measured["accuracy_by_eps"] + measured["accuracy_by_steps"])
    made = flags(measured, [])
    assert not any(f.fired for f in made)
    assert "Not measurable" in {f.name: f for f in made}["zero_gradients"].measured


def test_gradients_of_wrong_images_are_not_counted() -> None:
    """Half of the images are right and have a gradient, the other half neither."""
    images = torch.cat([grey(5, 0.75)[0], grey(5, 0.25)[0]])
    model = Table(lambda m: torch.stack([(m - 0.5).clamp_min(0), 0 * m + 0.1], dim=1))
    measured = probe(model, images, grey(10)[1], eps=0.1, norm="linf", generator=seeded())
    assert measured["zero_gradients"] == {"n": 5, "cross_entropy": ALIVE, "margin": ALIVE}


def test_gradients_are_counted() -> None:
    counted = probed(lambda m: torch.stack([m, 0.1 * m], dim=1))["zero_gradients"]
    alive = {"zero": 0, "not_finite": 0, "tiny": 0}
    assert counted == {"n": 20, "cross_entropy": alive, "margin": alive}
    # sqrt has an infinite slope at 0
    counted = probed(lambda m: torch.stack([1 + (m - 0.5).abs().sqrt(), m], dim=1))["zero_gradients"]
    assert counted["margin"] == {"zero": 0, "not_finite": 20, "tiny": 0}
    counted = probed(lambda m: torch.stack([75 + 0 * m, m], dim=1))["zero_gradients"]
    assert counted["cross_entropy"] == {"zero": 0, "not_finite": 0, "tiny": 20}
    assert counted["margin"] == alive
    counted = probed(lambda m: torch.stack([1e4 + m, 0 * m], dim=1))["zero_gradients"]
    assert counted["cross_entropy"] == {"zero": 20, "not_finite": 0, "tiny": 0}
    assert counted["margin"] == alive


def test_a_defense_that_is_random_once_per_batch_is_seen() -> None:
    """One of two networks, drawn for the whole batch."""
    turns = iter([0, 0, 0, 1] + [0] * 10_000)
    seen = probed(lambda m: torch.stack([m, 0 * m + next(turns)], dim=1))["random_output"]
    assert seen["largest_difference"] == 1
    assert seen["changed"] == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(0, 1, 2, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "no images"),
        ({"inputs": grey(2, 0.5)[0].double()}, "float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\]"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.5}, "eps=1.5"),
        ({"eps": 2.5, "norm": "l2"}, "eps=2.5"),
        ({"model": Table(lambda m: m[:, None])}, r"\[2, 1\]"),
        ({"model": Table(lambda m: m[:, None, None].expand(-1, 2, 2))}, r"\[2, 2, 2\]"),
        ({"model": Table(lambda m: torch.stack([m, m / 0], dim=1))}, "not finite for 2 images"),
    ],
)
def test_probe_refuses(change: dict[str, Any], message: str) -> None:
    inputs, labels = grey(2)
    good = {"model": small_linear(), "inputs": inputs, "labels": labels, "eps": 0.1, "norm": "linf"}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=message):
        probe(arguments.pop("model"), arguments.pop("inputs"), arguments.pop("labels"), **arguments)
