"""Plots are small SVG files, the same each time, in the colours of the page around them."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.figure import Figure
from pictures import assert_svg, texts_of

from pipeline.reporting.plots import style
from pipeline.reporting.plots.svg import PALETTE, inline, settings, svg


def drawn() -> Figure:
    with settings():
        figure = Figure(figsize=(4, 3), layout="constrained")
        axis = figure.add_subplot()
        axis.plot([0.0, 1.0], [0.0, 1.0], "o-", color=style.DEFENDED[0], label="a <b> & c")
        axis.imshow(np.eye(3), extent=(0, 1, 0, 1), cmap="gray", interpolation="none")
        axis.text(0.5, 0.5, "two\nlines", color=style.WRONG)
        axis.legend()
        style.frame(axis)
    return figure


def test_the_same_figure_gives_the_same_bytes_and_no_date() -> None:
    first, second = svg(drawn()), svg(drawn())
    assert first == second
    assert_svg(first)
    assert not re.search(rb"matplotlib|20\d\d-\d\d|<metadata|<!--", first)
    assert len(first) < 12_000


def test_text_stays_text_without_a_font_of_its_own() -> None:
    file = svg(drawn())
    assert {"a <b> & c", "two", "lines"} <= set(texts_of(file))
    assert file.decode().count("font-family") == 1, "that of the whole plot"


def test_every_colour_follows_dark_mode() -> None:
    file = svg(drawn()).decode()
    style_sheet, _, shapes = file.partition("</style>")
    assert "prefers-color-scheme: dark" in style_sheet
    used = set(re.findall(r"var\(--([\w-]+)\)", shapes))
    assert {"blue", "wrong", "line"} <= used <= PALETTE.keys()
    assert not re.search(r": #[0-9a-f]{6}", shapes), "a colour that stays as it is on a dark page"
    light = [pair[0] for pair in PALETTE.values()]
    assert len(set(light)) == len(light), "of two names with one colour, a plot gets the second"


def test_within_a_page_two_plots_share_neither_style_nor_ids() -> None:
    file = svg(drawn())
    first, second = inline(file, "a"), inline(file, "b")
    assert "<style" not in first
    assert "xmlns" not in first
    ids = [set(re.findall(r' id="([^"]+)"', element)) for element in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for element, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', element)) <= own
