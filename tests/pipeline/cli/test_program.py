"""The program by its three names, its first line, and its completion in bash."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import MAIN
from documentation import blocks
from repository import ROOT

from pipeline.cli import completion, usage
from pipeline.cli.arguments import parse_attack, parse_sweep
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.cli.usage import COMMANDS, OTHER_COMMANDS
from pipeline.main import main
from pipeline.recipes.registry import RECIPES

BIN = Path(sys.executable).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )


def test_the_page_of_commands_has_every_command_and_option() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    tables = (COMMANDS, OTHER_COMMANDS, usage.OPTIONS, usage.SWEEP_OPTIONS, usage.ATTACK_OPTIONS, usage.UI_OPTIONS)
    assert [name for table in tables for name in table if f"`{name}" not in page] == []


def examples() -> list[str]:
    """Return the commands of docs/commands.md."""
    commands = [c for block in blocks("sh") if str(block.page) == "docs/commands.md" for c in block.commands()]
    return [command for command in commands if command.startswith("defendpp ") and "--from" not in command]


@pytest.mark.parametrize("line", examples())
def test_the_commands_of_the_page_are_taken(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = shlex.split(line.partition(" > ")[0])[1:]
    if command == "ui":
        with pytest.raises(SystemExit):
            main([command, *arguments, "--help"])
    elif command in ("export", "reproduction"):
        assert [argument for argument in arguments if argument.startswith("--")] == ["--out"]
    elif command in ("recipes", "--print-completion"):
        assert main([command, *arguments]) == 0
    elif "--model" in arguments:
        assert parse_attack(arguments)[0].arch == "torchvision:resnet50"
    elif "--help" not in arguments:
        rest = parse_sweep(arguments)[1] if command == "sweep" else arguments
        assert parse_experiment(command, rest).name == arguments[0]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ([str(BIN / "defendpp")], str(BIN / "defendpp")),
        (["defendpp"], "defendpp"),
        ([sys.executable, "-m", "pipeline"], f"{sys.executable} -m pipeline"),
        ([sys.executable, "pipeline/main.py"], f"{sys.executable} pipeline/main.py"),
        (MAIN, " ".join(MAIN)),
    ],
)
def test_usage_shows_the_name_by_which_the_program_was_called(command: list[str], name: str) -> None:
    on_path = f"{BIN}{os.pathsep}{os.environ['PATH']}" if command == ["defendpp"] else "/usr/bin:/bin"
    helped = run(*command, "--help", PATH=on_path)
    assert (helped.returncode, helped.stdout.splitlines()[0]) == (0, f"usage: {name} COMMAND ...")
    refused = run(*command, "run", "xyzzy", PATH=on_path)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: unknown recipe 'xyzzy'; `{name} recipes` lists what there is\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "mnist-smoke"],
        ["report", "mnist-demo"],
        ["sweep", "mnist-smoke", "--space", "lambda_blocks"],
        ["attack", "--model", "net.pth", "--arch", "resnet18"],
    ],
)
def test_a_long_command_prints_a_line_before_it_imports_the_libraries(arguments: list[str]) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name in ("torch", "ray", "mlflow", "numpy", "pyarrow"):
            sys.exit(f"imports {name}")
sys.meta_path.insert(0, Refuse())
from pipeline.main import main
main(sys.argv[1:])
"""
    done = run(sys.executable, "-c", code, *arguments)
    assert done.stderr.startswith("imports ")
    assert done.stdout.endswith(": loading PyTorch, Ray and MLflow ...\n")


# -- completion ----------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    """Return what bash offers for a line, through the script that a user loads."""
    ask = """
source /dev/stdin <<< "$(defendpp --print-completion bash)"
COMP_LINE=$1 COMP_POINT=${#1}
_defendpp defendpp
[ ${#COMPREPLY[@]} = 0 ] || printf '%s\n' "${COMPREPLY[@]}"
complete -p defendpp
"""
    done = run("bash", "-c", ask, "bash", line, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    *words, registered = done.stdout.splitlines()
    assert registered == "complete -o default -F _defendpp defendpp"
    return words


def test_bash_completes_commands_recipes_and_fields() -> None:
    assert completed("defendpp re") == ["report", "recipes", "reproduction"]
    assert completed("defendpp run mnist-d") == ["mnist-demo"]
    assert completed("defendpp run mnist-demo --train.lr-s") == ["--train.lr-schedule", "--train.lr-step-epochs"]
    assert completed("defendpp run mnist-demo --data.source torchvision:m") == ["mnist"]  # Bash has "torchvision:".
    assert completed("defendpp run --from ru") == []  # Bash completes file names by itself.


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("defendpp --print-completion ", ["bash", "zsh", "fish"]),
        ("defendpp sweep mnist-demo --space lambda", ["lambda_blocks", "lambda_blocks_grid"]),
        ("defendpp sweep mnist-demo --ev", ["--evaluate"]),
        ("defendpp run mnist-demo --scaling.gpu --train.defense a", ["adversarial"]),
        ("defendpp run mnist-demo --train.lam ", []),
        ("defendpp run mnist-demo --scaling.no", ["--scaling.no-gpu"]),
        ("defendpp attack --mo", ["--model"]),
        ("defendpp attack --model x.pth --ar", ["--arch"]),
        ("defendpp recipes --scale s", ["smoke", "slim"]),
        ("defendpp sweep mnist-demo --search t", ["tpe"]),
        ("defendpp export m --format o", ["onnx"]),
        ("defendpp run mnist-demo --data.source h", ["hf:"]),
        ("defendpp ui --sto", ["--storage"]),
        ("defendpp run mnist-demo --evaluation.attacks apgd", ["apgd", "apgd-t"]),
        ("defendpp run 'mnist", []),
    ],
)
def test_what_may_follow_is_offered(line: str, words: list[str]) -> None:
    offered = [text.partition("\t")[0] for text in completion.answer(["fish", line]).splitlines()]
    assert [word for word in offered if word.startswith(line.rpartition(" ")[2])] == offered
    assert [word for word in offered if not word.startswith("--evaluation")][: len(words) or None] == words


def test_every_recipe_is_offered_with_what_it_shows() -> None:
    answer = completion.answer(["zsh", "defendpp run "]).splitlines()
    assert {line.partition(":")[0] for line in answer} >= set(RECIPES)
    assert all(line.partition(":")[2] for line in answer)
