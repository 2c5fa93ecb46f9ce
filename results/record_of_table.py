"""Record of a run (run.json), rebuilt from its table.md where only the table was kept.

    python results/record_of_table.py results/table1-slim n=300 train=9059

It holds what the table holds: accuracies and their intervals, by model and seed. The rebuilt record
is checked: it must give the same values beside the paper's as the table does. "rebuilt_from" marks
it. Runs since 2026-11-29 keep their own run.json.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from components.attacks.spec import AttackSpec  # noqa: E402
from components.evaluation.statistics import wilson_interval  # noqa: E402
from components.fields import to_dict  # noqa: E402
from pipeline.cli.recipe_arguments import parse_experiment  # noqa: E402
from pipeline.recipes.registry import RECIPES  # noqa: E402
from pipeline.records import RunRecord  # noqa: E402
from pipeline.reporting import markdown  # noqa: E402
from pipeline.reporting.labels import attack_text, threat_title  # noqa: E402

THREATS = ("clean", "random", "white_box", "grey_box", "transfer")


def cells(line: str) -> list[str]:
    """Return the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def column(head: str, attacks: list[str]) -> tuple[str, str]:
    """Return threat model and attack of a column."""
    for threat in THREATS:
        for attack in ["none"] if threat == "clean" else attacks:
            title = attack_text(attack).replace(",", "", 1)
            names = {f"{threat_title(threat)} {title}", f"{threat_title(threat)} {title.replace('C&W', 'CW')}"}
            if head == threat == "clean" or head in names:
                return threat, attack
    raise ValueError(f"unknown column {head!r}")


def made_with(text: str, key: str) -> str:
    """Return a line of the table's last section."""
    return re.search(rf"^- {key}: (.*)$", text, re.MULTILINE)[1].strip("`")  # type: ignore[index]


def rebuild(directory: Path, n: int, train: int) -> dict[str, Any]:
    """Return the record of a table."""
    text = (directory / "table.md").read_text()
    head, _, *rows = (line for line in text[: text.index("\n### ")].splitlines() if line.startswith("| "))
    recipe = RECIPES[directory.name].make()
    attacks = [str(AttackSpec.parse(a)) for a in recipe.evaluation.attacks if not a.startswith("autoattack")]
    columns = [column(name, attacks) for name in cells(head)[1:]]
    evaluations = []
    for row in rows:
        name, *values = cells(row)
        for (threat, attack), value in zip(columns, values, strict=True):
            if match := re.match(r"([\d.]+)†? \(", value):
                right = round(float(match[1]) / 100 * n)
                low, high = wilson_interval(right, n)
                metrics = {"accuracy": right / n, "accuracy_low": low, "accuracy_high": high}
                model = name.partition(" ")[0]
                source = None if threat in ("clean", "random") else model
                if threat in ("transfer", "grey_box"):
                    source = f"no_defense-s{model.rpartition('-s')[2]}"
                evaluations.append(
                    {"model": model, "source": source, "threat_model": threat, "attack": attack, "n": n}
                    | {"metrics": metrics}
                )
    # The command has the options of the run, such as its models and its GPU.
    options = shlex.split(made_with(text, "Command")).index(directory.name)
    recipe = parse_experiment("run", shlex.split(made_with(text, "Command"))[options:])
    bases = {e["model"].rpartition("-s")[0] for e in evaluations}
    seeds = 1 + max(int(e["model"].rpartition("-s")[2]) for e in evaluations)
    experiment = replace(
        recipe,
        seeds=seeds,
        models=tuple(m for m in recipe.models if m.partition(":")[0] in bases),
        evaluation=replace(recipe.evaluation, attacks=tuple(attacks)),
    )
    cpu, cpus, gpu = made_with(text, "Hardware").split(", ")
    source = made_with(text, "Source")
    return {
        "schema": 1,
        "name": directory.name,
        "rebuilt_from": "table.md",
        "experiment": to_dict(experiment),
        "command": made_with(text, "Command"),
        "finished": made_with(text, "Finished").replace(" UTC", ":00+00:00").replace(" ", "T"),
        "git": {"revision": source.partition(" ")[0], "dirty": "uncommitted" in source},
        "hardware": {"cpu": cpu, "cpus": int(cpus.split()[0]), "gpus": [] if gpu == "no GPU" else [gpu]},
        "data": {"rows": {"train": train, "test": n}},
        "evaluations": evaluations,
    }


def main(directory: str, *sizes: str) -> None:
    """Write run.json beside table.md."""
    path = Path(directory).resolve()
    numbers = dict(size.split("=") for size in sizes)
    record = rebuild(path, int(numbers["n"]), int(numbers["train"]))
    rebuilt = markdown.markdown(RunRecord.from_json(record))
    table = (path / "table.md").read_text()

    def beside(text: str) -> list[str]:
        section = text[text.index("### Beside the paper") :].split("\n### ", 1)[0]
        return [line for line in section.splitlines() if line.startswith("| ")]

    assert beside(rebuilt) == beside(table), "the rebuilt record gives other values than the table"
    (path / "run.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
