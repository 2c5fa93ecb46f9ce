"""Plots: a model has one colour in all of them, and a curve reaches the end of its axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_run
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from components.config import Experiment
from components.fields import from_dict
from pipeline.records import RunRecord
from pipeline.reporting import records
from pipeline.reporting.plots import charts, style
from pipeline.reporting.run_plots import RunPlots
from pipeline.runtime.storage import Storage


def drawn_of(record: RunRecord, root: Storage) -> dict[str, Figure]:
    """Draw the plots of a record; return their figures by name."""
    histories = {
        name: [records.read_epoch(root, file) for file in records.history_files(root, model.path)]
        for name, model in record.models.items()
    }
    return {name: plot.figure for name, plot in RunPlots(record, {}, histories, {}).draw().items()}


def colours_in(figure: Figure) -> dict[str, str]:
    """Model -> colour in the legend of a figure."""
    legends = [*figure.legends, *(legend for axis in figure.axes if (legend := axis.get_legend()))]
    found = {}
    for legend in legends:
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            colour = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
            found[text.get_text().partition(" ")[0]] = to_hex(colour)
    return found


def of_several_seeds(record: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The same record with replicates, each a copy of the model."""
    record["experiment"] |= {"seeds": seeds, "figures": ["fig7"]}
    replicates = from_dict(Experiment, record["experiment"]).replicates()
    record["models"] = {name: record["models"][base] for name, (base, _) in replicates.items()}
    source = {r: f"no_defense-s{r}" for r in range(seeds)}
    record["evaluations"] = [
        {**e, "model": name, "source": source[r] if e["threat_model"] == "transfer" else e["source"] and name}
        for name, (base, r) in replicates.items()
        for e in record["evaluations"]
        if e["model"] == base
    ]
    return record


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_model_has_the_same_colour_in_every_plot(tmp_path: Any, seeds: int) -> None:
    """Also where a plot shows a part of the models, or one curve for all seeds of a model."""
    root = Storage(tmp_path)
    record = fake_run.write(root, gallery=False).read_json("run.json")
    if seeds > 1:
        record = of_several_seeds(record, seeds)
    figures = drawn_of(RunRecord.from_json(record), root)
    assert {"accuracy", "curves", "curves-transfer", "validation"} <= set(figures)
    found: dict[str, dict[str, str]] = {}
    for name in figures.keys() - {"losses", "transfer", "worst-case", "norms"}:  # no legend of them names models
        for model, colour in colours_in(figures[name]).items():
            base, _, seed = model.partition("-s")
            if seed in ("", "0"):
                found.setdefault(base, {})[name] = colour
    assert set(found) == set(fake_run.MODELS)
    assert len(found["control"]) == (5 if seeds > 1 else 4)
    for model, seen in found.items():
        assert len(set(seen.values())) == 1, (model, seen)


def test_a_model_that_was_not_trained_changes_no_colour(tmp_path: Any) -> None:
    root = Storage(tmp_path)
    record = records.read_run(fake_run.write(root, gallery=False))
    whole = drawn_of(record, root)
    partial = replace(record, models={k: v for k, v in record.models.items() if k != "no_defense"})
    rest = drawn_of(partial, root)
    assert colours_in(rest["validation"])["control"] == colours_in(whole["validation"])["control"]


def test_a_curve_goes_on_to_the_end_of_the_axis() -> None:
    """Its grid ends at the largest norm of its own examples: beyond that nothing changes."""
    short = {"norm": "l2", "eps": [0.0, 0.5, 1.5], "accuracy": [1.0, 0.98, 0.965]}
    long = {"norm": "l2", "eps": [0.0, 1.0, 2.5], "accuracy": [1.0, 0.5, 0.0]}
    panels = {"transfer:\nC&W": {"control": short, "defend": long}}
    roles = {"control": "control", "defend": "defended"}
    (axis,) = charts.curves(panels, roles, style.styles(roles)).axes
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in axis.get_lines()]
    right = axis.get_xlim()[1]
    assert right == pytest.approx(1.05 * 2.5)
    assert [x for x, _ in ends] == pytest.approx([right, right])
    assert [y for _, y in ends] == pytest.approx([96.5, 0.0])


def test_a_legend_of_many_bars_names_only_the_kinds_of_models_there_are() -> None:
    figures = []
    for role in ("control", "defended", "given"):
        names = [f"m{i}" for i in range(style.MANY_BARS + 1)]
        bar = charts.Bar(accuracy=0.5, low=0.4, high=0.6)
        roles = dict.fromkeys(names, role)
        figures.append(charts.bars({"white-box": {"FGSM": dict.fromkeys(names, bar)}}, roles, style.styles(roles)))
    said = [[t.get_text() for t in figure.legends[0].get_texts()] for figure in figures]
    assert said == [["grey: undefended"], ["coloured: defended"], ["coloured: external, not trained here"]]
