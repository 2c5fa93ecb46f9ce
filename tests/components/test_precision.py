"""Every verdict is computed in true float32, whatever the process had switched on before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.attacks.fast_copy import make_fast_copy, run_attack_on_copy
from components.attacks.registry import run_attack
from components.attacks.spec import AttackSpec
from components.evaluation.active_test import active_test
from components.evaluation.judge import judge
from components.evaluation.probe import probe
from components.precision import describe, true_float32
from components.training.augment import Batch
from components.training.step import validation_sums
from pipeline.data import shards
from pipeline.evaluation import attack_tasks, figure_data, reliability
from pipeline.runtime.storage import Storage
from pipeline.sweep.trials import objective
from pipeline.sweep.trials.plan import Objective
from pipeline.training.loop import Ranks

TRUE = ("ieee",) * 6 + (False, False, "highest", False, True, False)


def state() -> tuple[object, ...]:
    """All switches by which float32 arithmetic loses bits, or its order of summation is left to a timing."""
    b = torch.backends
    operations = (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    return (
        *(operation.fp32_precision for operation in operations),
        _or_mixed(lambda: b.cudnn.allow_tf32),
        _or_mixed(lambda: b.cuda.matmul.allow_tf32),
        _or_mixed(torch.get_float32_matmul_precision),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        b.cudnn.deterministic,
        b.cudnn.benchmark,
    )


def _or_mixed(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:  # the old and the new switches disagree
        return "mixed"


class Observer(nn.Module):
    """A linear classifier of 4x4 images that remembers the state in which each pass was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()
        self.dtypes: set[torch.dtype] = set()
        self.linear = nn.Linear(16, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 48).reshape(3, 16).sin_())

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(state())
        logits: Tensor = self.linear(x.flatten(1))
        self.dtypes.add(logits.dtype)
        return logits


def images(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def _plain() -> None:
    """Set PyTorch's defaults."""
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def _legacy() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True


def _everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def _by_operation() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


LOWERED: dict[str, Callable[[], None]] = {
    "legacy": _legacy,
    "everywhere": _everywhere,
    "by operation": _by_operation,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture
def lowered(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process computes in TF32, with bfloat16 autocast and cuDNN's own choice of kernels."""
    how = getattr(request, "param", "everywhere")
    b = torch.backends
    operations = (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    before = [operation.fp32_precision for operation in operations]
    _plain()  # whatever another test has left switched
    LOWERED[how]()
    b.cudnn.benchmark = True
    with torch.autocast("cpu", torch.bfloat16):
        start = state()
        yield
        assert state() == start, "what was switched on before is switched on afterwards"
    b.cudnn.benchmark = False
    _plain()
    for operation, value in zip(operations, before, strict=True):
        operation.fp32_precision = value


def _probe(model: Observer, _: Path) -> None:
    probe(model, *images(), eps=0.3, norm="linf")


def _judge(model: Observer, _: Path) -> None:
    x, y = images()
    judge(model, x, x, y)


def _active(model: Observer, _: Path) -> None:
    active_test(model, images(2)[0], AttackSpec.parse("pgd:eps=0.3,steps=2"), eps=0.3)


def _search(model: Observer, _: Path) -> None:
    run_attack_on_copy(AttackSpec.parse("pgd:eps=0.3,steps=2"), model, None, *images())


def _stand_in(model: Observer, _: Path) -> None:
    make_fast_copy(model, images()[0])


def _validation(model: Observer, _: Path) -> None:
    x, y = images()
    validation_sums(model, Batch(images=(x * 255).to(torch.uint8), labels=y))


def _objective(model: Observer, path: Path) -> None:
    asked = Objective(attack="pgd:eps=0.3,steps=2", images=8, validation="pyramids/x")
    objective.RobustAccuracyMeter(asked, Storage(str(path)), Ranks()).robust_accuracy(model)


def _job(path: Path, **more: object) -> dict[str, Any]:
    common = {"root": str(path), "test": "pyramids/x", "model": "m", "name": "m", "seed": 0, "device": "cpu"}
    return {**common, "threads": 1, "bfloat16": False, **more}


def _attack_task(model: Observer, path: Path) -> None:
    more = {"source": "m", "judges": {"judged/a": "m"}, "examples": "examples/a", "early_leaving": True}
    attack_tasks.attack_chunks(_job(path, attack="pgd:eps=0.3,steps=2", chunks=[(0, 0, 10)], **more))


def _reliability_task(model: Observer, path: Path) -> None:
    for name, images in (("", 10), ("pgd:eps=0.3,steps=2", 2)):
        more = {"images": images, "norm": "linf", "eps": 0.3, "file": f"reliability/{images}.json"}
        reliability.measure(_job(path, attack=name, **more))


def _figure_8(model: Observer, _: Path) -> None:
    figure_data.reconstruct(_Levels(model), images()[0])


class _Levels(nn.Module):
    """An auto-encoder's interface: images to levels."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def forward(self, x: Tensor) -> list[Tensor]:
        self.observer(x)
        return [x]


PATHS = (
    _judge,
    _probe,
    _active,
    _search,
    _stand_in,
    _validation,
    _objective,
    _attack_task,
    _reliability_task,
    _figure_8,
)


@pytest.mark.parametrize("path", PATHS)
def test_every_verdict_is_computed_in_true_float32(
    path: Callable[[Observer, Path], None], lowered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = images()
    columns = {"index": np.arange(10), "image": (x * 255).to(torch.uint8).numpy(), "label": y.numpy().astype(np.int32)}

    def rows(start: int, stop: int, _: object = None) -> dict[str, np.ndarray]:
        return {name: values[start:stop] for name, values in columns.items()}

    stored = SimpleNamespace(
        num_rows=10, iter_shards=lambda names: iter([{n: columns[n] for n in names}]), read_rows=rows
    )
    monkeypatch.setattr(shards, "load", lambda root, address: stored)
    model = Observer().eval()
    monkeypatch.setattr(attack_tasks, "load_model", lambda *_: model)
    for cached in (attack_tasks.load_test_set, attack_tasks.load_fast_copy):
        cached.cache_clear()
    path(model, tmp_path)
    for cached in (attack_tasks.load_test_set, attack_tasks.load_fast_copy):
        cached.cache_clear()
    assert model.seen == {TRUE}
    assert model.dtypes == {torch.float32}


@pytest.mark.parametrize("lowered", LOWERED, indirect=True)
def test_an_error_in_a_verdict_leaves_the_switches_as_they_were(lowered: None) -> None:
    start = state()
    within = []

    @true_float32()
    def fails() -> None:
        within.append(state())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert within == [TRUE]
    assert state() == start


def test_a_verdict_within_a_verdict(lowered: None) -> None:
    with true_float32():
        with true_float32():
            assert state() == TRUE
        assert state() == TRUE


def test_training_computes_as_it_is_configured(lowered: None) -> None:
    """The examples of adversarial training are no verdict."""
    model, (x, y) = Observer(), images()
    start = state()
    run_attack(AttackSpec.parse("pgd:eps=0.3,steps=2"), model, x, y)
    assert model.seen == {start}
    assert model.dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("device", "precision", "switch", "said"),
    [
        ("cpu", "float32", "legacy", "float32"),
        ("cpu", "bfloat16", "legacy", "bfloat16 autocast"),
        ("cuda", "float32", "", "float32, TF32 in convolutions"),
        ("cuda", "float32", "legacy", "float32, TF32 in convolutions and matrix products"),
        ("cuda", "bfloat16", "", "bfloat16 autocast, TF32 in convolutions"),
    ],
)
def test_what_training_computed_in_is_said(device: str, precision: str, switch: str, said: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    if switch:
        LOWERED[switch]()
    assert describe(device, precision) == said
    torch.backends.cuda.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")
