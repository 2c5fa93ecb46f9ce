"""The command ``recipes``: what recipes show, and what they cost."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from components.fields import check_choice
from pipeline.cli.options import Parser
from pipeline.cli.usage import columns
from pipeline.program import program
from pipeline.recipes.measured import measurements
from pipeline.recipes.registry import BASES, RECIPES, scales_of
from pipeline.recipes.scales import SCALES
from pipeline.runtime.console import table_console


def execute(arguments: Sequence[str]) -> None:
    """Print the recipes: all of them, or with ``--scale`` those of a scale with their costs.

    Raises:
        ConfigError: an option or a scale is unknown.
    """
    parser = Parser("recipes", description="Lists the recipes.")
    parser.add_argument("--scale", metavar="SCALE", default="", help=f"{', '.join(SCALES)}: that scale and its cost")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    options = parser.parse_args(list(arguments))
    if options.scale:
        check_choice(options.scale, SCALES, "--scale")
    names = [name for name, recipe in RECIPES.items() if options.scale in ("", recipe.scale) and not is_alias(name)]
    if options.json:
        print(json.dumps([entry(name) for name in names], indent=2))
    elif options.scale:
        _print_costs(options.scale, [entry(name) for name in names])
    else:
        _print_overview()


def is_alias(name: str) -> bool:
    """Tell whether a name is another one of a recipe with a scale: ``table1`` of ``table1-fast``."""
    return f"{name}-{RECIPES[name].scale}" in RECIPES


def entry(name: str) -> dict[str, Any]:
    """Return what ``--json`` says of a recipe. ``measured`` is null if it was not measured."""
    recipe, measured = RECIPES[name], measurements().get(name)
    experiment = recipe.make()
    return {
        "recipe": name,
        "scale": recipe.scale,
        "summary": recipe.summary,
        "models": list(experiment.first_replicates()),
        "seeds": experiment.seeds,
        "attacks": list(experiment.evaluation.attacks),
        "threat_models": list(experiment.evaluation.threat_models),
        "test_images": experiment.evaluation.test_images or experiment.data.test_limit,
        "measured": asdict(measured) if measured else None,
    }


def _print_overview() -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("recipe", "scales", "models", "what it shows"):
        table.add_column(title, no_wrap=title in ("recipe", "scales"), justify="right" if title == "models" else "left")
    for base in BASES:
        recipe = RECIPES[base]
        table.add_row(base, " ".join(scales_of(base)), str(len(recipe.make().first_replicates())), recipe.summary)
    table_console().print(table)
    print("A scale follows the name, as in table1-slim. The name alone is its scale fast.", "", sep="\n")
    print(*columns(SCALES), "", sep="\n")
    print(f"What the recipes of a scale cost: {program()} recipes --scale slim")
    print(f"Start with: {program()} run mnist-demo")


def _print_costs(scale: str, entries: Sequence[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("recipe", "models", "attacks", "images", "seeds", "measured", "on"):
        is_number = title in ("models", "attacks", "images", "seeds", "measured")
        table.add_column(title, no_wrap=title != "on", justify="right" if is_number else "left")
    notes = []
    for e in entries:
        numbers = [
            str(len(e["models"])),
            str(len(e["attacks"])),
            f"{e['test_images']:,}" if e["test_images"] else "all",
        ]
        measured = measurements().get(e["recipe"])
        if measured is None:
            table.add_row(e["recipe"], *numbers, str(e["seeds"]), "not measured", "")
            continue
        table.add_row(
            e["recipe"], *numbers, str(measured.seeds), measured.duration, f"{measured.machine}, {measured.date}"
        )
        if measured.note:
            notes.append(f"{e['recipe']}: {measured.note}")
    print(f"{scale}: {SCALES[scale]}")
    table_console().print(table)
    print("Each of the models is trained from as many seeds. images: test images under each attack.")
    print(*(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes), sep="\n")
