"""Completion of commands in a shell.

The shell asks this program for the words that may follow (``--complete``), so completion never
differs from the installed version. The scripts only hand over the line and the answer.
"""

from __future__ import annotations

import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence

from components.attacks.spec import ATTACK_NAMES
from components.config import FIGURES, PRINTED_IN, Experiment
from components.errors import ConfigError
from components.fields import check_choice
from components.search_space import Search
from components.threat_models import BLACK_BOX, TRANSFER, WHITE_BOX
from pipeline.cli import export, usage
from pipeline.cli.options import options_of
from pipeline.program import NAME
from pipeline.recipes.registry import RECIPES
from pipeline.recipes.scales import SCALES
from pipeline.runtime.provenance import ROOT
from pipeline.sweep.options import Evaluate

_SCRIPTS = {
    "bash": """\
# Completion of defendpp in bash. For all shells: defendpp --print-completion bash > \
~/.local/share/bash-completion/completions/defendpp
_defendpp() {
    mapfile -t COMPREPLY < <("$1" --complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -o default -F _defendpp defendpp""",
    "zsh": """\
#compdef defendpp
# Completion of defendpp in zsh. For all shells: save it as _defendpp in a directory of $fpath.
_defendpp() {
    local -a candidates
    candidates=("${(@f)$("${words[1]}" --complete zsh "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${candidates[1]}" ]]; then _describe defendpp candidates; else _files; fi
}
compdef _defendpp defendpp""",
    "fish": """\
# Completion of defendpp in fish. For all shells: defendpp --print-completion fish > \
~/.config/fish/completions/defendpp.fish
function __defendpp_complete
    set -l candidates (defendpp --complete fish (commandline -cp) 2>/dev/null)
    if test (count $candidates) -gt 0
        printf '%s\\n' $candidates
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command defendpp --no-files --arguments '(__defendpp_complete)'""",
}
"""Without candidates, each shell completes file names."""
_SOURCES = ("sample:mnist", "parquet:", "folder:", "hf:", "torchvision:mnist", "torchvision:cifar10")
_VALUES: Mapping[str, Iterable[str]] = {
    "--evaluation.attacks": ATTACK_NAMES,
    "--evaluation.threat-models": (WHITE_BOX, BLACK_BOX, TRANSFER, f"{TRANSFER}:*"),
    "--data.source": _SOURCES,
    "--data": _SOURCES,
    "--paper": PRINTED_IN,
    "--figures": FIGURES,
    "--scale": SCALES,
    "--search": typing.get_args(Search),
    "--evaluate": typing.get_args(Evaluate),
    "--norm": ("linf", "l2"),
    "--format": export.SUFFIXES,
    "--print-completion": _SCRIPTS,
}
"""Values of options that are texts."""
_OWN_OPTIONS = {
    "sweep": usage.SWEEP_OPTIONS,
    "recipes": {"--scale": "recipes of a scale, with their costs", "--json": "all of it as JSON"},
    "export": {"--out": "file to write", "--format": "onnx, torch-export or safetensors", "--arch": "MODULE:FUNCTION"},
    "reproduction": {"--out": "file to write"},
    "ui": usage.UI_OPTIONS,
}


def script(arguments: Sequence[str]) -> str:
    """Return the script that completes ``defendpp`` in a shell.

    Raises:
        ConfigError: no shell is named, or an unknown one.
    """
    if len(arguments) != 1:
        raise ConfigError(f"--print-completion needs one shell: {', '.join(_SCRIPTS)}")
    check_choice(arguments[0], _SCRIPTS, "--print-completion")
    return _SCRIPTS[arguments[0]]


def answer(arguments: Sequence[str]) -> str:
    """Return the candidates for the last word of a line, one a line, in the form of a shell.

    Args:
        arguments: the shell, and the line up to the cursor.
    """
    shell, line = arguments
    try:
        words = shlex.split(line)
    except ValueError:  # A quotation is open.
        return ""
    if not words or line[-1].isspace():
        words.append("")
    current = words[-1]
    found = {word: text for word, text in candidates(words[1:]).items() if word.startswith(current)}
    if shell == "zsh":
        return "\n".join(f"{word.replace(':', chr(92) + ':')}:{text}" for word, text in found.items())
    if shell == "fish":
        return "\n".join(f"{word}\t{text}" for word, text in found.items())
    # Bash completes only what follows the last of its word breaks.
    begin = max(current.rfind(c) for c in ":=") + 1
    return "\n".join(word[begin:] for word in found)


def candidates(words: Sequence[str]) -> dict[str, str]:
    """Return the words that may stand in place of the last one -> what they mean.

    Args:
        words: those behind the program's name. The last one is to be completed, and may be empty.
    """
    if len(words) < 2:
        return {**usage.COMMANDS, **usage.OTHER_COMMANDS, **usage.OPTIONS}
    command, before = words[0], words[-2]
    external = command == "attack" and "--model" in words[:-1]
    own = {**_OWN_OPTIONS.get(command, {}), **(usage.ATTACK_OPTIONS if external else {})}
    fields: dict[str, str] = {}
    if command in usage.COMMANDS:
        for option in options_of(Experiment(name=NAME)):
            fields |= dict.fromkeys(option.names, option.text)
            if before == option.name and option.choices:
                return dict.fromkeys(filter(None, option.choices), "")
    if before == "--space":
        return {path.stem: "" for path in sorted((ROOT / "tune_spaces").glob("[!_]*.py"))}
    if before in _VALUES and (before in {**own, **fields} or before == "--print-completion"):
        return dict.fromkeys(_VALUES[before], "")
    if before.startswith("-") and not _is_switch(before, own):
        return {}  # The value of an option: a number, a text or a file.
    if command in usage.COMMANDS and len(words) == 2:
        first = {name: recipe.summary for name, recipe in RECIPES.items()}
        models = {"--model": usage.ATTACK_OPTIONS["--model"]} if command == "attack" else {}
        return {**first, "--from": "an experiment of a record", **models, "--help": "the help of this command"}
    return {**own, **fields, "--help": "all options"}


def _is_switch(option: str, own: Mapping[str, str]) -> bool:
    """Tell whether an option takes no value."""
    if option in own:
        return option in ("--resume", "--no-evaluate", "--json")
    return any(o.hint is bool and option in o.names for o in options_of(Experiment(name=NAME)))
