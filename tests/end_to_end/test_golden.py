"""Golden addresses and records, which a change of the code must not change.

Storage finds models, examples and records by content addresses, so a changed address loses compute. After
an intended change of an address or of a record's form, write the new ones with
``python tests/end_to_end/test_golden.py`` and give the reason in the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import fake_run
import pytest

from components.config import Shapes, level_sizes
from pipeline.data import pyramids, shards
from pipeline.evaluation import plan, reliability
from pipeline.evaluation.addresses import example_sets
from pipeline.recipes.registry import RECIPES
from pipeline.reporting import report
from pipeline.run_directory import run_address
from pipeline.runtime.storage import Storage
from pipeline.training import jobs

FILE = Path(__file__).with_name("golden.json")
NAMES = ("mnist-demo", "table2-smoke", "robustness-smoke", "eq3-smoke")
TEST_ROWS = 8


def addresses(name: str) -> dict[str, Any]:
    """Return every address of a recipe, with made-up checksums for the weights of its models."""
    experiment = RECIPES[name].make()
    data, levels = experiment.data, experiment.pyramids
    configs = experiment.model_configs()
    kinds = sorted({config.targets for config in configs.values()})
    splits = {
        f"{split} {kind}": pyramids.address_of(data, levels, split, targets=kind)
        for split in ("train", "validation", "test")
        for kind in kinds
    }
    shapes = Shapes(
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        sizes=level_sizes(data.image_size, levels.levels),
    )
    training = jobs.TrainingData(
        train={kind: splits[f"train {kind}"] for kind in kinds},
        without_levels=splits[f"train {kinds[0]}"],
        validation=splits[f"validation {kinds[0]}"],
    )
    models = {}
    for model, config in configs.items():
        _, identity = training.for_model(config)
        models[model] = jobs.model_address(config, shapes, identity, experiment.scaling.workers, "")
    subjects = [plan.Model(name=m, path=path, sha256=f"sha-{m}", autoencoder=f"auto-{m}") for m, path in models.items()]
    sets, judged = example_sets(
        plan.plan_evaluations(subjects, experiment), splits[f"test {kinds[0]}"], TEST_ROWS, experiment.evaluation
    )
    test = shards.ShardSet(Storage("/nowhere"), splits[f"test {kinds[0]}"], {"num_rows": TEST_ROWS})
    direct = [({"attack": text, "threat_model": "white_box"}, {}) for text in experiment.evaluation.attacks]
    return {
        "run": run_address(experiment),
        "pyramids": splits,
        "models": models,
        "examples": sorted(s.address for s in sets),
        "judged": sorted({records for _, records in judged.values()}),
        "reliability": sorted(
            job["file"]
            for model in subjects
            for job in reliability.reliability_jobs(model, test, experiment, Storage("/nowhere"), direct, TEST_ROWS)
        ),
    }


def fake_records(storage: Path) -> dict[str, Any]:
    """Return the tables of the report on the made-up run of tests/support/fake_run.py."""
    run = fake_run.write(Storage(str(storage)))
    report.build(run, Storage(str(storage)))
    return {"table.json": run.read_json("report/table.json"), "table.csv": run.read_bytes("report/table.csv").decode()}


def golden(storage: Path) -> dict[str, Any]:
    """Return all golden addresses and records, as JSON."""
    contents = {"addresses": {name: addresses(name) for name in NAMES}, "records": fake_records(storage)}
    written: dict[str, Any] = json.loads(json.dumps(contents))
    return written


@pytest.mark.parametrize("name", NAMES)
def test_addresses_stay(name: str) -> None:
    assert addresses(name) == json.loads(FILE.read_text())["addresses"][name]


def test_records_stay(tmp_path: Path) -> None:
    assert json.loads(json.dumps(fake_records(tmp_path))) == json.loads(FILE.read_text())["records"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        FILE.write_text(json.dumps(golden(Path(directory)), indent=1) + "\n")
