"""The paper's figures and the plots of a run show the numbers of the records."""

from __future__ import annotations

import math
import re
from pathlib import Path

import fake_run
import numpy as np
import pytest
from pictures import assert_svg

from components.config import EvaluationConfig, Experiment
from components.config.roles import first_replicates
from components.errors import DataError
from components.evaluation.statistics import wilson_interval
from components.fields import to_dict
from pipeline.records import RunRecord
from pipeline.reporting import labels, report
from pipeline.reporting.figures import fig2, fig6, fig7, fig8
from pipeline.reporting.plots import charts, style
from pipeline.reporting.plots.style import Plot
from pipeline.reporting.plots.svg import svg
from pipeline.reporting.run_plots import RunPlots
from pipeline.runtime.storage import Storage

FGSM = "fgsm:eps=0.2"


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


def test_fig7_draws_the_accuracies_of_the_records() -> None:
    record = _record(ONE_SEED, n=100, seeds=1)
    plot = fig7.fig7(record)
    assert plot is not None
    assert_svg(plot.svg)
    looks = style.styles(record.roles)
    found = {}
    for axis in plot.figure.axes:
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


def test_fig7_whiskers_are_wilson_intervals() -> None:
    record = _record(ONE_SEED, n=100, seeds=1)
    plot = fig7.fig7(record)
    assert plot is not None
    segments = [s for c in plot.figure.axes[0].collections for s in np.asarray(c.get_segments())]  # type: ignore[attr-defined]
    whiskers = {tuple(np.round(np.asarray(s)[:, 1], 6)) for s in segments if len(s) == 2}
    for count in (96, 60, 20, 2, 92, 80, 70):
        assert tuple(np.round([100 * x for x in wilson_interval(count, 100)], 6)) in whiskers


def test_fig7_over_seeds_is_mean_and_range() -> None:
    right = {("bare", "clean", 0.0): [90, 96, 99], ("bare", "white_box", 0.1): [50, 40, 60]}
    record = _record(right, n=100, seeds=3)
    ((point,),) = (
        [p for p in points if p["eps"]]
        for models in fig7.accuracy_over_eps(record).values()
        for points in models.values()
    )
    assert [point[key] for key in ("seeds", "mean", "min", "max")] == [3, pytest.approx(0.5), 0.4, 0.6]
    assert (point["low"], point["high"]) == (wilson_interval(40, 100)[0], wilson_interval(60, 100)[1])
    plot = fig7.fig7(record)
    assert plot is not None
    assert "mean of up to 3 seeds" in plot.caption
    band = plot.figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in np.round(band, 6)} >= {(0.0, 90.0), (0.0, 99.0), (0.1, 40.0), (0.1, 60.0)}
    assert style.legend("bare", {"bare": "source"}) in [t.get_text() for t in plot.figure.legends[0].get_texts()]


def _ratios(*r: float) -> dict[str, np.ndarray]:
    values = np.array(r)
    n = len(values)
    return {
        "fig8__attack": np.array(FGSM),
        "fig8__r__defend": values,
        "fig8__d_rc__defend": np.arange(n, dtype=float),
        "fig8__d_ac__defend": np.full(n, 1.5),  # images 0 and 1 gained
    }


def test_fig8_counts_what_the_paper_claims() -> None:
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
    (axis,) = plot.figure.axes
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


def test_fig5_says_the_norms_of_what_it_shows() -> None:
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
    found = RunPlots(record, kept, {}, {}).figures()
    assert list(found) == ["fig5"]
    assert_svg(found["fig5"].svg)
    axes = found["fig5"].figure.axes
    said = [a.get_xlabel() for a in axes if a.get_xlabel()]
    assert said == ["L2 3.46 · Linf 0.2", "L2 0.25 · Linf 0.25", "L2 0.346 · Linf 0.2"]
    assert [a.get_title() for a in axes if a.get_title()] == ["is 0", "✓ 0", "is 1", "✗ 9", "is 2", "✓ 2"]
    assert "× 2 " in found["fig5"].caption  # 0.5 over the median Linf of 0.2 is 2.5
    assert "FGSM, eps 0.2: 1.35" in found["fig5"].caption  # mean of the three
    amplified = np.asarray(axes[3].get_images()[0].get_array())
    np.testing.assert_allclose(amplified, 0.9, atol=1e-6)


def test_fig6_shows_the_distance_before_and_after() -> None:
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
    plot = fig6.fig6(stored, {"bare": "source", "defend": "defended"})
    assert plot is not None
    assert "defend: 2.00 before, 0.50 after" in plot.caption
    assert_svg(plot.svg)
    assert len(plot.figure.axes[0].get_images()) == 4 * 2
    texts = [t.get_text() for t in plot.figure.axes[0].texts]
    assert [t for t in texts if t.startswith(("✓", "✗"))] == ["✓ 4", "✗ 7"]


def test_fig2_says_where_the_energy_is() -> None:
    spectra = np.zeros((2, 1, 8, 8))
    spectra[:, :, 0, 0], spectra[:, :, 3, 3], spectra[:, :, 7, 0] = 3.0, 2.0, 1.0
    assert fig2.low_energy(spectra, [4, 2]) == [pytest.approx(13 / 14), pytest.approx(9 / 14)]


@pytest.mark.slow
def test_figures_without_their_data_are_left_out(tmp_path: Path) -> None:
    complete, bare = Storage(tmp_path / "a"), Storage(tmp_path / "b")
    paths = report.build(fake_run.write_with_figures(complete), complete)  # no figures.npz: an earlier version's run
    assert {p for p in paths if p.startswith("plot_fig")} == {"plot_fig5", "plot_fig7"}
    paths = report.build(fake_run.write_with_figures(bare, evaluations=False, gallery=False, finished=False), bare)
    assert not {p for p in paths if p.startswith("plot_fig")}


def test_corrupt_figures_are_named(tmp_path: Path) -> None:
    root = Storage(tmp_path)
    run = fake_run.write_with_figures(root, gallery=False)
    run.write_bytes("figures.npz", b"PK no zip")
    with pytest.raises(DataError, match=r"figures\.npz is corrupt"):
        report.build(run, root)


BASES = ("no_defense", "control", *(f"defended_{i}" for i in range(9)))


def _many() -> dict[str, Plot]:
    """The plots of a run of 11 models x 3 seeds."""
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
    return RunPlots(record, {}, histories, {}).draw()


@pytest.mark.slow
def test_33_models_show_means_and_one_seed_of_each() -> None:
    plots = _many()
    assert set(plots) == {"worst-case", "accuracy", "losses", "validation"}
    for plot in plots.values():
        assert_svg(plot.svg)
    (axis,) = [a for a in plots["accuracy"].figure.axes if a.get_title()]
    assert [t.get_text() for t in axis.get_yticklabels()] == list(BASES)
    widths = [p.get_width() for p in axis.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx([5 * i + 1 for i in range(11)])  # mean of 0, 1 and 2 points above
    whisker = np.asarray(axis.collections[1].get_segments()[0])  # type: ignore[attr-defined]
    assert whisker[:, 0] == pytest.approx([5, 7])  # of control: the least and the greatest, not the Wilson interval
    assert "mean over the seeds" in plots["accuracy"].caption
    assert [a.get_title() for a in plots["losses"].figure.axes] == [f"{b}-s0" for b in BASES]
    for name in ("losses", "validation"):
        assert "Of 33 models, the first seed of each." in plots[name].caption
    assert len(plots["validation"].figure.axes[0].get_lines()) == 11
    looks = {(line.get_color(), line.get_linestyle()) for line in plots["validation"].figure.axes[0].get_lines()}
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
    assert_svg(svg(figure))
    (axis,) = [a for a in figure.axes if a.get_title()]
    assert re.sub(r"\s+", " ", axis.get_title()) == "transfer from no_defense-resnet18 FGSM eps 0.05"
    assert max(map(len, axis.get_title().split("\n"))) <= 24
    assert [t.get_text() for t in axis.texts] == ["50.0"] * 9 + ["–"]
