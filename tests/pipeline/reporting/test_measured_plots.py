"""Plots show what was measured: budgets, norms, classes, examples with their differences, and losses."""

from __future__ import annotations

from typing import Any

import fake_run
import numpy as np
import pytest
from matplotlib.colors import to_hex

from components.evaluation.statistics import wilson_interval
from components.fields import to_dict
from pipeline.records import RunRecord
from pipeline.reporting import over_seeds, records
from pipeline.reporting.plots import budgets, charts, confusion, images, panels, style
from pipeline.reporting.run_plots import RunPlots
from pipeline.runtime.storage import Storage

N = 100


def evaluation(model: str, threat: str, attack: str, right: int) -> dict[str, Any]:
    low, high = wilson_interval(right, N)
    metrics = {"accuracy": right / N, "accuracy_low": low, "accuracy_high": high}
    source = model if threat == "white_box" else None
    return {"model": model, "source": source, "threat_model": threat, "attack": attack, "n": N, "metrics": metrics}


def record_of(*evaluations: dict[str, Any], **more: Any) -> RunRecord:
    experiment = to_dict(fake_run.experiment())
    return RunRecord.from_json({"name": "x", "experiment": experiment, "evaluations": list(evaluations), **more})


def test_accuracy_over_eps_has_the_measured_budgets_and_no_others() -> None:
    record = record_of(
        evaluation("defend", "clean", "none", 97),
        evaluation("defend", "white_box", "pgd:eps=0.0625,steps=20", 60),
        evaluation("defend", "white_box", "pgd:eps=0.03137254901960784,steps=20", 80),
        evaluation("defend", "white_box", "pgd:eps=0.03137254901960784,steps=40", 70),
        evaluation("defend", "white_box", "fgsm:eps=0.2", 50),
        evaluation("control", "white_box", "pgd:eps=0.0625,steps=20", 10),
    )
    measured = budgets.over_budgets(record)
    assert list(measured) == [("white-box, PGD, 20 steps", "linf")], "one budget of FGSM and of 40 steps is no curve"
    points = measured["white-box, PGD, 20 steps", "linf"]
    assert [(round(p["eps"], 4), p["mean"]) for p in points["defend"]] == [(0.0, 0.97), (0.0314, 0.8), (0.0625, 0.6)]
    assert [(p["eps"], p["mean"]) for p in points["control"]] == [(0.0625, 0.1)], "its clean accuracy is not known"
    plot = RunPlots(record, {}, {}, {}).draw()["budgets"]
    (axis,) = plot.figure.axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "8/255", "0.0625"]
    line = next(c for c in axis.containers if to_hex(c[0].get_color()) == style.DEFENDED[0])[0]
    assert line.get_marker() == "o"
    assert list(line.get_ydata()) == [97, 80, 60]


def test_the_worst_case_over_its_budgets_is_a_curve_too() -> None:
    case = {"model": "defend", "threat_model": "white_box", "norm": "linf", "n": N, "attacks": 2}
    low_high = {"accuracy_low": 0.1, "accuracy_high": 0.9}
    worst = [{**case, "eps": eps, "accuracy": accuracy, **low_high} for eps, accuracy in ((0.3, 0.2), (0.1, 0.6))]
    measured = budgets.over_budgets(record_of(worst_case=worst))
    assert [(p["eps"], p["mean"]) for p in measured["worst case per sample", "linf"]["defend"]] == [
        (0.1, 0.6),
        (0.3, 0.2),
    ]
    assert budgets.over_budgets(record_of(worst_case=worst[:1])) == {}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, RunPlots]:
    root = Storage(tmp_path_factory.mktemp("storage"))
    run = fake_run.write(root)
    record = records.read_run(run)
    judged = {path: records.read_judged(root, path) for path in panels.judged_paths(record)}
    return record, RunPlots(record, records.read_gallery(run), {}, {}, judged)


def test_zero_bars_give_way_to_the_norms(fake: tuple[RunRecord, RunPlots]) -> None:
    record, plots = fake
    bars = plots.accuracy()
    assert bars is not None
    drawn = [
        t.get_text().partition("\n")[0]
        for a in bars.figure.axes
        if a.get_title() == "white-box"
        for t in a.get_xticklabels()
    ]
    assert drawn == ["FGSM"]
    assert "they leave no image: white-box BIM, eps 0.2, 40 steps; white-box DDN" in bars.caption
    norms = plots.norms()
    assert norms is not None
    (axis,) = norms.figure.axes
    ddn = [e for e in record.evaluations if e.threat_model == "white_box" and e.curve]
    medians = [over_seeds.shown_metrics(e)["l2_median"] for e in ddn]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(medians)  # type: ignore[attr-defined]
    counts = [f"{over_seeds.shown_metrics(e)['l2_median']:.2f} of {over_seeds.shown_metrics(e)['broken']}" for e in ddn]
    assert [t.get_text() for t in axis.texts] == counts
    assert [to_hex(bar.get_facecolor()) for bar in axis.patches] == [plots.styles[e.model]["color"] for e in ddn]


def test_the_chart_beside_the_verdict_has_worst_and_clean_accuracy_in_the_models_colours() -> None:
    case = {"threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": N, "attacks": 2}
    left = {"no_defense": 0.0, "control": 0.12, "defend": 0.3}
    worst = [{**case, "model": m, "accuracy": a, "accuracy_low": a, "accuracy_high": a + 0.1} for m, a in left.items()]
    plots = RunPlots(record_of(*(evaluation(m, "clean", "none", 97) for m in left), worst_case=worst), {}, {}, {})
    plot = plots.worst_case()
    assert plot is not None
    (axis,) = plot.figure.axes
    assert [t.get_text() for t in axis.get_yticklabels()] == list(left)
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0, 12, 30])  # type: ignore[attr-defined]
    assert [to_hex(bar.get_facecolor()) for bar in axis.patches] == [plots.styles[m]["color"] for m in left]
    assert [line.get_xdata()[0] for line in axis.get_lines() if line.get_marker() == "D"] == [97] * 3
    assert axis.texts[-1].get_text() == "30.0 (30.0–40.0)"
    assert legend_of(plot) == ["under attack, 95 % interval", "clean"]
    assert "worst case per sample at Linf ≤ 0.2" in plot.caption


def legend_of(plot: style.Plot) -> list[str]:
    return [text.get_text() for text in plot.figure.legends[0].get_texts()]


def test_the_whiskers_beside_the_verdict_are_over_the_seeds_if_there_are_several() -> None:
    case = {"threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": N, "attacks": 2}
    bounds = {"accuracy_low": 0.1, "accuracy_high": 0.9}
    worst = [{**case, **bounds, "model": f"defend-s{i}", "accuracy": a} for i, a in enumerate((0.3, 0.5))]
    record = record_of(worst_case=worst).to_json()
    record["experiment"]["seeds"] = 2
    plot = RunPlots(RunRecord.from_json(record), {}, {}, {}).worst_case()
    assert plot is not None
    assert plot.figure.axes[0].texts[-1].get_text() == "40.0 (30.0–50.0)"
    assert legend_of(plot) == ["under attack, lowest to highest seed", "clean"]


def test_confusions_are_the_judged_predictions(fake: tuple[RunRecord, RunPlots]) -> None:
    record, plots = fake
    tables = panels.confusions(record, plots.judged)
    assert list(tables) == [f"{m}, {shown}" for m in fake_run.MODELS for shown in ("clean", "BIM")]
    columns = plots.judged["judged/defend-white_box-bim"]
    for i, j in ((0, 3), (4, 4), (9, 1)):
        expected = ((columns["label"] == i) & (columns["adversarial_prediction"] == j)).sum()
        assert tables["defend, BIM"][i, j] == expected
    assert tables["defend, clean"].sum() == fake_run.N
    assert confusion.counts(np.array([1, 1, 0]), np.array([0, -1, 0]), 2).tolist() == [[1, 0], [1, 0]]
    assert confusion.most_frequent(np.array([[5, 2], [3, 9]])) == (1, 0, 3)
    assert confusion.most_frequent(np.array([[5, 0], [0, 9]])) is None
    plot = plots.confusion()
    assert plot is not None
    true, predicted, count = confusion.most_frequent(tables["defend, BIM"]) or (0, 0, 0)
    assert f"defend, BIM: {true} becomes {predicted} ({count} of {fake_run.N})" in plot.caption


def test_examples_stand_beside_their_difference_its_norms_and_the_clean_prediction(
    fake: tuple[RunRecord, RunPlots],
) -> None:
    _, plots = fake
    plot = plots.adversarial()["adversarial-defend"]
    (axis,) = plot.figure.axes
    texts = [t.get_text() for t in axis.texts]
    key = next(k for k in plots.gallery if k.startswith("adversarial__defend__fgsm"))
    delta = plots.gallery[key].astype(np.float64) - plots.gallery["clean"]
    l2, linf = images.perturbation_norms(delta)
    assert f"L2 {l2[0]:.2f}\nLinf {linf[0]:.2f}" in texts
    assert texts.count("difference × 2") == 3
    assert "× 2 " in plot.caption
    pictures = [np.asarray(image.get_array()) for image in axis.get_images()]
    n = len(delta)
    np.testing.assert_allclose(pictures[2 * n], np.clip(0.5 + 2 * delta[0, 0], 0, 1), atol=1e-6)
    predicted = plots.judged["judged/defend-clean-none"]["clean_prediction"][:n]
    labels = plots.gallery["label"]
    assert texts[1 : n + 1] == [
        f"is {label}\n{style.prediction_label(int(p), int(label))[0]}"
        for p, label in zip(predicted, labels, strict=True)
    ]
    without = images.adversarial(plots.gallery, [("FGSM", key.removeprefix("adversarial__"))], None)[0]
    assert [t.get_text() for t in without.axes[0].texts][1] == f"is {labels[0]}"


def test_large_images_are_reduced_to_what_a_page_shows() -> None:
    large = np.random.default_rng(0).random((1, 3, 224, 448)).astype(np.float32)
    figure = images.image_rows([images.ImageRow("x", large)], np.array([0]))
    (drawn,) = figure.axes[0].get_images()
    assert np.asarray(drawn.get_array()).shape == (56, 112, 3)
    np.testing.assert_allclose(np.asarray(drawn.get_array())[0, 0], large[0, :, :4, :4].mean((1, 2)), atol=1e-6)


def test_reconstructions_that_look_like_noise_are_said_to_be_unlearned(fake: tuple[RunRecord, RunPlots]) -> None:
    record, plots = fake
    assert panels.reconstruction_note(record, plots.gallery) == "", "the made-up ones are near their targets"
    gallery = dict(plots.gallery)
    grey = gallery["level_2"].mean(axis=(1, 2, 3), keepdims=True)
    gallery["reconstruction_2__defend"] = np.broadcast_to(grey, gallery["level_2"].shape)
    said = panels.reconstruction_note(record, gallery)
    train = record.model_config("defend")
    assert said.startswith("Level 2 of defend looks like noise because it is hardly learned")
    assert f"after {train['epochs']} epochs at lambda {train['lam']:g}" in said
    assert "100 % of that of a uniform grey image" in said
    gallery["reconstruction_0__defend"] = np.full_like(gallery["clean"], gallery["clean"].mean())
    said = panels.reconstruction_note(record, gallery)
    assert said.startswith("Levels 0 and 2 of defend look like noise because they are hardly learned")
    plot = RunPlots(record, gallery, {}, {}).reconstructions()
    assert plot is not None
    assert plot.caption.endswith(said)


def test_the_thick_loss_curve_is_the_mean_of_the_neighbourhood() -> None:
    rng = np.random.default_rng(0)
    values = 5 + rng.normal(size=400)
    steps = [{"step": i, "time": 0.0, "loss": v} for i, v in enumerate(values)]
    steps[7]["loss"] = None
    figure = charts.losses({"m": [{"epoch": 0, "phase": "classifier", "steps": steps, "validation": {}}]})
    thin, thick = figure.axes[0].get_lines()
    assert thick.get_linewidth() > thin.get_linewidth()
    raw, smooth = (np.asarray(line.get_ydata()) for line in (thin, thick))
    half = round(charts.SMOOTHING * 400 / 2)
    assert smooth[200] == pytest.approx(np.mean(values[200 - half : 201 + half]))
    assert smooth[0] == pytest.approx(np.nanmean(raw[: half + 1]))
    assert np.isnan(smooth[7])
    assert np.nanstd(smooth) < np.nanstd(raw) / 3
