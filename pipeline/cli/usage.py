"""Help texts of the commands. Imports nothing heavy."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from pipeline.program import program
from pipeline.recipes.registry import BASES, scales_of

COMMANDS = {
    "run": "all stages of a recipe; the same command again continues",
    "pyramids": "stage 1: images to low-pass pyramids in Parquet shards",
    "train": "stage 2: train the recipe's models",
    "attack": "stage 3: attack them, then report; with --model, attack a classifier of your own",
    "report": "stage 4: tables and plots from the records alone",
    "sweep": "search settings, and test the choice once",
}
"""Commands that take a recipe -> what they do."""
OTHER_COMMANDS = {
    "export": "a trained classifier as ONNX, torch.export or safetensors, for other programs",
    "recipes": "the recipes: what they show, and what they cost",
    "reproduction": "a page with the paper's numbers beside those of finished runs",
    "ui": "open MLflow on the runs of a storage",
}
OPTIONS = {
    "--help": "this text; behind a command, the help of that command",
    "--version": "versions of this project, of its source and of its libraries",
    "--print-completion": "bash, zsh or fish: a script that completes commands in that shell",
}
"""Options of the program itself."""
_FORMS = {
    "run": ("RECIPE [--FIELD VALUE ...]", "--from FILE [--FIELD VALUE ...]"),
    "attack": ("RECIPE [--FIELD VALUE ...]", "--model MODEL [--arch ARCH] [--data SOURCE] [--FIELD VALUE ...]"),
    "report": ("RECIPE [--FIELD VALUE ...]", "--from FILE", "--republish DIR [DIR ...]"),
    "sweep": ("RECIPE --space FILE [--FIELD VALUE ...]",),
}
_NOTES = {
    "run": "--from FILE takes the experiment that a record holds: best.json of a sweep, or run.json of a run.",
    "report": "--from FILE reports the run of a run.json, whatever its settings. --republish publishes finished "
    "records in\nMLflow in today's form (report --republish --help).",
}
SWEEP_OPTIONS = {
    "--space": "a file of tune_spaces/ (or its name alone), or your own copy of one (docs/sweeps.md)",
    "--trials": "number of configurations, instead of the space's; with more than before, the sweep goes on",
    "--search": "grid, random or tpe, instead of the space's",
    "--seed": "seed of random and tpe; models have seeds of their own in --models (default: 0)",
    "--max-concurrent": "how many models are trained at once at most (default: as many as there is room for)",
    "--resume": "refuse to begin a new sweep; without it, too, the same command continues a sweep",
    "--evaluate": "how the choice is tested on test images, beside an undefended model and its control: full (the "
    "suite of all attacks at the budget of the recipe's first attack that has one; default), recipe (the recipe's "
    "attacks and threat models) or none",
    "--no-evaluate": "the same as --evaluate none",
    "--seeds": "train N models per configuration and judge it by their mean",
}
ATTACK_OPTIONS = {
    "--model": "weights: a .safetensors or .pth file (path or URI), mlflow:models:/NAME@ALIAS, mlflow:runs:/ID/PATH, "
    "hf:ORG/NAME[@REVISION][/FILE] (docs/ecosystem.md), torchvision:WEIGHTS, or robustbench:ID, which needs no --arch; "
    "FILE#KEY where a file holds several networks (checkpoint.pth#state_dict_ema)",
    "--arch": "the network of these weights: resnet18, resnet50, vgg16, vgg16_bn, torchvision:NAME, timm:NAME, or "
    "MODULE:FUNCTION that returns an nn.Module (docs/networks.md). A file that this project exported knows its "
    "network; MODULE:FUNCTION must be given even then, because a file does not decide which code is imported",
    "--data": "the test images: sample:mnist, parquet:DIR, folder:DIR, hf:ORG/NAME, torchvision:cifar10, ... (as "
    "--data.source)",
    "--eps": "budget of the attacks (default: the field's standard: 0.3 for grey images, 8/255 for colour images up to "
    "64 pixels, 4/255 above)",
    "--norm": "norm of that budget: linf (default) or l2",
    "--name": "the model's name in the report",
}
UI_OPTIONS = {
    "--storage": "where the runs are (default: ~/defendpp)",
    "--port": "port of 127.0.0.1 (default: 5000 if it is free, else any)",
    "--tracking-uri": "another MLflow: a database (sqlite:///...) or a server (http://...)",
    "--run": "id of an MLflow run whose page is shown",
}
_MODEL_NOTES = """\
The network takes images in [0,1]. If it was trained on normalised images, set --train.normalize-mean
and --train.normalize-std. Image size, channels and classes: --data.image-size, --data.channels,
--data.num-classes. Number of attacked images: --evaluation.test-images. torchvision:googlenet and
:inception_v3 transform their images as torchvision's own weights need it; for other weights:
--arch torchvision:googlenet,transform_input=false. The adaptive attack uses the
autoencoder.safetensors beside an exported file.
"""


def columns(entries: Mapping[str, str]) -> list[str]:
    """Return lines with names and their texts in two columns."""
    width = max(map(len, entries)) + 4
    lines = []
    for name, text in entries.items():
        first, *more = textwrap.wrap(text, 100 - width)
        lines += [f"  {name:<{width - 2}}{first}", *(" " * width + line for line in more)]
    return lines


def main_help() -> str:
    """Return the help of the program."""
    return "\n".join(
        [
            f"usage: {program()} COMMAND ...",
            "",
            "Trains Defend++ and the models that it is compared with, attacks all of them, and reports what the",
            "numbers mean.",
            "",
            "commands:",
            *columns({**COMMANDS, **OTHER_COMMANDS}),
            "",
            "options:",
            *columns(OPTIONS),
            "",
            "start here:",
            f"  {program()} run mnist-demo",
            f"  {program()} recipes",
            f"  {program()} run RECIPE --help     every field of a recipe, its type and meaning",
            "",
            "Every command and what it prints: docs/commands.md. What an error means: docs/errors.md.",
            "",
        ]
    )


def command_help(command: str) -> str:
    """Return the help of a command that takes a recipe."""
    options = {"sweep": SWEEP_OPTIONS, "attack": ATTACK_OPTIONS}.get(command, {})
    lines = [*_usage(command), "", f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.", ""]
    lines += [_NOTES[command], ""] if command in _NOTES else []
    if options:
        lines += ["with --model:" if command == "attack" else "options:", *columns(options), ""]
    lines += [_MODEL_NOTES] if command == "attack" else []
    lines += ["recipes:", *_recipe_names(), ""]
    lines += [f"Every field of a recipe, its type and meaning: {program()} run RECIPE --help", ""]
    return "\n".join(lines)


def _usage(command: str) -> list[str]:
    forms = _FORMS.get(command, _FORMS["run"])
    return [f"{'usage:' if i == 0 else '      '} {program()} {command} {form}" for i, form in enumerate(forms)]


def _recipe_names() -> list[str]:
    """Return the names of all recipes, with the scales that follow a name."""
    by_scales: dict[tuple[str, ...], list[str]] = {}
    for base in BASES:
        by_scales.setdefault(scales_of(base), []).append(base)
    lines = []
    for scales, names in by_scales.items():
        lines.append("  " + ", ".join(names) + (f": -{', -'.join(scales)}" if scales else ""))
    return [*lines, "  A scale follows the name, as in table1-slim; a name alone is its scale fast."]
