"""Every command of the pages: checked up to the point where compute would begin, and in a drill run to its end."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from documentation import Block, blocks
from image_files import encode
from repository import ROOT

from pipeline.main import main

COMMANDS = [(block, command) for block in blocks("sh") for command in block.commands()]
PROGRAM = re.compile(r"(?:^|\s)(?:defendpp|python3? pipeline/main\.py|python -m pipeline) (?P<arguments>.*)")
ELSEWHERE = {
    "docker ": "tests/end_to_end/test_infra.py",
    "kubectl ": "tests/end_to_end/test_infra.py",
    "export RAY_AUTH_TOKEN=$(kubectl ": "tests/end_to_end/test_infra.py",
    "aws ": "tests/end_to_end/test_infra.py",
    "ray ": "tests/end_to_end/test_ray_job.py",
    "infra/local-cluster.sh ": "tests/support/job_shell.py",
    "infra/offline-bundle.sh ": "tests/end_to_end/test_infra.py",
    "benchmarks/gpu.sh ": "tests/end_to_end/test_gpu_script.py",
    "pip install /path/to/this/clone": "tests/end_to_end/test_installed.py",
    "optuna-dashboard ": "tests/pipeline/sweep/test_study.py",
}
"""What needs machines, a network or services that a test has not, or what has a test of its own: -> that test."""
SHELL = (". ", "export ", "cp ", "mkdir ", "python3 -m ray", "pip install ")
PACKAGES_OF_THE_NETWORK = re.compile("^(hf|robustbench):")
NEED_RESULTS = ("ui", "export", "report", "reproduction")
SMALL = shlex.split(
    "--data.train-limit 200 --data.test-limit 20 --train.epochs 1 --train.width 4 --evaluation.attacks fgsm:eps=0.1 "
    "--evaluation.reliability-images 4 --scaling.cpus-per-worker 0.5"
)


def program_commands() -> list[tuple[Block, str]]:
    return [(block, match["arguments"]) for block, command in COMMANDS if (match := PROGRAM.search(command))]


def test_every_command_is_known() -> None:
    for block, command in COMMANDS:
        if PROGRAM.search(command):
            continue
        if command.startswith("make "):
            target = command.split()[1]
            done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}: {command}: {done.stderr}"
            continue
        tests = [file for start, file in ELSEWHERE.items() if command.startswith(start)]
        assert tests or command.startswith(SHELL), f"{block}: {command}"
        assert all((ROOT / file).exists() for file in tests)
        script = ROOT / command.split()[0]
        assert "/" not in command.split()[0] or os.access(script, os.X_OK), f"{block}: {command}"


class ComputeBegins(BaseException):
    """All checks have passed."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make what the pages take for granted, and return what stands for it: text of the pages -> text here."""
    here = tmp_path_factory.mktemp("world")
    images = here / "imagenet"
    for label in range(1000):
        (images / "val" / f"n{label:08d}").mkdir(parents=True)
        (images / "val" / f"n{label:08d}" / "image.png").write_bytes(
            encode(np.full((224, 224, 3), label % 256, "uint8"))
        )
    torch.save(torchvision.models.resnet50().state_dict(), here / "net.pth")
    (own,) = [block.text for block in blocks("python") if block.text.startswith("# own.py")]
    (here / "own.py").write_text(own)
    shutil.copy(ROOT / "tune_spaces" / "lambda_blocks.py", here / "mine.py")
    storage = str(here / "storage")
    mnist = f"parquet:{ROOT / 'pipeline' / 'data' / 'mnist-sample'}"
    return {
        "RECIPE": "mnist-smoke",
        "net.pth": str(here / "net.pth"),
        "mine.py": str(here / "mine.py"),
        "folder:/data/imagenet": f"folder:{images}",
        "parquet:/data/mnist": mnist,
        "parquet:DIR": mnist,
        "/data/defendpp": storage,
        "/shared/defendpp": storage,
        "s3://defendpp/runs": storage,
        "http://mlflow.example:5000": f"sqlite:///{here}/mlflow.db",
        "here": str(here),
    }


def as_here(arguments: str, world: dict[str, str]) -> list[str]:
    for text, here in world.items():
        arguments = re.sub(rf"(?<![\w/]){re.escape(text)}(?![\w])", lambda _, here=here: here, arguments)
    return shlex.split(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "arguments"), program_commands(), ids=lambda value: str(value)[:80])
def test_a_command_passes_every_check_before_compute(
    block: Block,
    arguments: str,
    world: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def begin(*_: object, **__: object) -> None:
        raise ComputeBegins

    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setenv("HOME", world["here"])
    monkeypatch.chdir(world["here"])
    monkeypatch.syspath_prepend(world["here"])
    words = as_here(arguments.partition(" > ")[0], world)
    if any(PACKAGES_OF_THE_NETWORK.search(word) for word in words):
        pytest.skip(
            "a download; tests/pipeline/data and tests/pipeline/training read the Hub's cache and a zoo's files"
        )
    if words[0] in NEED_RESULTS or "--from" in words:
        pytest.skip("the walk below has the results that this command needs")
    if words[0] in ("recipes", "--print-completion") or "--help" in words:
        with contextlib.suppress(SystemExit):
            assert main(words) == 0
        assert len(capsys.readouterr().out) > 200
        return
    if not {"--data", "--data.source"} & set(words):
        words += ["--data.source", "sample:mnist"]  # The recipes of MNIST download it.
    with pytest.raises(ComputeBegins):
        main(words)


WALKED = ("README.md", "docs/commands.md", "docs/sweeps.md", "docs/ecosystem.md", "docs/networks.md")
SHORTER = {
    "attack": "--evaluation.test-images 2 --evaluation.attacks fgsm:eps=1/255 --evaluation.reliability-images 2",
    "sweep": "--trials 2 --evaluate recipe",
}
"""What makes a command of the pages end in seconds, beside SMALL. The rest of it stays as it is written."""


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_a_reader_walks_through_the_pages(world: dict[str, str]) -> None:
    """Run the program's commands of the pages one after the other, in a shell with `.venv` activated."""
    here = Path(world["here"])
    (here / "pipeline").symlink_to(ROOT / "pipeline")
    storage = here / "home" / "defendpp"
    places = world | {"/data/defendpp": str(storage)}
    walked, failed = set(), []
    for block, command in COMMANDS:
        match = PROGRAM.search(command)
        if not match or str(block.page) not in WALKED or command in walked:
            continue
        # These wait for a browser and need a cluster: tests/pipeline/cli/test_ui.py, tests/end_to_end/test_run.py.
        if match["arguments"].startswith("ui") or command.startswith("ray job submit"):
            continue
        walked.add(command)
        words = as_here(match["arguments"], places)
        if any(PACKAGES_OF_THE_NETWORK.search(word) for word in words):
            continue
        words = [_existing(word, storage) for word in words]
        if words[0] in ("run", "report", "sweep") and "--help" not in words:
            words += [*SMALL, *shlex.split(SHORTER.get(words[0], ""))]
            words += [] if "--data.source" in words or "--from" in words else ["--data.source", "sample:mnist"]
        elif words[0] == "attack":
            words += shlex.split(SHORTER["attack"])
        text, redirection = shlex.join(words), ""
        if ">" in words:
            text, redirection = shlex.join(words[: words.index(">")]), f"> {words[-1]}"
            Path(words[-1].replace("~", str(here / "home"))).parent.mkdir(parents=True, exist_ok=True)
        line = f"{command[: match.start('arguments')]}{text} {redirection}"
        done = subprocess.run(
            ["bash", "-c", f". {shlex.quote(str(ROOT / '.venv/bin/activate'))} && {line}"],
            cwd=here,
            env=os.environ | {"HOME": str(here / "home"), "RAY_ADDRESS": "local"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            failed.append(f"{block}: {line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    assert not failed, "\n\n".join(failed)
    assert len(walked) > 15
    assert list(storage.glob("runs/mnist-demo-*/report/report.html"))
    assert (here / "defend.onnx").stat().st_size > 1000


def _existing(word: str, storage: Path) -> str:
    """Return the path of a result that a page names with a placeholder, such as models/defended-<hash>."""
    match = re.search(r"(sweeps|models|runs)/[^/]*(<hash>|NAME|0123456789abcdef)(/.*)?$", word)
    if not match:
        return word
    kind = match[0].partition("/")[2].partition("<")[0].partition("0123")[0].partition("NAME")[0]
    rest = match[3] or ""
    beside = rest if match[1] == "sweeps" else ""  # A model of a run is no file of its directory.
    (found, *_) = sorted(storage.glob(f"{match[1]}/{kind}*{beside}"))
    return str(found) + (rest if not beside else "")
