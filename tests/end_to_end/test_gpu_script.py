"""The GPU script's measurements on a CPU, and the offline bundle's refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from repository import ROOT

from components.config import Shapes, TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks", ROOT / "benchmarks" / "gpu_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_checks"] = module
    spec.loader.exec_module(module)
    return module


def written(directory: Path, part: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / f"{part}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_step_on_the_same_device_has_the_same_loss(checks: ModuleType, tmp_path: Path) -> None:
    rows = checks.Rows(tmp_path, "check")
    shapes = Shapes(image_size=14, channels=1, num_classes=10, sizes=(14, 7))
    config = TrainConfig(width=4, noise_location="latent")
    checks.check_step(rows, "step", "joint", config, shapes, CPU, 4)
    (row,) = written(tmp_path, "check")
    assert row["ok"] is True
    assert row["apart"] == 0


@pytest.mark.slow
def test_step_that_computes_something_else_fails(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = checks.Rows(tmp_path, "check")
    shapes = Shapes(image_size=14, channels=1, num_classes=10, sizes=(14, 7))

    def other_labels(batch: object, device: torch.device) -> object:
        return checks.Batch(images=batch.images, labels=(batch.labels + 1) % 10)  # type: ignore[attr-defined]

    monkeypatch.setattr(checks, "moved", other_labels)
    checks.check_step(rows, "step", "classifier", TrainConfig(width=4, defense="none"), shapes, CPU, 4)
    assert rows.failed == ["step"]


def test_failed_measurement_is_a_row_and_the_next_one_runs(checks: ModuleType, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = checks.Rows(tmp_path, "speed")
    with rows.guarded("first"):
        raise RuntimeError("no such kernel")
    with rows.guarded("second"):
        rows.add("second", ok=True, ms=1.5)
    assert [row["name"] for row in written(tmp_path, "speed")] == ["first", "second"]
    checks.table(tmp_path)
    printed = capsys.readouterr().out
    assert "| second | True | 1.5 |" in printed
    assert "1 failed\n- speed: first: RuntimeError: no such kernel" in printed


@pytest.mark.slow
def test_training_step_and_attack_pass_are_measured(checks: ModuleType, tmp_path: Path) -> None:
    rows = checks.Rows(tmp_path, "speed")
    step = checks.make_step("defend", 28, 2, "fused", CPU, True)
    assert checks.flops_of(step) > checks.flops_of(checks.make_step("no_defense", 28, 2, "eager", CPU, True)) > 0
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    checks.measure_chunk(rows, net, torch.rand(4, 1, 28, 28), "float32", 0.001, 1e9)
    alone, in_pgd = written(tmp_path, "speed")
    assert (alone["name"], in_pgd["name"]) == ("pass float32 4", "pgd float32 4")
    seconds = float(str(alone["ms_per_pass"])) / 1e3
    # The forward pass and the gradients of weights and images each take 2 FLOP per weight and image.
    assert float(str(alone["of_ceiling"])) * 1e9 * seconds == pytest.approx(3 * 2 * 784 * 10 * 4)


@pytest.mark.parametrize("script", ["benchmarks/gpu.sh", "infra/offline-bundle.sh"])
def test_script_explains_itself_and_refuses_unknown_options(script: str) -> None:
    usage = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert Path(script).name in usage.stdout
    refused = subprocess.run([ROOT / script, "--no-such-option"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no option --no-such-option" in refused.stderr


def test_bundle_leaves_out_only_packages_that_are_pinned() -> None:
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = [x for x in (ROOT / "infra" / "gpu-image.txt").read_text().splitlines() if not x.startswith("#")]
    assert {"torch", "torchvision", "pyarrow", "numpy"} <= set(names)
    assert set(names) <= pins, set(names) - pins
