"""Flags on networks with a planted defect and on honest ones, and on constructed evaluations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_cnn import digits
from torch import Tensor, nn

from components.attacks import apgd, fab
from components.attacks.common import loss_gradient
from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.pgd import pgd
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.errors import ConfigError
from components.evaluation import active_test as evaluation_active_test
from components.evaluation import probe as evaluation_probe
from components.evaluation.active_test import active_test
from components.evaluation.flags import Flag, Judged, flags
from components.evaluation.judge import AttackViolation, judge
from components.evaluation.probe import probe
from components.models.adapter_check import check_output

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 0.1
NAMES = [
    "iterative_weaker_than_single_step",
    "black_box_or_transfer_stronger",
    "not_zero_at_unbounded_eps",
    "not_falling_with_eps",
    "not_falling_with_steps",
    "zero_gradients",
    "random_output",
    "batch_dependent_output",
    "not_logits",
    "active_test_failed",
]
Batch = tuple[Tensor, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_cnn(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 12, 5, 2, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 24, 5, 2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 49, 10),
        )


def trained(x: Tensor, y: Tensor, eps: float = 0.0) -> nn.Module:
    """A small CNN after 120 steps; with eps, on examples of one PGD step."""
    model = small_cnn(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(64):
                images = x[rows]
                if eps:
                    images = pgd(model, images, y[rows], eps=eps, steps=1, step_size=1.25 * eps)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), y[rows]).backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="module")
def test_images() -> Batch:
    return digits("test", 48)


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    return trained(*digits("train", 1500))


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return trained(*digits("train", 1500), eps=EPS)


class Then(nn.Module):
    """A network between two functions."""

    def __init__(self, inner: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def same(x: Tensor) -> Tensor:
    return x


def quantised(inner: nn.Module) -> nn.Module:
    return Then(inner, lambda x: (8 * x).round() / 8, same)


def sharp(inner: nn.Module) -> nn.Module:
    return Then(inner, same, lambda z: (1000 * z).softmax(dim=1))


def scaled(inner: nn.Module) -> nn.Module:
    return Then(inner, same, lambda z: 1000 * z)


def noisy(inner: nn.Module) -> nn.Module:
    return Then(inner, lambda x: x + 0.05 * torch.randn_like(x), same)


# --- whole networks


def judged_by(model: nn.Module, batch: Batch, threat: str, text: str) -> Judged:
    spec = AttackSpec.parse(text)
    examples = run_attack(spec, model, *batch, generator=seeded(2))
    return Judged(threat_model=threat, spec=spec, columns=judge(model, batch[0], examples, batch[1]))


def flags_of(
    model: nn.Module, batch: Batch, attacks: tuple[str, ...] = (), norm: Any = "linf", eps: float = EPS
) -> dict[str, Flag]:
    """Everything at once; what is measured must survive JSON on the way."""
    measured = probe(model, *batch, eps=eps, norm=norm, generator=seeded())
    active = [
        active_test(model, batch[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1))
        for spec in map(AttackSpec.parse, attacks)
    ]
    again = json.loads(json.dumps([measured, active], allow_nan=False))
    assert again == [measured, active]
    judged = [
        judged_by(model, batch, "white_box", f"fgsm:eps={EPS}"),
        judged_by(model, batch, "white_box", f"pgd:eps={EPS},steps=20"),
        judged_by(model, batch, "random", f"noise:eps={EPS}"),
    ]
    made = flags(again[0], judged, again[1])
    assert [f.name for f in made] == NAMES
    for flag in made:
        assert flag.measured
        assert flag.remedy
        json.dumps(flag.to_dict(), allow_nan=False)
    return {f.name: f for f in made}


def fired(made: dict[str, Flag]) -> set[str]:
    return {name for name, flag in made.items() if flag.fired}


ITERATED = (
    "pgd:eps=0.1,steps=20",
    "pgd:eps=0.3,steps=20",
    "pgd:eps=1.5,norm=l2,steps=20",
    "ddn:steps=20",
    "cw:steps=20,binary_search_steps=3",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["honest", "robust", "confident", "untrained"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 1.0)])
def test_nothing_fires_on_an_honest_network(
    name: str, norm: str, eps: float, request: pytest.FixtureRequest, test_images: Batch
) -> None:
    if name == "untrained":
        model = small_cnn(3).eval()
    elif name == "confident":  # half of the margins are above 11: small gradients are no defect
        model = Then(request.getfixturevalue("honest"), same, lambda z: 3 * z)
    else:
        model = request.getfixturevalue(name)
    attacks = ITERATED[1:3] if norm == "linf" else ()
    made = flags_of(model, test_images, attacks, norm, eps)
    assert fired(made) == set()
    assert "Not measurable" not in "".join(f.measured for n, f in made.items() if n != "active_test_failed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["honest", "robust"])
@pytest.mark.parametrize("text", ITERATED)
def test_an_attack_that_works_finds_what_was_planted(
    name: str, text: str, request: pytest.FixtureRequest, test_images: Batch
) -> None:
    spec = AttackSpec.parse(text)
    result = active_test(
        request.getfixturevalue(name), test_images[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1)
    )
    assert (result["n"], result["found"], result["left_out"], result["passed"]) == (16, 16, 0, True)
    assert result["random_found"] <= 4  # measured: 0 to 2; a test that chance passes shows nothing
    assert (result["attack"], result["norm"], result["eps"]) == (str(spec), spec.norm, spec.eps or 1.5)


@pytest.mark.parametrize("target", ["random", "least_likely", "runner_up"])
@pytest.mark.parametrize("text", ["pgd:eps=0.3,steps=20", "ddn:steps=20", "cw:steps=20,binary_search_steps=3"])
def test_a_targeted_attack_is_tested_with_the_class_that_is_planted(
    text: str, target: str, honest: nn.Module, test_images: Batch
) -> None:
    """No other can win there: aimed at those, every attack would look broken."""
    spec = AttackSpec.parse(f"{text},target={target}")
    result = active_test(honest, test_images[0][:8], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert (result["n"], result["found"], result["passed"]) == (8, 8, True)
    assert result["attack"] == str(spec)
    assert result["parts"] == [str(AttackSpec.parse(f"{text},target=runner_up"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "noise:eps=0.1",
        "noise:eps=1.5,norm=l2",
        "pgd:eps=0.1,steps=20,step_size=0.0001",
        "bim:eps=0.3,steps=1,step_size=0.01",
        "cw:lr=0.001,binary_search_steps=2",
        "cw:lr=0.001,binary_search_steps=2,target=least_likely",
    ],
)
def test_an_attack_that_does_not_work_is_found_out(text: str, honest: nn.Module, test_images: Batch) -> None:
    spec = AttackSpec.parse(text)
    result = active_test(honest, test_images[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert result["passed"] is False
    assert result["found"] <= 4
    assert result["high"] < result["threshold"]


STRONG = (
    "apgd:eps=0.1,steps=20",
    "apgd-t:eps=0.1,steps=5",
    "fab-t:steps=5",
    "autoattack:eps=0.1,steps=5",
    "square:eps=0.1,queries=1000",
)


@pytest.mark.slow
@pytest.mark.parametrize("text", STRONG)
def test_the_attacks_of_autoattack_find_what_was_planted_and_do_not_where_they_are_broken(
    text: str, honest: nn.Module, test_images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested(text: str) -> dict[str, Any]:
        return active_test(honest, test_images[0][:8], AttackSpec.parse(text), eps=0.1, generator=seeded(1))

    result = tested(text)
    assert (result["n"], result["passed"]) == (8, True)
    assert result["random_found"] <= 3

    def downhill(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        gradient, logits, losses = loss_gradient(*arguments)
        return -gradient, logits, losses

    monkeypatch.setattr(apgd, "loss_gradient", downhill)
    monkeypatch.setattr(fab, "loss_gradient", downhill)
    result = tested(text.replace("queries=1000", "queries=2"))
    assert (result["n"], result["passed"]) == (8, False)


@pytest.mark.slow
def test_autoattack_does_not_pass_by_its_square_alone(honest: nn.Module, test_images: Batch) -> None:
    """Square finds what is planted behind a quantiser, too; it says so under its own name."""

    def tested(text: str) -> dict[str, Any]:
        return active_test(quantised(honest), test_images[0][:8], AttackSpec.parse(text), eps=0.1, generator=seeded(1))

    mixture = tested("autoattack:eps=0.1,steps=5,queries=1000")
    parts = ("apgd:eps=0.1,steps=5", "apgd-t:eps=0.1,steps=5", "fab-t:steps=5")
    assert mixture["parts"] == [str(AttackSpec.parse(part)) for part in parts]
    assert mixture["passed"] is False
    (failed,) = [f for f in flags(clean_probe(), [], [mixture]) if f.fired]
    assert "(without its Square) found 0 of 8" in failed.measured
    assert tested("square:eps=0.1,queries=1000")["passed"] is not False


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
    assert "(without autoattack, which ends in a Square of its own)" in made.measured
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


class Normed(nn.Module):
    """Two blocks with a norm of one's choice between convolutions, and dropout before the head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 5, 2), norm(8), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8 * 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(x))
        return logits


class NormInTrainMode(Normed):
    """A wrapper whose forward pass puts batch norm back into training mode."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        return super().forward(x)


class Attending(nn.Module):
    """A transformer over the rows of an image; over the images of a batch where ``batch_first`` is wrong."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(28, 4, 32, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x.squeeze(1)).mean(dim=1))
        return logits


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    """An untrained network whose batch norms have statistics of data, if they keep any, in eval mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().train()
        model(digits("train", 64)[0])
    return model.eval()


def inner() -> nn.Module:
    return Normed(nn.BatchNorm2d)


BATCH_DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "batch norm without running statistics": lambda: Normed(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "batch norm in train mode": lambda: NormInTrainMode(nn.BatchNorm2d),
    "mean of the batch subtracted": lambda: Then(inner(), lambda x: x - x.mean(dim=0), same),
    "logits averaged over the batch": lambda: Then(inner(), same, lambda z: 0.9 * z + 0.1 * z.mean(dim=0)),
    "standardised over the batch": lambda: Then(inner(), lambda x: x / x.std(), same),
    "neighbour mixed in": lambda: Then(inner(), lambda x: 0.8 * x + 0.2 * x.roll(1, dims=0), same),
    "only batches defended": lambda: Then(inner(), lambda x: x if len(x) == 1 else (4 * x).round() / 4, same),
    "attention over the batch": lambda: Attending(batch_first=False),
}
BATCH_INDEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "batch norm": inner,
    "group norm": lambda: Normed(lambda c: nn.GroupNorm(2, c)),
    "instance norm": lambda: Normed(nn.InstanceNorm2d),
    "transformer": Attending,
    "views of one image averaged": lambda: Then(inner(), lambda x: (x + x.flip(3)) / 2, same),
    "quantised": lambda: quantised(inner()),
    "constant": lambda: Then(inner(), same, lambda z: 0 * z),
    "small logits": lambda: Then(inner(), same, lambda z: 1e-12 * z),
}


def dependence_of(model: nn.Module, x: Tensor, at_once: int = 64) -> Flag:
    """The flag alone: a whole probe attacks, which is beside the point here."""
    (first, again) = (evaluation_probe.checked_outputs(model, x, at_once) for _ in range(2))
    noise = float((first - again).abs().max())
    measured = evaluation_probe._batch_dependence(model, x, first, noise, at_once)
    json.dumps(measured, allow_nan=False)
    return next(f for f in flags(clean_probe(batch_dependence=measured), []) if f.name == "batch_dependent_output")


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize("name", BATCH_DEPENDENT)
def test_an_output_that_depends_on_its_neighbours(name: str, images: int, test_images: Batch) -> None:
    if name == "neighbour mixed in" and images == 1:
        images = 3
    flag = dependence_of(fresh(BATCH_DEPENDENT[name]), test_images[0][:images])
    assert flag.fired
    assert "eval mode" in flag.remedy
    assert f"of {images} images depend" in flag.measured


@pytest.mark.parametrize(("images", "at_once"), [(1, 64), (48, 64), (9, 2)])
@pytest.mark.parametrize("name", BATCH_INDEPENDENT)
def test_an_output_of_the_image_alone(name: str, images: int, at_once: int, test_images: Batch) -> None:
    assert not dependence_of(fresh(BATCH_INDEPENDENT[name]), test_images[0][:images], at_once).fired


@pytest.mark.parametrize(
    "norm", [lambda c: nn.BatchNorm1d(c, track_running_stats=False), lambda c: nn.LayerNorm(c)], ids=["batch", "layer"]
)
def test_a_network_that_takes_no_single_image_is_refused_when_it_is_built(norm: Callable[[int], nn.Module]) -> None:
    """PyTorch has no statistics of one value per channel: every attack that is left with one image would fail."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), norm(3))
    if isinstance(net[2], nn.LayerNorm):
        check_output(net, 1, 2, 3)
        return
    with pytest.raises(ConfigError, match="one at a time, though it does on several: put every batch norm into eval"):
        check_output(net, 1, 2, 3)


def test_only_the_batch_flag_fires_where_only_the_batch_is_wrong(honest: nn.Module, test_images: Batch) -> None:
    model = Then(honest, same, lambda z: z + 0.3 * (z - z.mean(dim=0)))
    assert fired(flags_of(model, test_images)) == {"batch_dependent_output"}


def test_noise_is_no_dependence_on_the_batch_but_may_come_with_it(test_images: Batch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not dependence_of(noisy(fresh(inner)), test_images[0]).fired
        assert not dependence_of(
            Then(fresh(inner), same, lambda z: z + 1e-3 * torch.randn_like(z)), test_images[0]
        ).fired
        both = Then(fresh(inner), lambda x: x - x.mean(dim=0), lambda z: z + 1e-3 * torch.randn_like(z))
        assert dependence_of(both, test_images[0]).fired


@pytest.mark.parametrize(("after", "kind"), [("log_softmax", "log_probabilities"), ("softmax", "probabilities")])
def test_outputs_that_are_no_logits(after: str, kind: str, honest: nn.Module, test_images: Batch) -> None:
    model = Then(honest, same, lambda z: getattr(z, after)(dim=1))
    assert probe(model, *test_images, eps=EPS, norm="linf", generator=seeded())["output"] == kind
    assert fired(flags_of(model, test_images, ("pgd:eps=0.1,steps=20",))) == {"not_logits"}


# --- probe


class Table(nn.Module):
    """Outputs that depend on the mean pixel: given by a function of [N]."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.flatten(1).mean(dim=1))


def grey(n: int, value: float = 0.5) -> Batch:
    return torch.full((n, 1, 2, 2), value), torch.zeros(n, dtype=torch.int64)


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


def small_linear(classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes)).eval()


# --- active test


PGD = AttackSpec.parse("pgd:eps=0.1,steps=20")


def spied(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[Any, ...]]:
    """Record what the attack is given; ``change(clean, examples)`` is what it returns."""
    seen: list[tuple[Any, ...]] = []

    def attack(
        spec: AttackSpec, model: nn.Module, fast: nn.Module | None, inputs: Tensor, labels: Tensor, **options: Any
    ) -> Tensor:
        seen.append((model, inputs, labels, {"fast": fast, **options}))
        return change(inputs, run_attack_on_copy(spec, model, fast, inputs, labels, **options))

    monkeypatch.setattr(evaluation_active_test, "run_attack_on_copy", attack)
    return seen


@pytest.mark.parametrize("text", ["pgd:eps=0.1,steps=20", "ddn:steps=5"])
def test_the_planted_network(text: str, monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch) -> None:
    seen = spied(monkeypatch, lambda clean, examples: examples)
    spec = AttackSpec.parse(text)
    active_test(honest, test_images[0][:8], spec, eps=spec.eps or 1.5, generator=seeded(1))
    assert len(seen) == 8
    for i, (model, inputs, labels, options) in enumerate(seen):
        torch.testing.assert_close(inputs, test_images[0][i : i + 1], rtol=0, atol=0)
        assert labels.tolist() == [0]
        assert options["stop_on_success"] is (spec.name == "pgd")
        at = torch.cat([inputs, torch.rand(200, 1, 28, 28, generator=seeded(3))])
        with torch.no_grad():
            logits, own = model(at), honest(inputs)
        assert logits.shape == (201, 10)  # as many as the network has
        assert logits[0].argmax() == 0
        assert bool((logits.argmax(dim=1) < 2).all())
        assert bool((logits[:, 2:] == logits[0, 2]).all())
        # not surer of the clean image than the network itself
        assert 0 < float(logits[0, 0] - logits[0, 1]) <= float(own.topk(2).values.diff().abs()) * 1.001


def test_the_attack_searches_on_the_stand_in_and_the_network_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    seen = spied(monkeypatch, lambda clean, examples: examples)
    judges: list[nn.Module] = []

    def judging(model: nn.Module, *batch: Tensor) -> Any:
        judges.append(model)
        return judge(model, *batch)

    monkeypatch.setattr(evaluation_active_test, "judge", judging)

    def tested(fast: nn.Module | None, text: str = "ddn:steps=20") -> dict[str, Any]:
        return active_test(honest, test_images[0][:8], AttackSpec.parse(text), eps=1.5, fast=fast, generator=seeded(1))

    assert tested(None)["found"] == 8
    seen.clear()
    judges.clear()
    # its logits are larger, so what is found just over its boundary is not over the network's, and is searched for again
    near = Then(honest, same, lambda z: 1.05 * z)
    assert tested(near)["found"] == 8
    for (planted, clean, _, options), judged in zip(seen, judges, strict=True):
        assert planted.model is judged.model is honest
        assert options["fast"].model is near
        at = torch.cat([clean, test_images[0]])
        torch.testing.assert_close(options["fast"].on(honest)(at), planted(at), rtol=0, atol=0)
    # without a gradient nothing is found, although the network has one
    assert tested(quantised(honest))["found"] == 0


def test_inner_points_are_class_0_and_the_planted_one_is_not(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    made: list[tuple[str, Tensor]] = []
    around = evaluation_active_test._around

    def spy(clean: Tensor, eps: float, norm: Any, n: int, generator: Any) -> Tensor:
        points = around(clean, eps, norm, n, generator)
        made.append((f"{eps:.4g}", points))
        return points

    monkeypatch.setattr(evaluation_active_test, "_around", spy)
    for norm, eps in (("linf", 0.1), ("l2", 1.5)):
        made.clear()
        clean = test_images[0][:1]
        planted = evaluation_active_test._plant(honest, clean, eps, norm, 32, seeded(4), 64)
        assert planted is not None
        (inner_eps, inner), (outer_eps, outer) = made
        assert (inner_eps, outer_eps) == (f"{0.95 * eps:.4g}", f"{eps:.4g}")
        assert len(inner) == 31
        with torch.no_grad():
            assert planted(torch.cat([clean, inner])).argmax(dim=1).tolist() == [0] * 32
            assert 1 in planted(outer).argmax(dim=1)
        order = math.inf if norm == "linf" else 2
        for points, distance in ((inner, 0.95 * eps), (outer, eps)):
            norms = torch.linalg.vector_norm((points - clean).double().flatten(1), ord=order, dim=1)
            assert norms.max() <= distance * (1 + 1e-6)
            assert norms.min() > 0.97 * distance
            assert points.min() >= 0
            assert points.max() <= 1


def test_an_example_beyond_eps_is_not_found(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    spec = AttackSpec.parse("ddn:steps=20")
    norms: list[float] = []

    def lengthen(clean: Tensor, examples: Tensor) -> Tensor:
        delta = examples - clean
        longer = (clean + delta * (2.5 / delta.norm())).clamp(0, 1)
        norms.append(float((longer - clean).norm()))
        return longer

    spied(monkeypatch, lengthen)
    result = active_test(honest, test_images[0][:8], spec, eps=1.5, generator=seeded(1))
    assert min(norms) > 1.51
    assert (result["n"], result["found"], result["passed"]) == (8, 0, False)


def test_an_attack_that_breaks_its_rules_is_an_error(
    monkeypatch: pytest.MonkeyPatch, honest: nn.Module, test_images: Batch
) -> None:
    spied(monkeypatch, lambda clean, examples: (clean + 0.2).clamp(0, 1))
    with pytest.raises(AttackViolation, match="sample 0 "):
        active_test(honest, test_images[0][:8], PGD, eps=0.1, generator=seeded(1))


def test_where_chance_finds_everything_nothing_is_decided() -> None:
    """Four pixels: 100 random corners hit the planted one."""
    grey_images = grey(16)[0]
    result = active_test(small_linear(), grey_images, PGD, eps=0.1, generator=seeded())
    assert (result["n"], result["found"], result["random_found"], result["passed"]) == (16, 16, 16, None)
    result = active_test(small_linear(), grey_images, AttackSpec.parse("noise:eps=0.1"), eps=0.1, generator=seeded())
    assert result["random_found"] == 16
    assert result["passed"] is False  # failing says enough


def test_too_few_images_decide_nothing(honest: nn.Module, test_images: Batch) -> None:
    for n, noise, pgd_ in ((7, None, None), (8, False, True)):
        for text, passed in (("noise:eps=0.1", noise), ("pgd:eps=0.1,steps=20", pgd_)):
            spec = AttackSpec.parse(text)
            assert active_test(honest, test_images[0][:n], spec, eps=0.1, generator=seeded())["passed"] is passed


@pytest.mark.parametrize("images", [0, 9])
def test_a_constant_network_has_nothing_to_be_planted_in(images: int) -> None:
    model = Table(lambda m: torch.tensor([[2.0, 1.0]]) + 0 * m[:, None])
    result = active_test(model, grey(images)[0], PGD, eps=0.1, generator=seeded())
    assert (result["n"], result["left_out"], result["found"]) == (0, images, 0)
    assert (result["share"], result["random_share"], result["passed"]) == (None, None, None)
    assert (result["low"], result["high"]) == (0, 1)


def test_the_same_generator_gives_the_same_result_and_the_model_stays_as_it_is(
    honest: nn.Module, test_images: Batch
) -> None:
    before = {name: value.clone() for name, value in honest.state_dict().items()}
    first, second = (
        (
            probe(honest, *test_images, eps=EPS, norm="linf", generator=seeded(5)),
            active_test(honest, test_images[0][:8], AttackSpec.parse("noise:eps=0.3"), eps=0.3, generator=seeded(5)),
        )
        for _ in range(2)
    )
    assert first == second
    assert not honest.training
    for name, parameter in honest.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("pgd:eps=0.1", {"eps": 0.2}, "eps=0.2"),
        ("ddn", {"eps": 0.0}, "eps=0.0"),
        ("ddn", {"eps": 1.0, "n_inner": 1}, "n_inner=1"),
        ("ddn", {"eps": 1.0, "inputs": 2 * torch.ones(2, 1, 2, 2)}, "in \\[0,1\\]"),
        ("ddn", {"eps": 1.0, "model": Table(lambda m: m[:, None])}, "K >= 2"),
    ],
)
def test_active_test_refuses(spec: str, change: dict[str, Any], message: str) -> None:
    arguments = {"model": small_linear(), "inputs": grey(2)[0], **change}
    with pytest.raises(ValueError, match=message):
        active_test(arguments.pop("model"), arguments.pop("inputs"), AttackSpec.parse(spec), **arguments)


# --- flags from constructed evaluations

N = 100
ALIVE = {"zero": 0, "not_finite": 0, "tiny": 0}


def runs(key: str, counts: dict[float, int], n: int = N) -> list[dict[str, Any]]:
    """``count`` of n images are correct, the first ones."""
    return [{key: value, "correct": [i < count for i in range(n)]} for value, count in counts.items()]


def dependence(images: int, n: int = N) -> dict[str, Any]:
    measured = {"batches": 3, "largest_difference": 1.0 if images else 0.0, "largest_output": 10.0, "changed": 0}
    return {"n": n, "dependent": images, **measured}


def clean_probe(**change: Any) -> dict[str, Any]:
    """What an ordinary network gives."""
    return {
        "n": N,
        "clean_correct": N,
        "norm": "linf",
        "eps": 0.1,
        "output": "logits",
        "random_output": {"passes": 5, "largest_difference": 0.0, "largest_output": 10.0, "changed": 0},
        "batch_dependence": dependence(0),
        "zero_gradients": {"n": N, "cross_entropy": ALIVE, "margin": ALIVE},
        "accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 20, 0.4: 0, 1.0: 0}),
        "unbounded_accuracy": 0.0,
        "accuracy_by_steps": runs("steps", {5: 63, 20: 60, 50: 60}),
        **change,
    }


def names(measured: dict[str, Any] | None = None, judged: tuple[Judged, ...] = (), active: Any = None) -> set[str]:
    return {f.name for f in flags(measured or clean_probe(), judged, active) if f.fired}


def dead(**counts: int) -> dict[str, Any]:
    return {"n": N, "cross_entropy": {**ALIVE, **counts}, "margin": ALIVE}


def random_output(difference: float) -> dict[str, Any]:
    return {"passes": 5, "largest_difference": difference, "largest_output": 10.0, "changed": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        # the lower end of the interval of 5 of 100 is 0.022, of 4 of 100 0.016, of 3 of 100 0.010, of 2 of 100 0.006
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 1.0: 2})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 1.0: 4})}, {"not_zero_at_unbounded_eps"}),
        # found in a smaller ball is found
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 0, 1.0: 4})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 7, 1.0: 0})}, set()),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 8, 1.0: 0})}, {"not_falling_with_eps"}),
        (
            {"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 60, 1.0: 60})},
            {"not_zero_at_unbounded_eps", "not_falling_with_eps"},
        ),
        (
            {"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 56, 1.0: 53})},
            {"not_zero_at_unbounded_eps", "not_falling_with_eps"},
        ),
        ({"accuracy_by_eps": runs("eps", {0.1: 60, 0.2: 56, 1.0: 52})}, {"not_zero_at_unbounded_eps"}),
        ({"accuracy_by_eps": runs("eps", {1.0: 60})}, {"not_zero_at_unbounded_eps"}),
        ({"accuracy_by_eps": runs("eps", {0.1: 0, 0.2: 0, 1.0: 0})}, set()),
        ({"accuracy_by_steps": runs("steps", {5: 60, 20: 67, 50: 60})}, set()),
        ({"accuracy_by_steps": runs("steps", {5: 60, 20: 68, 50: 60})}, {"not_falling_with_steps"}),
        ({"accuracy_by_steps": runs("steps", {5: 0, 20: 0, 50: 0})}, set()),
        ({"zero_gradients": dead(zero=5)}, set()),
        ({"zero_gradients": dead(zero=6)}, {"zero_gradients"}),
        ({"zero_gradients": dead(not_finite=6)}, {"zero_gradients"}),
        ({"zero_gradients": dead(tiny=2, zero=2, not_finite=2)}, {"zero_gradients"}),
        ({"zero_gradients": {"n": N, "cross_entropy": ALIVE, "margin": {**ALIVE, "zero": 6}}}, {"zero_gradients"}),
        ({"random_output": random_output(9e-4)}, set()),
        ({"random_output": random_output(2e-3)}, {"random_output"}),
        ({"batch_dependence": dependence(5)}, set()),
        ({"batch_dependence": dependence(6)}, {"batch_dependent_output"}),
        # a single image that rounding moves is no sign, unless it is the only one
        ({"batch_dependence": dependence(1, 8)}, set()),
        ({"batch_dependence": dependence(2, 8)}, {"batch_dependent_output"}),
        ({"batch_dependence": dependence(0, 1)}, set()),
        ({"batch_dependence": dependence(1, 1)}, {"batch_dependent_output"}),
        ({"output": "probabilities"}, {"not_logits"}),
        ({"output": "log_probabilities"}, {"not_logits"}),
    ],
)
def test_flags_of_a_probe(change: dict[str, Any], expected: set[str]) -> None:
    assert names(clean_probe(**change)) == expected


def test_the_remedy_names_what_saturates() -> None:
    def remedy(**counts: Any) -> str:
        made = flags(clean_probe(zero_gradients={"n": N, "cross_entropy": ALIVE, "margin": ALIVE, **counts}), [])
        return next(f.remedy for f in made if f.name == "zero_gradients")

    gone = {**ALIVE, "zero": N}
    assert "BPDA" in remedy(cross_entropy=gone, margin=gone)
    assert "BPDA" not in remedy(cross_entropy=gone)


def evaluation(
    threat: str,
    text: str,
    broken: range,
    *,
    clean_wrong: range = range(0),
    norms: float | None = None,
    n: int = N,
) -> Judged:
    """Samples ``broken`` fall to the attack, all examples having its eps as their norm (or ``norms``)."""
    spec = AttackSpec.parse(text)
    clean, adversarial = np.zeros(n, np.int32), np.zeros(n, np.int32)
    clean[list(clean_wrong)] = 1
    adversarial[list(broken)] = 1
    # as far above eps as verify_examples allows
    above = {"linf": lambda eps: eps + 9e-7, "l2": lambda eps: eps * (1 + 9e-6)}[str(spec.norm)]
    at = np.full(n, above(spec.eps) if norms is None and spec.eps else norms or 0.0)
    columns = {
        "label": np.zeros(n, np.int32),
        "clean_prediction": clean,
        "adversarial_prediction": adversarial,
        "rounded_prediction": adversarial,
        "l2": at,
        "linf": at,
    }
    return Judged(threat_model=threat, spec=spec, columns=columns)


FGSM = "fgsm:eps=0.1"
SINGLE, OTHERS = "iterative_weaker_than_single_step", "black_box_or_transfer_stronger"


@pytest.mark.parametrize(
    ("step", "iterated"),
    [(FGSM, "bim:eps=0.1"), (FGSM, "pgd:eps=0.1,steps=40"), (f"{FGSM},norm=l2", "apgd:eps=0.1,norm=l2")],
)
@pytest.mark.parametrize(
    ("single", "weaker", "fires"),
    [
        (range(50), range(42), True),  # eight more: p = 0.0078
        (range(50), range(43), False),  # seven more: p = 0.016
        (range(42), range(50), False),
        (range(50), range(50), False),
        (range(N), range(N), False),
        (range(0), range(0), False),
        (range(60), range(30, 90), False),  # 30 each way
    ],
)
def test_iterative_weaker_than_single_step(step: str, iterated: str, single: range, weaker: range, fires: bool) -> None:
    judged = (evaluation("white_box", step, single), evaluation("white_box", iterated, weaker))
    assert names(judged=judged) == ({SINGLE} if fires else set())
    assert names(judged=judged[::-1]) == ({SINGLE} if fires else set())
    made = flags(clean_probe(), judged)[0]
    assert made.attacks == ((str(judged[1].spec),) if fires else ())
    assert str(judged[1].spec) in made.measured


@pytest.mark.parametrize(
    "other",
    [
        evaluation("white_box", "pgd:eps=0.05", range(10)),
        evaluation("white_box", "pgd:eps=0.1,norm=l2", range(10)),
        evaluation("white_box", "noise:eps=0.1", range(10)),
        evaluation("white_box", "square:eps=0.1", range(10)),
        evaluation("white_box", "adaptive:eps=0.1", range(10)),
        evaluation("white_box", "pgd:eps=0.1,target=random", range(10)),
        evaluation("white_box", "ddn", range(10), norms=0.1),
    ],
    ids=lambda j: str(j.spec),
)
def test_what_a_single_step_is_not_compared_with(other: Judged) -> None:
    judged = (evaluation("white_box", FGSM, range(50)), other)
    assert names(judged=judged) == set()
    assert "Not measurable" in flags(clean_probe(), judged)[0].measured


def test_single_step_examples_may_transfer_better() -> None:
    judged = (evaluation("transfer", FGSM, range(50)), evaluation("transfer", "pgd:eps=0.1", range(10)))
    assert names(judged=judged) == set()


@pytest.mark.parametrize("threat", ["black_box", "transfer", "transfer:vgg16", "grey_box", "random"])
@pytest.mark.parametrize(
    ("theirs", "white", "fires"),
    [
        (range(50), range(42), True),
        (range(50), range(43), False),
        (range(42), range(50), False),
        (range(N), range(N), False),
        (range(0), range(0), False),
    ],
)
def test_others_stronger_than_white_box(threat: str, theirs: range, white: range, fires: bool) -> None:
    judged = (evaluation(threat, "bim:eps=0.1", theirs), evaluation("white_box", "pgd:eps=0.1", white))
    assert names(judged=judged) == ({OTHERS} if fires else set())
    made = flags(clean_probe(), judged)[1]
    assert made.attacks == ((f"{threat} {judged[0].spec}",) if fires else ())


def test_what_fires_is_not_buried_under_what_does_not() -> None:
    strong, *weak = (evaluation("transfer", f"bim:eps=0.1,steps={i}", range(50 if i == 1 else 2)) for i in range(1, 5))
    white = evaluation("white_box", "pgd:eps=0.1", range(10))
    said = flags(clean_probe(), (strong, *weak, white))[1].measured
    assert said.count("breaks 40 of") == said.count("breaks") - 1 == 1
    assert said.endswith("of 3 others none breaks significantly more")
    assert "others" not in flags(clean_probe(), (strong, white))[1].measured
    assert flags(clean_probe(), (*weak, white))[1].measured.count("breaks 0 of") == 3


def test_white_box_attacks_count_together() -> None:
    parts = (
        evaluation("white_box", "pgd:eps=0.1", range(30)),
        evaluation("white_box", FGSM, range(30, 50)),
    )
    other = evaluation("transfer", "bim:eps=0.1", range(50))
    assert OTHERS in names(judged=(*parts[:1], other))
    assert OTHERS not in names(judged=(*parts, other))


@pytest.mark.parametrize(
    ("white", "fires"),
    [
        (("pgd:eps=0.1", {}), True),
        (("pgd:eps=0.2", {}), True),  # a larger budget, and still weaker
        (("pgd:eps=0.05", {}), False),  # a smaller one may be weaker
        (("pgd:eps=0.1,norm=l2", {}), False),
    ],
)
def test_budgets_that_are_compared(white: tuple[str, dict[str, Any]], fires: bool) -> None:
    judged = (
        evaluation("transfer", "bim:eps=0.1", range(50)),
        evaluation("white_box", white[0], range(10), **white[1]),
    )
    assert names(judged=judged) == ({OTHERS} if fires else set())
    assert ("Not measurable" in flags(clean_probe(), judged)[1].measured) is not fires


@pytest.mark.parametrize(("norm_found", "fires"), [(0.4, False), (0.5, False), (0.6, True)])
def test_minimal_norm_attacks_count_within_the_budget_of_the_other(norm_found: float, fires: bool) -> None:
    judged = (
        evaluation("transfer", "pgd:eps=0.5,norm=l2", range(50)),
        evaluation("white_box", "ddn", range(N), norms=norm_found),
        evaluation("white_box", "pgd:eps=2,norm=l2", range(5), norms=2.0),
    )
    assert names(judged=judged) == ({OTHERS} if fires else set())
    # two of them are compared at any norm
    judged = (evaluation("transfer", "ddn", range(50), norms=9.0), evaluation("white_box", "cw", range(40), norms=1.0))
    assert names(judged=judged) == {OTHERS}
    judged = (evaluation("transfer", "ddn", range(50), norms=9.0), evaluation("white_box", "cw", range(50), norms=1.0))
    assert names(judged=judged) == set()


def test_what_is_wrong_without_an_attack_is_broken_for_everyone() -> None:
    """The single step happens to leave eight samples wrong that an iterative attack sets right by accident."""
    wrong = range(8)
    judged = (
        evaluation("white_box", FGSM, range(8), clean_wrong=wrong),
        evaluation("white_box", "pgd:eps=0.1", range(0), clean_wrong=wrong),
        evaluation("random", "noise:eps=0.1", range(8), clean_wrong=wrong),
    )
    assert names(judged=judged) == set()


def test_few_samples_decide_nothing() -> None:
    judged = (
        evaluation("white_box", FGSM, range(4), n=4),
        evaluation("white_box", "pgd:eps=0.1", range(0), n=4),
        evaluation("random", "noise:eps=0.1", range(4), n=4),
    )
    measured = clean_probe(
        n=2,
        clean_correct=2,
        zero_gradients={"n": 2, "cross_entropy": ALIVE, "margin": ALIVE},
        accuracy_by_eps=runs("eps", {0.1: 1, 0.2: 2, 1.0: 0}, n=2),
        accuracy_by_steps=runs("steps", {5: 1, 20: 2, 50: 2}, n=2),
    )
    assert names(measured, judged) == set()


def test_without_evaluations_nothing_can_be_compared() -> None:
    made = {f.name: f for f in flags(clean_probe(), [])}
    assert list(made) == NAMES
    for name in (SINGLE, OTHERS, "active_test_failed"):
        assert not made[name].fired
        assert made[name].measured.startswith("Not measurable")


def test_other_samples_cannot_be_compared() -> None:
    mine, other = evaluation("white_box", FGSM, range(5)), evaluation("random", "noise:eps=0.1", range(5), n=99)
    with pytest.raises(ValueError, match=r"random noise:eps=0\.1 was judged on other samples than fgsm:eps=0\.1"):
        flags(clean_probe(), [mine, other])


def test_active_tests_that_fail_are_named() -> None:
    def result(attack: str, passed: bool | None) -> dict[str, Any]:
        return {
            "attack": attack,
            "parts": [attack],
            "norm": "linf",
            "eps": 0.1,
            "n": 16,
            "left_out": 1,
            "found": 3,
            "random_found": 2,
            "passed": passed,
        }

    active = [result("a", True), result("b", False), result("c", None), result("d", False)]
    made = flags(clean_probe(), [], active)
    assert {f.name for f in made if f.fired} == {"active_test_failed"}
    assert made[-1].attacks == ("b", "d")
    assert made[-1].to_dict()["attacks"] == ["b", "d"]
    assert "b found 3 of 16" in made[-1].measured
    assert names(active=[result("a", True), result("c", None)]) == set()
