"""The paper's figures show what the records say: distances, norms, curves, and what is there of a run that is not complete."""

from __future__ import annotations

import hashlib
import io
import math
import re
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
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from components.config import DataConfig, EvaluationConfig, Experiment, TrainConfig
from components.config.data import Shapes
from components.config.roles import first_replicates
from components.errors import DataError
from components.evaluation.statistics import wilson_interval
from components.fields import to_dict
from components.network import build_net
from pipeline.data.shards import FORMAT_VERSION, ShardSet, tensor_array
from pipeline.evaluation import figure_data, gallery
from pipeline.evaluation.plan import Model
from pipeline.records import RunRecord
from pipeline.reporting import labels, report
from pipeline.reporting.figures import draw, fig2, fig6, fig7, fig8
from pipeline.reporting.plots import charts, style
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.run_plots import RunPlots
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


def _figures_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is turned into PNG from now on."""
    drawn: list[Figure] = []
    original = style.png

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return original(figure)

    monkeypatch.setattr(style, "png", keep)
    return drawn


def _assert_png(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 3  # something is on it


# -- what gallery.py stores ------------------------------------------------------------------------------------------------


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
    found = figure_data.distances(autoencoder, _test_set(root, clean), examples, n=7, chunk_size=CHUNK)
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
    found = figure_data.distances(_Subtracts(0.0), _test_set(root, clean), examples, n=4, chunk_size=CHUNK)
    assert math.isnan(found["r"][0])  # 0 / 0
    assert np.isinf(found["r"][1:]).all()
    stored = {f"fig8__{name}__defend": values for name, values in found.items()} | {"fig8__attack": np.array(FGSM)}
    plot = fig8.fig8(stored, {"defend": "defended"}, {"defend": "defend"})
    assert plot is not None
    assert "R < 1 for 0 of 4" in plot.caption
    assert "4 without a finite R" in plot.caption
    _assert_png(plot.png)


def test_examples_of_another_length_are_refused(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    examples = _examples(root, "examples/a", np.zeros((5, 1, SIZE, SIZE)))
    test = _test_set(root, np.zeros((6, 1, SIZE, SIZE), dtype=np.uint8))
    with pytest.raises(DataError, match="chunk 1, holds 2 images where 3 belong"):
        figure_data.distances(_Subtracts(0.0), test, examples, n=6, chunk_size=CHUNK)


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
        gallery.make(self.test, self.models, self.evaluations, experiment, self.run, self.root)

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


# -- what figures.py draws -------------------------------------------------------------------------------------------------


def _record(
    right: dict[tuple[str, str, float], list[int]], n: int, seeds: int, figures: tuple[str, ...] = ("fig7",)
) -> RunRecord:
    """A run whose evaluations are given: (model, threat model, eps) -> right images of each seed; eps 0 are clean ones."""
    experiment = Experiment(
        name="f7",
        models=("bare:defense=none,seed=0", "defend:seed=1"),
        seeds=seeds,
        figures=figures,
        evaluation=EvaluationConfig(attacks=(FGSM,)),
    )
    evaluations = []
    for (model, threat, eps), counts in right.items():
        for seed, count in enumerate(counts):
            low, high = wilson_interval(count, n)
            metrics = {"accuracy": count / n, "accuracy_low": low, "accuracy_high": high}
            name = model if seeds == 1 else f"{model}-s{seed}"
            attack = f"fgsm:eps={eps}" if eps else "none"
            evaluations.append({"model": name, "threat_model": threat, "attack": attack, "n": n, "metrics": metrics})
    return RunRecord.from_json({"name": "f7", "experiment": to_dict(experiment), "evaluations": evaluations})


# in an order that is not that of eps
ONE_SEED = {
    ("bare", "clean", 0.0): [96],
    ("bare", "white_box", 1.0): [2],
    ("bare", "white_box", 0.1): [60],
    ("bare", "white_box", 0.2): [20],
    ("defend", "clean", 0.0): [92],
    ("defend", "white_box", 0.1): [80],
    ("defend", "white_box", 0.2): [70],
    ("defend", "transfer", 0.2): [75],
}


def test_fig7_draws_the_accuracies_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record(ONE_SEED, n=100, seeds=1)
    drawn = _figures_drawn(monkeypatch)
    plot = fig7.fig7(record)
    assert plot is not None
    _assert_png(plot.png)
    looks = style.styles(record.roles)
    found = {}
    for axis in drawn[0].axes:
        for line in axis.get_lines():
            if line.get_marker() == "o":
                model = next(m for m, look in looks.items() if look["color"] == line.get_color())
                points = zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), strict=True)
                found[axis.get_title(), model] = list(points)
    assert found == {
        ("white-box", "bare"): [(0.0, 96.0), (0.1, 60.0), (0.2, 20.0), (1.0, 2.0)],
        ("white-box", "defend"): [(0.0, 92.0), (0.1, 80.0), (0.2, 70.0)],
        ("transfer", "defend"): [(0.0, 92.0), (0.2, 75.0)],
    }
    # bare: from 60 to 20 between 0.1 and 0.2, so 50 at 0.125; defend is never down to 50
    assert "white-box: bare 0.12, defend not within these eps" in plot.caption
    assert "n = 100 test images" in plot.caption


def test_fig7_whiskers_are_wilson_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _figures_drawn(monkeypatch)
    record = _record(ONE_SEED, n=100, seeds=1)
    fig7.fig7(record)
    segments = [s for c in drawn[0].axes[0].collections for s in np.asarray(c.get_segments())]  # type: ignore[attr-defined]
    whiskers = {tuple(np.round(np.asarray(s)[:, 1], 6)) for s in segments if len(s) == 2}
    for count in (96, 60, 20, 2, 92, 80, 70):
        assert tuple(np.round([100 * x for x in wilson_interval(count, 100)], 6)) in whiskers


def test_fig7_over_seeds_is_mean_and_range(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {("bare", "clean", 0.0): [90, 96, 99], ("bare", "white_box", 0.1): [50, 40, 60]}
    record = _record(right, n=100, seeds=3)
    ((point,),) = (
        [p for p in points if p.eps] for models in fig7.accuracy_over_eps(record).values() for points in models.values()
    )
    assert (point.seeds, point.mean, point.least, point.greatest) == (3, pytest.approx(0.5), 0.4, 0.6)
    assert (point.low, point.high) == (wilson_interval(40, 100)[0], wilson_interval(60, 100)[1])
    drawn = _figures_drawn(monkeypatch)
    plot = fig7.fig7(record)
    assert plot is not None
    assert "mean of up to 3 seeds" in plot.caption
    band = drawn[0].axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in np.round(band, 6)} >= {(0.0, 90.0), (0.0, 99.0), (0.1, 40.0), (0.1, 60.0)}
    assert style.legend("bare", {"bare": "source"}) in [t.get_text() for t in drawn[0].legends[0].get_texts()]


def _ratios(*r: float) -> dict[str, np.ndarray]:
    values = np.array(r)
    n = len(values)
    return {
        "fig8__attack": np.array(FGSM),
        "fig8__r__defend": values,
        "fig8__d_rc__defend": np.arange(n, dtype=float),
        "fig8__d_ac__defend": np.full(n, 1.5),  # images 0 and 1 gained
    }


def test_fig8_counts_what_the_paper_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _figures_drawn(monkeypatch)
    stored = _ratios(0.25, 0.5, 0.75, 1.0, 1.5, math.inf)
    plot = fig8.fig8(stored, {"defend": "defended"}, {"defend": "defend"})
    assert plot is not None
    for said in (
        "Here it does not always",
        "R < 1 for 3 of 6 (50.0 %)",
        "largest 1.5",
        "1 without a finite R",
        "attacked image is for 2 of 6",
    ):
        assert said in plot.caption
    assert "median" not in plot.caption, "of five images"
    ten = fig8.fig8(_ratios(*[0.25] * 6, *[0.75] * 4, math.inf), {"defend": "defended"}, {"defend": "defend"})
    assert ten is not None
    assert "median 0.25 of 10, largest 0.75" in ten.caption
    (axis,) = drawn[0].axes
    assert "R < 1: 3 of 6 (50.0 %)" in axis.get_title()
    heights = [(p.get_x(), p.get_height()) for p in axis.patches if p.get_height()]  # type: ignore[attr-defined]
    assert sum(h for _, h in heights) == 5
    assert sum(h for x, h in heights if x < 0.99) == 3
    holding = fig8.fig8(_ratios(0.1, 0.9), {"defend": "defended"}, {"defend": "defend"})
    assert holding is not None
    assert "So it does here" in holding.caption
    border = fig8.fig8(_ratios(0.1, 0.0), {"defend": "defended"}, {"defend": "defend"})
    assert border is not None
    assert "Here it does not always" in border.caption  # 0 is not in (0, 1)


def test_fig5_says_the_norms_of_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record({("bare", "white_box", 0.2): [1]}, n=8, seeds=1, figures=("fig5",))
    clean = np.full((4, 3, 10, 10), 0.5, dtype=np.float32)
    adversarial = clean.copy()
    adversarial[0] += 0.2  # L2 = 0.2 sqrt(300)
    adversarial[1, 0, 0, 0] -= 0.25
    adversarial[2, :, 0, 0] += 0.2
    kept = {
        "clean": clean,
        "label": np.arange(4),
        f"adversarial__bare__{FGSM}": adversarial,
        f"prediction__bare__{FGSM}": np.array([0, 9, 2, 3]),
    }
    drawn = _figures_drawn(monkeypatch)
    found = draw.draw(record, kept, {})
    assert list(found) == ["fig5"]
    _assert_png(found["fig5"].png)
    said = [a.get_xlabel() for a in drawn[0].axes if a.get_xlabel()]
    assert said == ["L2 3.46 · Linf 0.2", "L2 0.25 · Linf 0.25", "L2 0.346 · Linf 0.2"]
    assert [a.get_title() for a in drawn[0].axes if a.get_title()] == ["is 0", "✓ 0", "is 1", "✗ 9", "is 2", "✓ 2"]
    assert "× 2 " in found["fig5"].caption  # 0.5 over the median Linf of 0.2 is 2.5
    assert "FGSM, eps 0.2: 1.35" in found["fig5"].caption  # mean of the three
    amplified = np.asarray(drawn[0].axes[3].get_images()[0].get_array())
    np.testing.assert_allclose(amplified, 0.9, atol=1e-6)


def test_fig6_shows_the_distance_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = np.full((2, 1, 10, 10), 0.5, dtype=np.float32)
    stored = {
        "fig6__attack": np.array(FGSM),
        "fig6__clean": clean,
        "fig6__label": np.array([4, 2]),
        "fig6__adversarial__defend": clean + 0.2,
        "fig6__prediction__defend": np.array([4, 7]),
        "fig6__reconstruction_clean__defend": clean,
        "fig6__reconstruction_adversarial__defend": clean + 0.05,
    }
    drawn = _figures_drawn(monkeypatch)
    plot = fig6.fig6(stored, {"bare": "source", "defend": "defended"})
    assert plot is not None
    assert "defend: 2.00 before, 0.50 after" in plot.caption
    _assert_png(plot.png)
    assert len(drawn[0].axes[0].get_images()) == 4 * 2
    texts = [t.get_text() for t in drawn[0].axes[0].texts]
    assert [t for t in texts if t.startswith(("✓", "✗"))] == ["✓ 4", "✗ 7"]


def test_fig2_says_where_the_energy_is() -> None:
    spectra = np.zeros((2, 1, 8, 8))
    spectra[:, :, 0, 0], spectra[:, :, 3, 3], spectra[:, :, 7, 0] = 3.0, 2.0, 1.0
    assert fig2.low_energy(spectra, [4, 2]) == [pytest.approx(13 / 14), pytest.approx(9 / 14)]


# -- in the report ---------------------------------------------------------------------------------------------------------


def _run_with_figures(root: Storage, **parts: bool) -> Storage:
    run = fake_run.write(root, **parts)
    record = run.read_json("run.json")
    record["experiment"]["figures"] = ["fig2", "fig5", "fig6", "fig7", "fig8"]
    run.write_json("run.json", record)
    return run


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
    run = _run_with_figures(root)
    run.write_bytes("figures.npz", _stored(trained))
    paths = report.build(run, root)
    found = {name: run.read_bytes(path) for name, path in paths.items() if name.startswith("plot_fig")}
    assert set(found) == {"plot_fig2", "plot_fig5", "plot_fig6", "plot_fig7", "plot_fig8"}
    for png in found.values():
        _assert_png(png)
    html = run.read_bytes("report/report.html").decode()
    for number in (2, 5, 6, 7, 8):
        assert f"Figure {number}:" in html
    report.build(run, root)
    assert {name: run.read_bytes(paths[name]) for name in found} == found


@pytest.mark.slow
def test_figures_without_their_data_are_left_out(tmp_path: Path) -> None:
    complete, bare = Storage(tmp_path / "a"), Storage(tmp_path / "b")
    paths = report.build(_run_with_figures(complete), complete)  # no figures.npz: an earlier version's run
    assert {p for p in paths if p.startswith("plot_fig")} == {"plot_fig5", "plot_fig7"}
    paths = report.build(_run_with_figures(bare, evaluations=False, gallery=False, finished=False), bare)
    assert not {p for p in paths if p.startswith("plot_fig")}


def test_corrupt_figures_are_named(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run = _run_with_figures(root, gallery=False)
    run.write_bytes("figures.npz", b"PK no zip")
    with pytest.raises(DataError, match=r"figures\.npz is corrupt"):
        report.build(run, root)


# -- plots at scale --------------------------------------------------------------------------------------------------------

BASES = ("no_defense", "control", *(f"defended_{i}" for i in range(9)))


def _many(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Plot], dict[str, Figure]]:
    """The plots of a run of 11 models x 3 seeds, and the figures behind them."""
    undefended = [f"{b}:defense=none,seed={i}" for i, b in enumerate(BASES[:2])]
    experiment = Experiment(
        name="many",
        models=(*undefended, *(f"{b}:seed=1,lam={i + 1}" for i, b in enumerate(BASES[2:]))),
        seeds=3,
        evaluation=EvaluationConfig(attacks=(FGSM,), threat_models=("white_box",)),
    )
    evaluations, histories = [], {}
    for i, name in enumerate(experiment.model_configs()):
        base, seed = divmod(i, 3)
        accuracy = 0.05 * base + 0.01 * seed
        metrics = {"accuracy": accuracy, "accuracy_low": 0.0, "accuracy_high": 1.0}
        evaluations.append({"model": name, "threat_model": "white_box", "attack": FGSM, "n": 100, "metrics": metrics})
        phase, terms = (("adversarial", {"loss_adv": 1.0}), ("reformer", {"loss_rec": 0.5, "bit_power": 0.5}))[i % 2]
        steps = [{"step": s, "time": 0.0, "loss": 1.0, **terms} for s in range(4)]
        histories[name] = [{"epoch": 0, "phase": phase, "steps": steps, "validation": {"accuracy": 0.9}}]
    record = RunRecord.from_json({"name": "many", "experiment": to_dict(experiment), "evaluations": evaluations})
    drawn = _figures_drawn(monkeypatch)
    plots = RunPlots(record, {}, histories, {}).draw()
    return plots, dict(zip(plots, drawn, strict=True))


@pytest.mark.slow
def test_33_models_show_means_and_one_seed_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    plots, drawn = _many(monkeypatch)
    assert set(plots) == {"accuracy", "losses", "validation"}
    for plot in plots.values():
        _assert_png(plot.png)
    (axis,) = [a for a in drawn["accuracy"].axes if a.get_title()]
    assert [t.get_text() for t in axis.get_yticklabels()] == list(BASES)
    widths = [p.get_width() for p in axis.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([5 * i + 1 for i in range(11)])  # mean of 0, 1 and 2 points above
    whisker = np.asarray(axis.collections[1].get_segments()[0])  # type: ignore[attr-defined]
    assert whisker[:, 0] == pytest.approx([5, 7])  # of control: the least and the greatest, not the Wilson interval
    assert "mean over the seeds" in plots["accuracy"].caption
    assert [a.get_title() for a in drawn["losses"].axes] == [f"{b}-s0" for b in BASES]
    for name in ("losses", "validation"):
        assert "Of 33 models, the first seed of each." in plots[name].caption
    assert len(drawn["validation"].axes[0].get_lines()) == 11
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn["validation"].axes[0].get_lines()}
    assert len(looks) == 11  # more models than colours, and still told apart


def test_undefended_models_are_grey_and_replicates_alike() -> None:
    def grey(colour: str) -> bool:
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return max(r, g, b) - min(r, g, b) < 40

    roles = {"a": "source", "b": "control", "c": "defended", "d": "defended"}
    palette = {model: look["color"] for model, look in style.styles(roles).items()}
    assert [grey(c) for c in palette.values()] == [True, True, False, False]
    assert len(set(palette.values())) == 4
    bases = {"a-s0": "a", "a-s1": "a", "b-s1": "b"}
    assert first_replicates(["a-s0", "a-s1", "b-s1"], bases) == ["a-s0", "b-s1"]  # b-s0 diverged


def test_names_that_fit_no_line_are_not_cut() -> None:
    models = {f"no_defense-resnet{i}": charts.Bar(accuracy=0.5, low=0.4, high=0.6) for i in range(9)}
    threat = labels.threat_title("transfer:no_defense-resnet18")
    roles = dict.fromkeys([*models, "not_measured"], "control")
    figure = charts.bars({threat: {"FGSM\neps 0.05": models}}, roles, style.styles(roles))
    _assert_png(style.png(figure))
    (axis,) = [a for a in figure.axes if a.get_title()]
    assert re.sub(r"\s+", " ", axis.get_title()) == "transfer from no_defense-resnet18 FGSM eps 0.05"
    assert max(map(len, axis.get_title().split("\n"))) <= 24
    assert [t.get_text() for t in axis.texts] == ["50.0"] * 9 + ["–"]
