"""A user's own module: its search, its import, the trust in its name, and the error messages."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_network import Net
from repository import ROOT
from safetensors.torch import save_file

from components.config import TrainConfig, level_sizes
from components.config.data import Shapes
from components.errors import ConfigError, DataError
from components.models.classifiers import build_classifier
from components.network import build_net
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.runtime.storage import Storage
from pipeline.training import exports, jobs
from pipeline.training.external import AUTOENCODER

SHAPES = Shapes(image_size=28, channels=1, num_classes=10, sizes=level_sizes(28))
BUILD = "def build(num_classes, channels, image_size, width):\n    return Net(channels, num_classes)\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that writes a module, which this process can import by the name of its file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(exports, "_trusted", set())
    before = set(sys.modules)

    def written(name: str, text: str) -> Path:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"from own_network import Net\n{text}")
        return file

    yield written
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def built(arch: str) -> torch.nn.Module:
    return build_classifier(arch, num_classes=10, channels=1, image_size=28, needs_adapter=False)


PARSER = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr', default=0.1, type=float)\n"


def test_a_script_that_parses_arguments_does_not_see_those_of_this_command(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("trainscript", f"{PARSER}args = parser.parse_args()\nassert args.lr == 0.1\n{BUILD}")
    write("late", f"{PARSER}{BUILD.replace('    return', '    parser.parse_args()' + chr(10) + '    return')}")
    arguments = ["main.py", "attack", "--model", "x.pth"]
    monkeypatch.setattr(sys, "argv", arguments)
    for name in ("trainscript", "late"):
        assert isinstance(built(f"{name}:build"), Net)
    assert sys.argv is arguments


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{PARSER}parser.add_argument('data')\nparser.parse_args()\n{BUILD}", "arguments are required: data"),
        (f"import sys\nsys.exit(3)\n{BUILD}", "ends the process: 3"),
        (f"raise KeyError('x')\n{BUILD}", "KeyError: 'x'"),
        ("def build(**sizes):\n    raise SystemExit('no data')\n", "no data"),
        ("def (:\n", "SyntaxError"),
    ],
)
def test_whatever_a_module_raises_is_one_error(
    write: Any, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    write("broken", text)
    with pytest.raises(ConfigError, match=rf"^train\.arch is 'broken:build'; .*{reason}"):
        built("broken:build")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["raise SystemExit(2)", "raise KeyError('x')", "import nosuchpackage"])
def test_so_is_what_the_package_above_it_raises(write: Any, text: str) -> None:
    write("above/__init__", text)
    write("above/net", BUILD)
    with pytest.raises(ConfigError, match=r"train\.arch is 'above\.net:build'.*cannot be imported"):
        jobs.source_hash("above.net:build")


def test_a_package_that_is_found_elsewhere_is_named(write: Any) -> None:
    """Python imports the first package of a name on the path."""
    write("pipeline/__init__", "")
    write("pipeline/model", BUILD)
    for find in (built, jobs.source_hash):
        with pytest.raises(ConfigError, match=rf"'pipeline' is {ROOT}/pipeline/__init__\.py here.*rename"):
            find("pipeline.model:build")


def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    """The command is a script in another directory, and Python puts only that directory on the path."""
    (tmp_path / "mynet.py").write_text("found = True\n")
    main = ROOT / "pipeline" / "main.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    as_script = f"sys.path[0] = {str(main.parent)!r}; script = runpy.run_path({str(main)!r})['script']"
    for begin in (as_script, "sys.path.remove(''); from pipeline.main import script"):  # The latter as `defendpp`.
        code = f"import runpy, sys; {begin}; sys.argv = ['x', '--version']; script(); import mynet; assert mynet.found"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


# --- a file does not decide which code is imported


def exported(directory: Path, arch: str, **changes: Any) -> Path:
    config = TrainConfig(arch=arch, **{"defense": "none", **changes})
    exports.export(Storage(directory), build_net(config, SHAPES), config, SHAPES)
    return directory / "classifier.safetensors"


def test_a_file_does_not_decide_which_code_is_imported(write: Any, tmp_path: Path) -> None:
    write("theirs", BUILD)
    file = exported(tmp_path / "model", "theirs:build")
    del sys.modules["theirs"]
    for load in (
        lambda: parse_experiment("attack", ["--model", str(file)]),
        lambda: exports.load_classifier(file),
        lambda: exports.load_classifier(file.parent, trusted="other:build"),
        lambda: exports.load_classifier(file, trusted=["theirs", "theirs:build2"]),
    ):
        with pytest.raises((ConfigError, DataError), match=r"theirs:build.*(--arch|trusted=)"):
            load()
    assert "theirs" not in sys.modules
    (config,) = parse_experiment("attack", ["--model", str(file), "--arch", "theirs:build"]).model_configs().values()
    assert config.arch == "theirs:build"
    assert type(exports.load_classifier(file, trusted="theirs:build")).__name__ == "Net"


@pytest.mark.parametrize(
    "metadata", ["[]", "{}", '{"schema": 1}', '{"schema": 1, "config": 3, "shapes": {}}', "not JSON", "7"]
)
def test_metadata_that_make_no_sense_are_one_error(tmp_path: Path, metadata: str) -> None:
    file = tmp_path / "classifier.safetensors"
    save_file(Net(1, 10).state_dict(), file, {"defendpp": metadata})
    for load in (lambda: parse_experiment("attack", ["--model", str(file)]), lambda: exports.load_classifier(file)):
        with pytest.raises((ConfigError, DataError)) as caught:
            load()
        assert "--arch" in str(caught.value) or str(file) in str(caught.value)


def test_what_the_experiment_asks_for_itself_is_trusted(write: Any, tmp_path: Path) -> None:
    write("mine", BUILD)
    file = exported(tmp_path / "model", "mine:build")
    exports.trust(["mine:build"])
    assert type(exports.load_classifier(file)).__name__ == "Net"


def test_a_librarys_network_needs_no_trust(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    config = TrainConfig(arch="torchvision:squeezenet1_1", defense="none")
    shapes = dataclasses.replace(SHAPES, channels=3, image_size=64, sizes=level_sizes(64))
    exports.export(Storage(tmp_path), build_net(config, shapes), config, shapes)
    assert type(exports.load_classifier(tmp_path)).__name__ == "SqueezeNet"


def test_weights_of_another_version_of_the_module_are_refused(write: Any, tmp_path: Path) -> None:
    source = write("edited", BUILD)
    file = exported(tmp_path / "model", "edited:build")
    source.write_text(source.read_text() + "# another forward()\n")
    for load in (
        lambda: parse_experiment("attack", ["--model", str(file), "--arch", "edited:build"]),
        lambda: exports.load_classifier(file, trusted="edited:build"),
    ):
        with pytest.raises(
            DataError, match=r"another version of edited:build.*load_file\('.*classifier\.safetensors'\)"
        ):
            load()
    # Only a user's modules have a version.
    parse_experiment("attack", ["--model", str(file), "--arch", "resnet18"])


def test_the_auto_encoder_beside_a_file_imports_nothing_either(write: Any, tmp_path: Path) -> None:
    from pipeline.training.external import copy_autoencoder

    write("beside", BUILD)
    directory = tmp_path / "model"
    file = exported(directory, "beside:build")
    (directory / AUTOENCODER).write_bytes(file.read_bytes())
    exported(directory, "resnet18", width=4)
    del sys.modules["beside"]
    config = TrainConfig(arch="resnet18", width=4, defense="none", epochs=0, pretrained=str(file))
    address, why = copy_autoencoder(config, SHAPES, {}, Storage(tmp_path), "")
    assert (address, "its arch is 'beside:build'" in why) == ("", True)
    assert "beside" not in sys.modules
