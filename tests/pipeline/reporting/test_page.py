"""A reader finds the answer first, the rest by links, and details folded."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import pytest

from pipeline.records import RunRecord
from pipeline.reporting import labels, records, report, verdicts
from pipeline.reporting.html import page, pivots
from pipeline.runtime.provenance import ROOT
from pipeline.runtime.storage import Storage


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a finished run and its report, beside a plot of an earlier revision's report."""
    root = Storage(tmp_path_factory.mktemp("storage"))
    run = fake_run.write(root)
    for plot in ("accuracy.png", "mine.png"):
        run.write_bytes(f"report/plots/{plot}", b"an earlier revision's")
    report.build(run, root)
    return root


def run_of(root: Storage) -> Storage:
    return root / "runs/fake-mnist-0123456789abcdef"


class _Order(HTMLParser):
    """Headings in their order, and the depth of <details> at which each text stands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.folded: list[str] = []
        self._depth, self._heading = 0, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag == "details"
        self._heading = tag == "h2"

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "details"
        self._heading = False

    def handle_data(self, data: str) -> None:
        if self._heading and data.strip():
            self.headings.append(data.strip())
        elif self._depth:
            self.folded.append(data.strip())


def test_the_verdict_comes_first_and_what_it_was_made_with_last_and_folded(storage: Storage) -> None:
    text = run_of(storage).read_bytes("report/report.html").decode()
    order = _Order(text.partition("<main>")[2])
    assert order.headings[0] == "defend (Defend++) is not more robust than its control here."
    assert order.headings[1] == "Results"
    assert order.headings[-1] == "How this was made"
    assert text.index('id="verdict"') < text.index('<svg class="plot"') < text.index('id="results"')
    for made_with in ("Example CPU @ 2.60GHz", "00112233445566778899aabbccddeeff", "mlflow 3.17.2"):
        assert any(made_with in folded for folded in order.folded)
        assert text.count(made_with) == 1


def test_the_contents_name_every_section_and_plot(storage: Storage) -> None:
    text = run_of(storage).read_bytes("report/report.html").decode()
    side, top = (part.partition("</nav>")[0] for part in text.split("<nav ")[1:])
    entries = re.findall(r'<a href="#([\w-]+)">', side)
    assert entries == re.findall(r'<a href="#([\w-]+)">', top), "on a narrow screen they are folded"
    sections = re.findall(r'<(?:h2|h3|section)[^>]* id="([\w-]+)"', text)
    assert entries == sections
    assert "plot-confusion" in entries


def test_plots_of_earlier_revisions_are_replaced(storage: Storage) -> None:
    plots = run_of(storage).list("report/plots")
    assert "accuracy.svg" in plots
    assert "accuracy.png" not in plots
    assert "mine.png" in plots, "this one is no plot of a report"


def test_predictions_that_are_gone_leave_out_what_needs_them(storage: Storage, tmp_path: Path) -> None:
    shutil.copytree(storage.local_root, tmp_path / "copy")
    root = Storage(tmp_path / "copy")
    run = run_of(root)
    record = run.read_json("run.json")
    record["evaluations"] = [e for e in record["evaluations"] if e["threat_model"] != "transfer"]
    run.write_json("run.json", record)
    assert "plot_confusion" in report.build(run, root)
    shutil.rmtree(root.local_root / "judged")
    run.delete("report/plots/confusion.svg")
    paths = report.build(run, root)
    assert "plot_confusion" not in paths
    assert "plot_adversarial-defend" in paths


def test_a_plot_that_is_not_drawn_any_more_is_no_link(storage: Storage) -> None:
    record = records.read_run(run_of(storage))
    text = report.page(record, report.table_data(record, storage), {}, [], run_of(storage))
    assert "plots/" not in text
    assert 'id="plots"' not in text


def test_links_go_to_neighbours_to_a_server_and_to_the_documentation_of_a_checkout(tmp_path: Path) -> None:
    outside = page.links(Storage(tmp_path), ["table.csv"], "sqlite:///x.db")
    assert [link.address for link in outside] == ["table.csv", None, None, None]
    assert [link.where for link in outside[1:]] == [f"docs/{name}.md" for name in page.DOCS]
    inside = Storage(ROOT / "runs/runs/x/report")
    found = page.links(inside, [], "http://mlflow.example:5000")
    assert found[0] == page.Link("MLflow", "http://mlflow.example:5000")
    for link in found[1:]:
        assert link.address is not None
        assert (inside.local_root / link.address).resolve() == ROOT / link.where
    assert not any(link.address for link in page.links(Storage("memory://x"), [], None))


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (4 / 255, "4/255"),
        (0.03137, "8/255"),  # as the key of a record has it
        (1 / 255, "1/255"),
        (0.5 / 255, "0.5/255"),
        (0.2, "0.2"),  # 51/255
        (0.3, "0.3"),
        (0.031, "0.031"),
        (1.5, "1.5"),
        (0.1234, "0.1234"),
    ],
)
def test_a_budget_is_shown_as_it_was_typed(eps: float, text: str) -> None:
    assert labels.eps_text(eps) == text
    assert labels.budget_text("linf", eps) == f"Linf ≤ {text}"
    assert labels.attack_title(f"pgd:eps={eps},steps=7")[1] == f"eps {text}, 7 steps"
    worst = {"threat_model": "white_box", "norm": "linf", "eps": eps}
    assert verdicts.worst_titled(worst)["budget"] == f"Linf ≤ {text}"
    at_budget = {"accuracy_at_budget": {f"linf<={eps:.4g}": 0.5}, "untrusted": False}
    table = {"columns": [{"key": "k", "attack_title": "DDN", "threat_title": "t"}]}
    (head,) = pivots.minimal_norms({**table, "rows": [{"model": "m", "cells": {"k": at_budget}}]}).heads
    assert head == ("DDN", f"Linf ≤ {text}")


def test_a_p_value_without_an_image_to_test_is_a_dash() -> None:
    assert labels.p_value(1.0, 0, 0) == "–"
    assert labels.p_value(1.0, 3, 3) == "1.0000"
    assert labels.p_value(1e-9, 40, 2) == "< 0.0001"


def test_a_pivot_has_every_cell_of_its_rows() -> None:
    rows = [
        {"model": model, "budget": budget, "threat_title": title, "accuracy": accuracy}
        for model, budget, title, accuracy in (
            ("a", "L2 ≤ 1.5", "own", 0.1),
            ("a", "Linf ≤ 0.2", "own", 0.2),
            ("a", "L2 ≤ 1.5", "any", 0.3),
            ("b", "Linf ≤ 0.2", "own", 0.4),
        )
    ]
    pivot = pivots.worst_cases(rows)
    assert pivot.groups == {"own": 2, "any": 1}
    assert list(pivot.heads) == [("L2 ≤ 1.5",), ("Linf ≤ 0.2",), ("L2 ≤ 1.5",)]
    accuracies = {model: [cell and cell["accuracy"] for cell in cells] for model, cells in pivot.rows.items()}
    assert accuracies == {"a": [0.1, 0.2, 0.3], "b": [None, 0.4, None]}


def test_pairs_that_no_image_tells_apart_are_counted_and_left_out(storage: Storage) -> None:
    record = run_of(storage).read_json("run.json")
    pair = {"threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": 300, "against": "control"}
    record["worst_case_pairs"] = [
        {**pair, "model": "no_defense", "only_model": 0, "only_against": 0, "p": 1.0},
        {**pair, "model": "defend", "only_model": 2, "only_against": 1, "p": 1.0},
    ]
    case = {"threat_model": "white_box", "norm": "linf", "eps": 0.2, "n": 300, "attacks": 1}
    bounds = {"accuracy": 0.1, "accuracy_low": 0.05, "accuracy_high": 0.2}
    record["worst_case"] = [{**case, **bounds, "model": model} for model in fake_run.MODELS]
    read = RunRecord.from_json(record)
    text = report.page(read, report.table_data(read, storage), {}, [], run_of(storage))
    assert "1 of 2 comparisons in which at least one image tells two models apart" in text
    rows = text.partition('id="worst-pairs-table"')[2].partition("</table>")[0].count("<tr>")
    assert rows == 2, "the head and one pair"
    for row in record["worst_case_pairs"]:
        row["only_model"] = row["only_against"] = 0
    read = RunRecord.from_json(record)
    text = report.page(read, report.table_data(read, storage), {}, [], run_of(storage))
    assert "In none of 2 comparisons" in text
