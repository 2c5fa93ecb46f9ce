"""The arrays of the paper's figures: distances, bands and reconstructions are those of the networks."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import assert_svg
from torch import Tensor, nn

from components.config import DataConfig, EvaluationConfig, Experiment, TrainConfig
from components.config.data import Shapes
from components.errors import DataError
from components.network import build_net
from pipeline.data.shards import FORMAT_VERSION, ShardSet, tensor_array
from pipeline.evaluation import figure_data, gallery
from pipeline.evaluation.plan import Model
from pipeline.reporting import report
from pipeline.reporting.figures import fig8
from pipeline.runtime.storage import Storage
from pipeline.training import exports

SIZE, CHUNK = 14, 3

FGSM = "fgsm:eps=0.2"


def _parquet(columns: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _test_set(root: Storage, images: np.ndarray) -> ShardSet:
    """Shards of 4 images each, of uint8 [n,1,W,W]; index of image i is 10 i."""
    entries = []
    for start in range(0, len(images), 4):
        part = np.ascontiguousarray(images[start : start + 4])
        index = 10 * np.arange(start, start + len(part))
        data = _parquet({"index": index, "label": (index % 7).astype(np.int32), "image": tensor_array(part)})
        name = f"shard-{len(entries):05d}.parquet"
        root.write_bytes(f"pyramids/test/{name}", data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"name": name, "rows": len(part), "bytes": len(data), "sha256": digest})
    manifest = {"version": FORMAT_VERSION, "num_rows": len(images), "rows_per_shard": 4, "shards": entries}
    return ShardSet(root, "pyramids/test", manifest)


def _examples(root: Storage, address: str, adversarial: np.ndarray, chunk: int = CHUNK) -> Storage:
    for i, start in enumerate(range(0, len(adversarial), chunk)):
        part = np.ascontiguousarray(adversarial[start : start + chunk], dtype=np.float32)
        (root / address).write_bytes(f"chunk-{i:05d}.parquet", _parquet({"adversarial": tensor_array(part)}))
    return root / address


class _Subtracts(nn.Module):
    """Reconstructs every image as itself less a constant; remembers how many it was given at once."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant, self.batches = constant, []

    def forward(self, images: Tensor) -> list[Tensor]:
        self.batches.append(len(images))
        return [images - self.constant, images[..., ::2, ::2]]


def test_ratios_of_a_constructed_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Storage(tmp_path)
    # attacked = clean + delta, reconstruction = attacked - 1/4: D_ra = W / 4, D_rc = W |delta - 1/4|, R = |4 delta - 1|
    deltas = np.array([0.125, 0.25, 0.5, 0.75, -0.25, 0.0, 0.375, 0.1875])
    clean = np.full((8, 1, SIZE, SIZE), 51, dtype=np.uint8) + 10 * np.arange(8, dtype=np.uint8)[:, None, None, None]
    exact = clean.astype(np.float32) / 255
    examples = _examples(root, "examples/a", (exact + deltas[:, None, None, None].astype(np.float32))[:7])
    monkeypatch.setattr(figure_data, "BATCH_PIXELS", 2 * SIZE * SIZE)
    autoencoder = _Subtracts(0.25)
    found = figure_data.distances(
        autoencoder, _test_set(root, clean), examples, n=7, chunk_size=CHUNK, progress=lambda *_: None
    )
    assert autoencoder.batches == [
        2,
        1,
        2,
        1,
        1,
    ]  # chunks of 3, 3 and 1, two images at a time; the eighth is not asked for
    assert found["index"].tolist() == [0, 10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(found["d_ra"], SIZE / 4, rtol=1e-6)
    np.testing.assert_allclose(found["d_rc"], SIZE * np.abs(deltas[:7] - 0.25), atol=1e-5)
    np.testing.assert_allclose(found["d_ac"], SIZE * np.abs(deltas[:7]), atol=1e-5)
    np.testing.assert_allclose(found["r"], [0.5, 0, 1, 2, 2, 1, 0.5], atol=1e-5)


def test_a_reconstruction_that_equals_the_attacked_image_is_counted(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    clean = np.full((4, 1, SIZE, SIZE), 100, dtype=np.uint8)
    attacked = clean.astype(np.float32) / 255
    attacked[1:] += 0.1
    examples = _examples(root, "examples/a", attacked)
    found = figure_data.distances(
        _Subtracts(0.0), _test_set(root, clean), examples, n=4, chunk_size=CHUNK, progress=lambda *_: None
    )
    assert math.isnan(found["r"][0])  # 0 / 0
    assert np.isinf(found["r"][1:]).all()
    stored = {f"fig8__{name}__defend": values for name, values in found.items()} | {"fig8__attack": np.array(FGSM)}
    plot = fig8.fig8(stored, {"defend": "defended"}, {"defend": "defend"})
    assert plot is not None
    assert "R < 1 for 0 of 4" in plot.caption
    assert "4 without a finite R" in plot.caption
    assert_svg(plot.svg)


def test_examples_of_another_length_are_refused(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    examples = _examples(root, "examples/a", np.zeros((5, 1, SIZE, SIZE)))
    test = _test_set(root, np.zeros((6, 1, SIZE, SIZE), dtype=np.uint8))
    with pytest.raises(DataError, match="chunk 1, holds 2 images where 3 belong"):
        figure_data.distances(_Subtracts(0.0), test, examples, n=6, chunk_size=CHUNK, progress=lambda *_: None)


@dataclass
class _Trained:
    """Untrained networks on storage, with what the attack stage leaves of them: an undefended and a defended one, twice."""

    root: Storage
    run: Storage
    test: ShardSet
    experiment: Experiment
    models: list[Model]
    evaluations: list[dict[str, Any]]
    clean: np.ndarray

    def make(self, figures_asked: Sequence[str]) -> None:
        experiment = replace(self.experiment, figures=tuple(figures_asked))
        gallery.make(self.test, self.models, self.evaluations, experiment, self.run, self.root, lambda *_: None)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self.run.read_bytes(name)), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}


@pytest.fixture
def trained(tmp_path: Path) -> _Trained:
    rng = np.random.default_rng(0)
    root = Storage(tmp_path)
    experiment = Experiment(
        name="figures",
        data=DataConfig(image_size=SIZE),
        train=TrainConfig(width=4),
        models=("bare:defense=none,seed=0", "defend:seed=1"),
        seeds=2,
        evaluation=EvaluationConfig(attacks=("bim:eps=0.2,steps=2", FGSM, "fgsm:eps=0.4"), chunk_size=CHUNK),
    )
    images = rng.integers(0, 256, (8, 1, SIZE, SIZE), dtype=np.uint8)
    clean = images.astype(np.float32) / 255
    shapes = Shapes(image_size=SIZE, channels=1, num_classes=10, sizes=(14, 7))
    models, evaluations = [], []
    for name, config in experiment.model_configs().items():
        exports.export(root / f"models/{name}", build_net(config, shapes), config, shapes)
        models.append(Model(name=name, path=f"models/{name}", sha256=name))
        for attack, eps in (("bim:eps=0.2,steps=2", 0.1), (FGSM, 0.2), ("fgsm:eps=0.4", 0.4)):
            key = f"{name}-{attack.replace(':', '-')}"
            _examples(root, f"examples/{key}", np.clip(clean + eps * np.sign(rng.normal(size=clean.shape)), 0, 1))
            judged = _parquet({"adversarial_prediction": np.arange(CHUNK, dtype=np.int32)})
            root.write_bytes(f"judged/{key}/chunk-00000.parquet", judged)
            at = {"examples": f"examples/{key}", "path": f"judged/{key}", "n": len(clean)}
            for threat in ("white_box", "transfer"):
                evaluations.append({"model": name, "threat_model": threat, "attack": attack, **at})
    return _Trained(root, root / "runs/a", _test_set(root, images), experiment, models, evaluations, clean)


def test_only_what_is_asked_for_is_stored(trained: _Trained) -> None:
    trained.make([])
    assert not trained.run.exists("figures.npz")
    kept = trained.arrays("gallery.npz")
    assert len(kept["clean"]) == CHUNK
    trained.make(["fig5", "fig7"])  # of gallery.npz and run.json alone
    assert not trained.run.exists("figures.npz")
    trained.make(["fig6"])
    assert {name.partition("__")[0] for name in trained.arrays("figures.npz")} == {"fig6"}


def test_the_gallery_keeps_every_eps_of_the_first_replicate(trained: _Trained) -> None:
    trained.make([])
    kept = trained.arrays("gallery.npz")
    examples = {name for name in kept if name.startswith("adversarial__")}
    attacks = ("bim:eps=0.2,steps=2", FGSM, "fgsm:eps=0.4")
    assert examples == {f"adversarial__{m}__{a}" for m in ("bare-s0", "defend-s0") for a in attacks}
    weak, strong = (np.abs(kept[f"adversarial__defend-s0__{a}"] - kept["clean"]).max() for a in attacks[1:])
    assert (weak, strong) == pytest.approx((0.2, 0.4), abs=1e-6)
    assert {n for n in kept if n.startswith("reconstruction_")} == {f"reconstruction_{m}__defend-s0" for m in (0, 1)}


def test_stored_bands_and_maps_restore_the_levels(trained: _Trained) -> None:
    trained.make(["fig2"])
    stored = trained.arrays("figures.npz")
    level, band = stored["fig2__level_spectrum_0"], stored["fig2__band_spectrum_0"]
    np.testing.assert_array_equal(stored["fig2__level_0"], trained.clean[:3])
    # the band lacks exactly the coefficients that the next level has; those are half the size there (W_m / W)
    np.testing.assert_allclose(band[..., :7, :7], 0, atol=1e-4)
    np.testing.assert_allclose(band[..., 7:, :], level[..., 7:, :], atol=1e-4)
    np.testing.assert_allclose(stored["fig2__level_spectrum_1"], level[..., :7, :7] / 2, atol=1e-4)
    np.testing.assert_array_equal(stored["fig2__band_1"], stored["fig2__level_1"])
    assert np.sum(level[0] ** 2, dtype=float) == pytest.approx(np.sum(trained.clean[0] ** 2, dtype=float), rel=1e-5)


@pytest.mark.slow
def test_distances_and_reconstructions_are_those_of_the_exported_networks(trained: _Trained) -> None:
    trained.make(["fig6", "fig8"])
    stored = trained.arrays("figures.npz")
    assert str(stored["fig6__attack"]) == str(stored["fig8__attack"]) == FGSM  # the first FGSM, not the first attack
    assert {n.rpartition("__")[2] for n in stored if n.startswith("fig6__adversarial")} == {"defend-s0"}
    assert {n.rpartition("__")[2] for n in stored if n.startswith("fig8__r__")} == {"defend-s0", "defend-s1"}
    network = exports.load_autoencoder(f"{trained.root.uri}/models/defend-s1")
    chunks = [f"examples/defend-s1-fgsm-eps=0.2/chunk-0000{i}.parquet" for i in range(3)]
    read = [pq.read_table(pa.BufferReader(trained.root.read_bytes(c)))["adversarial"] for c in chunks]
    attacked = np.concatenate([c.combine_chunks().to_numpy_ndarray() for c in read]).astype(np.float64)
    with torch.no_grad():
        reconstructed = network(torch.from_numpy(attacked).float())[0].double().numpy()
    clean = trained.clean.astype(np.float64)
    d_ra = np.sqrt(((reconstructed - attacked) ** 2).sum((1, 2, 3)))
    d_rc = np.sqrt(((reconstructed - clean) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(stored["fig8__d_ra__defend-s1"], d_ra, rtol=1e-4)
    np.testing.assert_allclose(stored["fig8__r__defend-s1"], d_rc / d_ra, rtol=1e-4)
    first = stored["fig6__adversarial__defend-s0"]
    with torch.no_grad():
        again = exports.load_autoencoder(f"{trained.root.uri}/models/defend-s0")(torch.from_numpy(first))[0]
    np.testing.assert_allclose(stored["fig6__reconstruction_adversarial__defend-s0"], again.numpy(), atol=1e-5)


@pytest.mark.slow
def test_distances_are_not_computed_twice_but_anew_for_other_weights(
    trained: _Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.make(["fig8"])
    before = trained.arrays("figures.npz")
    computed: list[str] = []
    original = figure_data.distances

    def counted(
        autoencoder: nn.Module, test: ShardSet, examples: Storage, *rest: Any, **named: Any
    ) -> dict[str, np.ndarray]:
        computed.append(examples.uri)
        return original(autoencoder, test, examples, *rest, **named)

    monkeypatch.setattr(figure_data, "distances", counted)
    trained.make(["fig8"])
    assert not computed
    after = trained.arrays("figures.npz")
    assert {k: v.tolist() for k, v in after.items()} == {k: v.tolist() for k, v in before.items()}
    trained.models[3] = replace(trained.models[3], sha256="other weights")
    trained.make(["fig8"])
    assert len(computed) == 1
    assert "defend-s1" in computed[0]
    trained.run.write_bytes("figures.npz", b"PK torn")  # by a killed process: written anew
    trained.make(["fig8"])
    assert len(computed) == 3


def test_a_run_without_autoencoder_or_fgsm_stores_what_it_can(trained: _Trained) -> None:
    trained.models = [m for m in trained.models if m.name.startswith("bare")]
    trained.evaluations = [e for e in trained.evaluations if e["model"].startswith("bare")]
    trained.make(["fig2", "fig6", "fig8"])
    assert {name.partition("__")[0] for name in trained.arrays("figures.npz")} == {"fig2"}


def _stored(trained: _Trained) -> bytes:
    """figures.npz of real networks, as of fake_run's defended model."""
    trained.make(["fig2", "fig6", "fig8"])
    arrays = {name.replace("defend-s0", "defend"): values for name, values in trained.arrays("figures.npz").items()}
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.slow
def test_the_report_has_every_figure_asked_for(trained: _Trained, tmp_path: Path) -> None:
    root = Storage(tmp_path / "storage")
    run = fake_run.write_with_figures(root)
    run.write_bytes("figures.npz", _stored(trained))
    paths = report.build(run, root)
    found = {name: run.read_bytes(path) for name, path in paths.items() if name.startswith("plot_fig")}
    assert set(found) == {"plot_fig2", "plot_fig5", "plot_fig6", "plot_fig7", "plot_fig8"}
    for picture in found.values():
        assert_svg(picture)
    html = run.read_bytes("report/report.html").decode()
    for number in (2, 5, 6, 7, 8):
        assert f"Figure {number}:" in html
    report.build(run, root)
    assert {name: run.read_bytes(paths[name]) for name in found} == found
