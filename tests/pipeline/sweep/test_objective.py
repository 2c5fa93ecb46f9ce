"""The objective of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sweeps import (
    OBJECTIVE,
    SHAPES,
)

from components.config import TrainConfig
from pipeline.runtime.storage import Storage


def test_robust_accuracy_is_that_of_a_direct_attack_and_does_not_depend_on_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from components.attacks.registry import run_attack
    from components.attacks.spec import AttackSpec
    from components.network import build_net
    from components.random_streams import stream_seed
    from pipeline.data import shards
    from pipeline.data.splits import draw_order
    from pipeline.sweep.trials import objective
    from pipeline.training.loop import Ranks

    generator = np.random.default_rng(0)
    columns = {
        "image": generator.integers(0, 256, (230, 1, 28, 28), dtype=np.uint8),
        "label": generator.integers(0, 2, 230).astype(np.int32),
    }
    fake = SimpleNamespace(num_rows=230, iter_shards=lambda names: iter([columns]))
    monkeypatch.setattr(shards, "load", lambda root, address: fake)
    net = build_net(TrainConfig(width=4, defense="none"), replace(SHAPES, num_classes=2)).eval()
    asked = replace(OBJECTIVE, images=115, attack="pgd:eps=0.01,steps=2")
    root = Storage(str(tmp_path))
    whole = objective.RobustAccuracyMeter(asked, root, Ranks())
    assert whole.rows == draw_order(np.arange(230), 0)[:115].tolist(), "a split may be sorted by class"
    accuracy = whole.robust_accuracy(net.train())
    assert net.training, "the mode is as it was"
    images = torch.from_numpy(columns["image"][whole.rows]).float() / 255
    labels = torch.from_numpy(columns["label"][whole.rows]).long()

    def right_under(attack: str) -> int:
        """Count the images that are right under the attack, with the random stream of each chunk."""
        spec, found = AttackSpec.parse(attack), 0
        for chunk, (x, y) in enumerate(zip(images.split(objective.CHUNK), labels.split(objective.CHUNK), strict=True)):
            generator = torch.Generator().manual_seed(stream_seed(0, chunk))
            examples = run_attack(spec, net, x, y, stop_on_success=spec.can_stop_on_success, generator=generator)
            found += int((net(examples).argmax(1) == y).sum())
        return found

    net.eval()
    with torch.no_grad():
        clean = int((net(images).argmax(1) == labels).sum())
    assert accuracy == right_under(asked.attack) / 115
    strong = replace(asked, attack="pgd:eps=0.1,steps=5")
    left = right_under(strong.attack)
    assert 0 < left < clean
    assert objective.RobustAccuracyMeter(strong, root, Ranks()).robust_accuracy(net) == left / 115
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: sums.append(int(value)))
    for rank in range(2):
        objective.RobustAccuracyMeter(asked, root, Ranks(rank, 2)).robust_accuracy(net)
    assert sum(sums) / 115 == pytest.approx(accuracy)
