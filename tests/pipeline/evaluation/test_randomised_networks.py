"""Tasks on randomised networks: their streams, their precision, their micro-batches."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attacked_models import Small

from components.attacks.fast_copy import run_attack_on_copy
from components.attacks.spec import AttackSpec
from components.config import ScalingConfig, TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError
from components.evaluation import active_test
from components.evaluation import active_test as evaluation_active_test
from components.network import build_net
from pipeline.data import shards
from pipeline.evaluation import attack_tasks, reliability
from pipeline.evaluation.chunks import read_chunks, read_examples, read_metadata
from pipeline.runtime.cluster import ResourceError
from pipeline.runtime.storage import Storage
from pipeline.training import exports


def test_a_task_searches_in_the_precision_that_its_records_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Any] = []

    def spy(spec: Any, model: Any, fast: Any, *arguments: Any, **options: Any) -> Any:
        searched.append({p.dtype for p in fast.parameters()})
        return run_attack_on_copy(spec, model, fast, *arguments, **options)

    monkeypatch.setattr(attack_tasks, "run_attack_on_copy", spy)
    monkeypatch.setattr(evaluation_active_test, "run_attack_on_copy", spy)
    common = with_network(tmp_path, "own_network:make")
    for bfloat16 in (False, True):
        job = {"source": "models/net", "attack": "pgd:eps=0.2,steps=2", "early_leaving": True, "bfloat16": bfloat16}
        where = {"examples": f"examples/{bfloat16}", "judges": {f"judged/{bfloat16}": "models/net"}}
        attack_tasks.attack_chunks({**common, **job, **where, "chunks": CHUNKS[:1]})
        test = {
            "model": "models/net",
            "name": "net",
            "attack": "pgd:eps=0.2,steps=2",
            "norm": "linf",
            "eps": 0.2,
            "images": 2,
        }
        reliability.measure({**common, **test, "bfloat16": bfloat16, "file": f"reliability/{bfloat16}.json"})
        assert read_metadata(Storage(str(tmp_path)) / f"examples/{bfloat16}", 0)["bfloat16"] is bfloat16
    assert all(dtypes == {torch.float32} for dtypes in searched[: len(searched) // 2])
    assert all(torch.bfloat16 in dtypes for dtypes in searched[len(searched) // 2 :])


IMAGES, CHUNKS = 12, [(0, 0, 6), (1, 6, 12)]


COMMON = {"test": "pyramids/test", "seed": 0, "device": "cpu", "threads": 1}


def with_network(directory: Path, arch: str) -> dict[str, Any]:
    """What every task is told, of a storage with one network and the images that it is attacked with."""
    root = Storage(str(directory))
    rng = np.random.default_rng(0)
    columns = {
        "index": pa.array(np.arange(IMAGES)),
        "label": pa.array(rng.integers(0, 10, IMAGES).astype(np.int32)),
        "image": shards.tensor_array(rng.integers(0, 256, (IMAGES, 1, 28, 28), dtype=np.uint8)),
    }
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    data = out.getvalue()
    shard = {"name": "shard-00000.parquet", "rows": IMAGES, "bytes": len(data)}
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    manifest = {"version": shards.FORMAT_VERSION, "num_rows": IMAGES, "rows_per_shard": IMAGES, "shards": [shard]}
    root.write_bytes("pyramids/test/shard-00000.parquet", data)
    root.write_json("pyramids/test/manifest.json", manifest)
    shapes = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
    config = TrainConfig(arch=arch, defense="none")
    torch.manual_seed(0)
    exports.export(root / "models/net", build_net(config, shapes), config, shapes)
    return {**COMMON, "root": root.uri, "trusted": [arch]}


def attacked(common: dict[str, Any], attack_text: str, *tasks: list[tuple[int, int, int]]) -> list[Any]:
    """Examples and records of both chunks, made by these tasks one after the other."""
    examples, judged = f"examples/{attack_text}", f"judged/{attack_text}"
    for chunks in tasks:
        torch.rand(7)  # whatever else the worker has drawn
        job = {"source": "models/net", "attack": attack_text, "early_leaving": False, "judges": {judged: "models/net"}}
        attack_tasks.attack_chunks({**common, **job, "bfloat16": False, "examples": examples, "chunks": chunks})
    root = Storage(common["root"])
    columns = read_chunks(root / judged, 2)
    return [
        *(read_examples(root / examples, i).tolist() for i in range(2)),
        {k: v.tolist() for k, v in columns.items()},
    ]


@pytest.mark.parametrize("text", ["fgsm:eps=0.2", "pgd:eps=0.2,steps=3"])
def test_a_randomised_network_is_judged_the_same_by_any_tasks_in_any_order(text: str, tmp_path: Path) -> None:
    text = str(AttackSpec.parse(text))
    orders = [(CHUNKS,), (CHUNKS[1:], CHUNKS[:1]), (CHUNKS[::-1],)]
    one, *others = (
        attacked(with_network(tmp_path / str(i), "own_network:make_drawing"), text, *order)
        for i, order in enumerate(orders)
    )
    # what is judged again finds its examples made, and nothing drawn for them
    shutil.rmtree(tmp_path / "0" / "judged")
    others.append(attacked({**COMMON, "root": str(tmp_path / "0")}, text, CHUNKS))
    for other in others:
        assert other == one


def test_the_attacks_of_a_chunk_draw_apart_whoever_is_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(*arguments: Any, generator: torch.Generator, **options: Any) -> Any:
        seeds.append(generator.initial_seed())
        return run_attack_on_copy(*arguments, generator=generator, **options)

    monkeypatch.setattr(attack_tasks, "run_attack_on_copy", spy)
    common = with_network(tmp_path, "own_network:make")
    job = {"bfloat16": False, "judges": {}, "chunks": CHUNKS}
    texts = [
        "noise:eps=0.2",
        "noise:eps=0.1",
        "pgd:eps=0.2,steps=1",
        "apgd:eps=0.2,steps=1",
        "square:eps=0.2,queries=1",
    ]
    for text in texts:
        source = None if text.startswith("noise") else "models/net"
        early = text.startswith("pgd")
        where = {"source": source, "early_leaving": early, "examples": f"examples/{text}"}
        attack_tasks.attack_chunks({**common, **job, **where, "attack": text})
    assert len(set(seeds)) == len(seeds) == len(texts) * len(CHUNKS)
    # the examples show it: these two differed in their length alone
    _, clean, _ = attack_tasks.load_images({**common}, 0, 6)
    signs = [
        np.sign(read_examples(Storage(common["root"]) / f"examples/{text}", 0) - clean.numpy()).ravel()
        for text in texts[:2]
    ]
    assert abs(np.corrcoef(*signs)[0, 1]) < 0.2
    # no model and no other setting of the evaluation decides the draws, so that models are compared under the same ones
    before = seeds[4:6]
    seeds.clear()
    where = {"source": "models/net", "early_leaving": False, "examples": "examples/elsewhere"}
    attack_tasks.attack_chunks({**common, **job, **where, "attack": texts[2], "chunks": CHUNKS[::-1]})
    assert seeds == before[::-1]


def test_a_randomised_network_is_tested_the_same_by_any_worker(tmp_path: Path) -> None:
    found = []
    for draws in (0, 5):
        common = with_network(tmp_path / str(draws), "own_network:make_drawing")
        for text in ("", "pgd:eps=0.2,steps=3"):
            torch.rand(draws)
            job = {
                "model": "models/net",
                "attack": text,
                "norm": "linf",
                "eps": 0.2,
                "images": 8,
                "name": "net",
                "bfloat16": False,
            }
            reliability.measure({**common, **job, "file": f"reliability/{text.partition(':')[0]}.json"})
        root = Storage(common["root"])
        found.append([root.read_json(f"reliability/{name}.json") for name in ("", "pgd")])
    assert found[0] == found[1]
    assert found[0][0]["random_output"]["largest_difference"] > 0


def test_the_active_test_is_given_the_network_and_its_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, Any]] = []

    def spy(model: Any, *arguments: Any, fast: Any, **options: Any) -> dict[str, Any]:
        given.append((model, fast))
        return active_test.active_test(model, *arguments, fast=fast, **options)

    monkeypatch.setattr(reliability, "active_test", spy)
    common = with_network(tmp_path, "own_network:make")
    job = {
        "model": "models/net",
        "attack": "fgsm:eps=0.2",
        "norm": "linf",
        "eps": 0.2,
        "images": 2,
        "name": "net",
        "bfloat16": False,
    }
    reliability.measure({**common, **job, "file": "reliability/active.json"})
    ((model, fast),) = given
    assert model is attack_tasks.load_model(common["root"], "models/net", "cpu")
    assert fast is attack_tasks.load_fast_copy(common["root"], "models/net", "cpu", torch.Size((1, 28, 28)), False)
    assert fast is not None


@pytest.mark.parametrize("text", ["", "pgd:eps=0.2,steps=3"])
def test_reliability_is_measured_in_micro_batches_where_memory_is_short(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = with_network(tmp_path, "own_network:make")
    job = {
        "model": "models/net",
        "name": "net",
        "attack": text,
        "norm": "linf",
        "eps": 0.2,
        "images": 8,
        "bfloat16": False,
    }

    def measured(file: str) -> dict[str, Any]:
        reliability.measure({**common, **job, "file": f"reliability/{file}.json"})
        found: dict[str, Any] = Storage(common["root"]).read_json(f"reliability/{file}.json")
        return found

    whole = measured("whole")
    assert "micro_batch" not in whole
    network = attack_tasks.load_model(common["root"], "models/net", "cpu")
    monkeypatch.setattr(attack_tasks, "load_fast_copy", lambda *_: None)
    monkeypatch.setattr(attack_tasks, "load_model", lambda *_: Small(network, 3))
    parts = measured("parts")
    assert parts.pop("micro_batch") == 2
    assert parts.keys() == whole.keys()
    for name in ("n", "clean_correct", "output", "zero_gradients") if not text else ("n", "left_out", "random_found"):
        assert parts[name] == whole[name]
    monkeypatch.setattr(attack_tasks, "load_model", lambda *_: Small(network, 0))
    with pytest.raises(ResourceError, match="the reliability of net on a single image does not fit"):
        measured("none")


def test_chunks_of_a_task_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="chunks_per_attack"):
        ScalingConfig(chunks_per_attack=0)
