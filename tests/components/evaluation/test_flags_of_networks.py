"""Flags of networks with a planted defect, and of honest ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from flagged_networks import (
    EPS,
    ITERATED,
    OTHERS,
    SINGLE,
    STRONG,
    Batch,
    Table,
    Then,
    clean_probe,
    fired,
    flags_of,
    judged_by,
    noisy,
    quantised,
    same,
    scaled,
    seeded,
    sharp,
    untrained_cnn,
)
from torch import Tensor, nn

from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.flags import Judged, flags
from components.evaluation.judge import judge
from components.evaluation.probe import probe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["honest", "robust", "confident", "untrained"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 1.0)])
def test_nothing_fires_on_an_honest_network(
    name: str, norm: str, eps: float, request: pytest.FixtureRequest, test_images: Batch
) -> None:
    if name == "untrained":
        model = untrained_cnn(3).eval()
    elif name == "confident":  # half of the margins are above 11: small gradients are no defect
        model = Then(request.getfixturevalue("honest"), same, lambda z: 3 * z)
    else:
        model = request.getfixturevalue(name)
    attacks = ITERATED[1:3] if norm == "linf" else ()
    made = flags_of(model, test_images, attacks, norm, eps)
    assert fired(made) == set()
    assert "Not measurable" not in "".join(f.measured for n, f in made.items() if n != "active_test_failed")


WHITE_BOX = ("fgsm:eps=0.1", "bim:eps=0.1,steps=20", "pgd:eps=0.1,steps=20")


MIXTURE = "autoattack:eps=0.1,steps=5,queries=300"


SQUARE = "square:eps=0.1,queries=300"


@pytest.mark.slow
def test_nothing_fires_on_an_honest_network_under_the_whole_suite(
    honest: nn.Module, robust: nn.Module, test_images: Batch
) -> None:
    """A robust one, of which the attacks leave something: on the other everything is broken by everyone."""
    model, other = robust, honest
    suite = (*WHITE_BOX, *STRONG[:3], MIXTURE, "ddn:steps=20", "pgd:eps=1.5,norm=l2,steps=20")
    judged = [judged_by(model, test_images, "white_box", text) for text in suite]
    judged += [judged_by(model, test_images, "black_box", SQUARE)]
    judged += [judged_by(model, test_images, "random", text) for text in ("noise:eps=0.1", "noise:eps=1.5,norm=l2")]
    for text in (*WHITE_BOX, "ddn:steps=20"):
        spec = AttackSpec.parse(text)
        examples = run_attack(spec, other, *test_images, generator=seeded(2))
        columns = judge(model, test_images[0], examples, test_images[1])
        judged.append(Judged(threat_model="transfer", spec=spec, columns=columns))
    made = flags(probe(model, *test_images, eps=EPS, norm="linf", generator=seeded()), judged)
    assert {f.name for f in made if f.fired} == set()
    assert made[1].measured.count("without autoattack") == 5  # Square, noise and three attacks transferred


def test_square_is_stronger_where_gradients_are_masked_although_autoattack_ends_in_one(
    honest: nn.Module, test_images: Batch
) -> None:
    model = quantised(honest)
    judged = [judged_by(model, test_images, "white_box", text) for text in (*WHITE_BOX, STRONG[0], MIXTURE)]
    square = judged_by(model, test_images, "black_box", SQUARE)
    mixture, label = judged[-1].columns["adversarial_prediction"], square.columns["label"]
    left = (square.columns["adversarial_prediction"] == label).sum()
    assert (mixture == label).sum() <= left + 8  # with it on the other side nothing would fire
    (made,) = [f for f in flags(clean_probe(), [*judged, square]) if f.name == OTHERS]
    assert made.fired
    assert made.attacks == (f"black_box {square.spec}",)
    assert "(without autoattack, which ends in a Square)" in made.measured
    # alone it is nothing to compare with
    (alone,) = [f for f in flags(clean_probe(), [judged[-1], square]) if f.name == OTHERS]
    assert alone.measured.startswith("Not measurable")


def along_the_mean(*knots: tuple[float, float]) -> nn.Module:
    """Class 1 where a piecewise linear function of the mean pixel, given by its knots, is above 0."""

    def rows(mean: Tensor) -> Tensor:
        score = torch.full_like(mean, knots[0][1])
        for (start, low), (stop, high) in itertools.pairwise(knots):
            score = score + (high - low) * ((mean - start) / (stop - start)).clamp(0, 1)
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return Table(rows)


def test_a_ridge_before_the_boundary_stops_short_steps() -> None:
    """The loss rises up to a mean of 0.52 and falls up to 0.535; the boundary is behind. FGSM and five steps leap over it."""
    model = along_the_mean((0.0, -13.5), (0.52, -0.5), (0.535, -1.5), (1.0, 45.0))
    images = torch.full((20, 1, 28, 28), 0.5), torch.zeros(20, dtype=torch.int64)
    judged = [judged_by(model, images, "white_box", text) for text in WHITE_BOX]
    made = flags(probe(model, *images, eps=EPS, norm="linf", generator=seeded()), judged)
    assert {f.name for f in made if f.fired} == {SINGLE, "not_falling_with_steps"}
    assert made[0].attacks == tuple(str(j.spec) for j in judged[1:])


def test_a_band_of_another_class_is_leapt_over_by_long_steps() -> None:
    """Behind it the loss rises without ever reaching a boundary again, so a larger ball is a trap."""
    model = along_the_mean((0.0, -15.0), (0.5475, 0.5), (0.57, -2.0), (1.0, -1.0))
    images = torch.full((20, 1, 28, 28), 0.5), torch.zeros(20, dtype=torch.int64)
    made = flags(probe(model, *images, eps=EPS, norm="linf", generator=seeded()), [])
    assert {f.name for f in made if f.fired} == {"not_falling_with_eps"}


@pytest.mark.slow
def test_hard_quantisation_has_no_gradient(honest: nn.Module, test_images: Batch) -> None:
    attacks = ("pgd:eps=0.1,steps=20", "ddn:steps=20")
    made = flags_of(quantised(honest), test_images, attacks)
    assert {"not_zero_at_unbounded_eps", "zero_gradients", "active_test_failed"} <= fired(made)
    assert fired(made).isdisjoint({"random_output", "not_logits", "not_falling_with_steps"})
    assert "BPDA" in made["zero_gradients"].remedy
    assert made["active_test_failed"].attacks == tuple(str(AttackSpec.parse(text)) for text in attacks)


def test_a_sharp_softmax_has_no_gradient_and_can_tell_no_points_apart(honest: nn.Module, test_images: Batch) -> None:
    made = flags_of(sharp(honest), test_images, ("pgd:eps=0.1,steps=20",))
    assert {"not_zero_at_unbounded_eps", "zero_gradients", "not_logits"} <= fired(made)
    assert "BPDA" in made["zero_gradients"].remedy
    assert "(decides nothing)" in made["active_test_failed"].measured


@pytest.mark.slow
def test_large_logits_saturate_the_cross_entropy_alone(honest: nn.Module, test_images: Batch) -> None:
    made = flags_of(scaled(honest), test_images, ("pgd:eps=0.1,steps=20", "ddn:steps=20"))
    assert {"not_zero_at_unbounded_eps", "zero_gradients", "active_test_failed"} <= fired(made)
    assert fired(made).isdisjoint({"random_output", "not_logits"})
    assert "margin" in made["zero_gradients"].remedy
    assert "BPDA" not in made["zero_gradients"].remedy


def test_noise_at_inference(honest: nn.Module, test_images: Batch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = flags_of(noisy(honest), test_images)
    assert "random_output" in fired(made)
    assert fired(made).isdisjoint({"not_logits", "zero_gradients", "active_test_failed"})
    assert "EOT" in made["random_output"].remedy


@pytest.mark.parametrize(("after", "kind"), [("log_softmax", "log_probabilities"), ("softmax", "probabilities")])
def test_outputs_that_are_no_logits(after: str, kind: str, honest: nn.Module, test_images: Batch) -> None:
    model = Then(honest, same, lambda z: getattr(z, after)(dim=1))
    assert probe(model, *test_images, eps=EPS, norm="linf", generator=seeded())["output"] == kind
    assert fired(flags_of(model, test_images, ("pgd:eps=0.1,steps=20",))) == {"not_logits"}
