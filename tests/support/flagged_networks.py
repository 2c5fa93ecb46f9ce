"""Honest networks, networks with planted defects, and the flags that they raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks.pgd import pgd
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.active_test import active_test
from components.evaluation.flags import Flag, Judged, flags
from components.evaluation.judge import judge
from components.evaluation.probe import probe

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
SINGLE, OTHERS, *_ = NAMES
Batch = tuple[Tensor, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def untrained_cnn(seed: int) -> nn.Module:
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
    """Train a small CNN for 120 steps, with eps on examples of one PGD step."""
    model = untrained_cnn(0)
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


def judged_by(model: nn.Module, batch: Batch, threat: str, text: str) -> Judged:
    spec = AttackSpec.parse(text)
    examples = run_attack(spec, model, *batch, generator=seeded(2))
    return Judged(threat_model=threat, spec=spec, columns=judge(model, batch[0], examples, batch[1]))


def flags_of(
    model: nn.Module, batch: Batch, attacks: tuple[str, ...] = (), norm: Any = "linf", eps: float = EPS
) -> dict[str, Flag]:
    """Measure everything, pass it through JSON, and return the flags by name."""
    measured = probe(model, *batch, eps=eps, norm=norm, generator=seeded())
    active = [
        active_test(model, batch[0][:16], spec, eps=spec.eps or 1.5, generator=seeded(1))
        for spec in map(AttackSpec.parse, attacks)
    ]
    parsed = json.loads(json.dumps([measured, active], allow_nan=False))
    assert parsed == [measured, active]
    judged = [
        judged_by(model, batch, "white_box", f"fgsm:eps={EPS}"),
        judged_by(model, batch, "white_box", f"pgd:eps={EPS},steps=20"),
        judged_by(model, batch, "random", f"noise:eps={EPS}"),
    ]
    raised = flags(parsed[0], judged, parsed[1])
    assert [f.name for f in raised] == NAMES
    for flag in raised:
        assert flag.measured
        assert flag.remedy
        json.dumps(flag.to_dict(), allow_nan=False)
    return {f.name: f for f in raised}


def fired(raised: dict[str, Flag]) -> set[str]:
    return {name for name, flag in raised.items() if flag.fired}


ITERATED = (
    "pgd:eps=0.1,steps=20",
    "pgd:eps=0.3,steps=20",
    "pgd:eps=1.5,norm=l2,steps=20",
    "ddn:steps=20",
    "cw:steps=20,binary_search_steps=3",
)


STRONG = (
    "apgd:eps=0.1,steps=20",
    "apgd-t:eps=0.1,steps=5",
    "fab-t:steps=5",
    "autoattack:eps=0.1,steps=5",
    "square:eps=0.1,queries=1000",
)


class Table(nn.Module):
    """A network whose outputs are a function of the mean pixel of each image, [N]."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.flatten(1).mean(dim=1))


def grey(n: int, value: float = 0.5) -> Batch:
    return torch.full((n, 1, 2, 2), value), torch.zeros(n, dtype=torch.int64)


def small_linear(classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes)).eval()


N = 100


ALIVE = {"zero": 0, "not_finite": 0, "tiny": 0}


def runs(key: str, counts: dict[float, int], n: int = N) -> list[dict[str, Any]]:
    """Return runs in which the first ``count`` of n images are correct."""
    return [{key: value, "correct": [i < count for i in range(n)]} for value, count in counts.items()]


def dependence(images: int, n: int = N) -> dict[str, Any]:
    measured = {"batches": 3, "largest_difference": 1.0 if images else 0.0, "largest_output": 10.0, "changed": 0}
    return {"n": n, "dependent": images, **measured}


def clean_probe(**change: Any) -> dict[str, Any]:
    """Return the probe of an ordinary network."""
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
