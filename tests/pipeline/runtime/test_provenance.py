"""What a run says about its processor before it trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline import stages
from pipeline.recipes.registry import RECIPES
from pipeline.runtime import provenance


@pytest.mark.parametrize(
    ("cpuinfo", "lacks"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", False),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("no flags at all\n", False),
        (None, False),  # no such file
    ],
)
def test_training_in_bfloat16_on_a_processor_without_it_is_pointed_out(
    cpuinfo: str | None, lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(provenance, "CPUINFO", file)
    assert provenance.lacks_bfloat16() == lacks
    in_bfloat16 = RECIPES["table3-slim"].make()
    assert stages.emulates_bfloat16(in_bfloat16) == lacks
    assert not stages.emulates_bfloat16(RECIPES["mnist-demo"].make())  # float32
    on_gpu = dataclasses.replace(in_bfloat16, scaling=dataclasses.replace(in_bfloat16.scaling, gpu=True))
    assert not stages.emulates_bfloat16(on_gpu)
