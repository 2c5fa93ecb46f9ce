"""SVG of a plot: small, the same bytes each time, and in the colours of the page around it.

A colour of the palette becomes a CSS variable. In a page, the page's style sheet sets the variables
(:func:`palette_css`), so a plot follows dark mode. A file on its own has them inside.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

PALETTE = {
    "text": ("#111827", "#e6e8ea"),
    "faint": ("#4b5563", "#a8b0ba"),
    "frame": ("#9aa1ac", "#5d6570"),
    "line": ("#d5d9de", "#363b41"),
    "card": ("#fefefe", "#1f2226"),
    "undefended-1": ("#6b7280", "#aab2bf"),
    "undefended-2": ("#9ca3af", "#737d8c"),
    "undefended-3": ("#374151", "#d5dae1"),
    "undefended-4": ("#b8bec8", "#525c6a"),
    "blue": ("#0072b2", "#4da3dd"),
    "vermilion": ("#d55e00", "#f08a3c"),
    "green": ("#009e73", "#2fbf94"),
    "pink": ("#cc79a7", "#dd97be"),
    "orange": ("#e69f00", "#f0b429"),
    "sky": ("#56b4e9", "#7cc7f2"),
    "right": ("#00795c", "#3cc59c"),
    "wrong": ("#c2410c", "#f4824f"),
    "phase-joint": ("#f2e9d8", "#3a3426"),
    "phase-autoencoder": ("#dcebf5", "#223240"),
    "phase-classifier": ("#ececec", "#2a2d31"),
    "phase-adversarial": ("#f6dfe4", "#402a30"),
    "phase-adversarial-joint": ("#f7e3cf", "#43301f"),
    "phase-adversarial-autoencoder": ("#e4dff3", "#302a45"),
    "phase-reformer": ("#dff0e4", "#24372b"),
}
"""CSS variable -> its colour on a light and on a dark page. Plots are drawn in the light ones."""
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_SETTINGS: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # Text stays text.
    "svg.hashsalt": "defendpp",  # Otherwise the ids within a file are random.
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["text"],
    "axes.edgecolor": LIGHT["frame"],
    "xtick.color": LIGHT["frame"],
    "ytick.color": LIGHT["frame"],
    "xtick.labelcolor": LIGHT["faint"],
    "ytick.labelcolor": LIGHT["faint"],
    "grid.color": LIGHT["line"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "image.composite_image": False,  # Images keep their own pixels, which browsers enlarge.
}
FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_SHAPES = "stroke-linejoin: round; stroke-linecap: butt"


def settings() -> AbstractContextManager[None]:
    """Return the settings of matplotlib under which plots are drawn and written."""
    return matplotlib.rc_context(_SETTINGS)


def palette_css() -> str:
    """Return the CSS that sets the variables of the palette, for light and dark pages."""
    light, dark = ("; ".join(f"--{name}: {pair[i]}" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def plot_css() -> str:
    """Return the CSS that a plot needs beside the palette."""
    return f"svg.plot {{ font-family: {FONT} }}\nsvg.plot * {{ {_SHAPES} }}\nsvg.plot text {{ fill: var(--text) }}"


def svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file; the same figure gives the same bytes."""
    out = io.StringIO()
    with settings():
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = _lean(out.getvalue())
    style = f"{palette_css()}\n{plot_css()}\nsvg.plot {{ background: var(--card) }}"
    return text.replace(">", f">\n<style>\n{style}\n</style>", 1).encode()


def inline(file: bytes, prefix: str) -> str:
    """Return an SVG file of :func:`svg` as an element of a page.

    Args:
        prefix: differs for each plot of a page, because an id must be unique in its page.
    """
    text = re.sub(r"<style>.*?</style>\n?", "", file.decode(), count=1, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    # The page scrolls a plot rather than shrink its text too much, so it must know the plot's width.
    text = re.sub(r' width="(\d+)"', r' style="--width: \1px"\g<0>', text, count=1)
    text = re.sub(r' id="', f' id="{prefix}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", text)


def _lean(text: str) -> str:
    """Return matplotlib's SVG without what a browser does not need, and with variable colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text)
    text = re.sub(r" transform=\"rotate\(-0 [^)]*\)\"", "", text)
    text = re.sub(r' d="([^"]*)"', lambda match: f' d="{_rounded(match[1])}"', text)
    names = {light: name for name, light in LIGHT.items()}
    text = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], text)
    text = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', _head, text, count=1)
    text = text.replace("<svg ", '<svg class="plot" ', 1)
    return re.sub(r"\n\s*", "\n", text).strip() + "\n"


def _head(match: re.Match[str]) -> str:
    """Return a size in points as one in CSS pixels."""
    width, height = (round(float(points) * 96 / 72) for points in match.groups())
    return f'width="{width}" height="{height}"'


def _rounded(path: str) -> str:
    """Return the data of a path with two decimals, a hundredth of a point."""
    numbers = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), path)
    return " ".join(numbers.split())
