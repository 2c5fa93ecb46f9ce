"""The command line: what a user types, and one clear error for bad input, before compute is spent."""

from __future__ import annotations

import os
import platform
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from repository import ROOT

from components.config import DataConfig, Experiment, roles
from components.fields import to_dict
from components.threat_models import TRANSFER
from pipeline.cli import usage
from pipeline.cli.options import options_of
from pipeline.cli.recipe_arguments import parse_experiment
from pipeline.main import is_memory_shortage, main
from pipeline.recipes.registry import BASES, RECIPES
from pipeline.run_directory import run_address

SAMPLE = ROOT / "pipeline" / "data" / "mnist-sample"


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int | None = None) -> str:
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == status if status is not None else code in (1, 2)
    assert captured.err.startswith("error:")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete_and_named_as_it_is_called(name: str) -> None:
    experiment = RECIPES[name].make()
    assert experiment.name in (name, f"{name}-fast")  # a table's name alone is its fast scale
    assert experiment.description
    if experiment.scale == "paper":
        assert experiment.data.validation_fraction == 0
    variants = experiment.model_configs()
    controls = roles.control_of(experiment)
    for model, config in experiment.first_replicates().items():
        if config.defense != "none":
            assert model in {*controls, *controls.values()}, "a control belongs to every comparison"
    for model, config in variants.items():
        if config.defense != "none" and TRANSFER in experiment.evaluation.threat_models:
            source = experiment.transfer_source_of(model)
            assert source is not None
            assert variants[source].defense == "none"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in (*usage.COMMANDS, *usage.OTHER_COMMANDS, "--version", "--print-completion"):
        assert [line for line in lines if line.startswith(f"  {command} ")], command


def test_a_script_needs_no_installation() -> None:
    """`python pipeline/main.py` finds the packages beside it, whatever the working directory."""
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "pipeline" / "main.py"), "recipes"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    # Each table is listed once, with its scales, not once for each of them.
    assert [name for name in names if name in RECIPES] == list(BASES)
    assert "table1-slim" not in names


def test_fields_are_documented_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_experiment("run", ["mnist-demo", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--train.lam FLOAT lambda of eq. 3: weight of levels 1..M-1 relative to level 0. (default: 0.01)" in text
    assert "--scaling.workers INT" in text
    assert "--train.defense {none,defend++,adversarial,comdefend}" in text
    # Text flows: no line break of the source is left within a sentence.
    assert "MODULE:FUNCTION for a network of your own (docs/networks.md)" in text
    # A demo of three epochs has no learning rate that drops after 100.
    assert "(default: 100; no effect on the models of this recipe)" in text


def test_every_field_of_an_experiment_is_an_option_with_its_meaning() -> None:
    options = options_of(RECIPES["mnist-demo"].make())
    leaves = {f"{s}.{f}" if s else f for s, section in sections().items() for f in section}
    assert {option.field for option in options} == leaves
    assert [option.field for option in options if not option.text] == []


def sections() -> dict[str, list[str]]:
    values = to_dict(RECIPES["mnist-demo"].make())
    return {
        "": [name for name, value in values.items() if not isinstance(value, dict)],
        **{name: list(value) for name, value in values.items() if isinstance(value, dict)},
    }


def test_an_override_reaches_its_field_with_its_type() -> None:
    experiment = parse_experiment(
        "run",
        ["mnist-demo", "--train.epochs", "7", "--train.lam", "1e-3", "--evaluation.attacks", "ddn", "--scaling.gpu"],
    )
    assert isinstance(experiment, Experiment)
    assert experiment.train.epochs == 7
    assert experiment.train.lam == 1e-3
    assert experiment.evaluation.attacks == ("ddn",)
    assert experiment.scaling.gpu is True
    assert all(v.epochs == 7 for v in experiment.model_configs().values())


def test_where_a_run_is_kept_is_no_part_of_what_it_is() -> None:
    base = run_address(parse_experiment("run", ["mnist-demo"]))
    assert (
        run_address(parse_experiment("run", ["mnist-demo", "--storage", "/elsewhere", "--scaling.max-failures", "9"]))
        == base
    )
    assert run_address(parse_experiment("run", ["mnist-demo", "--train.lam", "0.02"])) != base
    assert run_address(parse_experiment("run", ["mnist-demo", "--scaling.workers", "1"])) != base


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fly"], ["unknown command 'fly'", "run", "pyramids"]),
        (["run", "mnist-dmeo"], ["unknown recipe 'mnist-dmeo'; did you mean mnist-demo"]),
        (["run", "mnist-demo", "--train.lam", "-1"], ["train.lam is -1.0; it must be", "0 or more"]),
        (["run", "mnist-demo", "--train.lam", "nan"], ["train.lam is nan", "0 or more"]),
        (["run", "mnist-demo", "--train.shared-blocks", "5"], ["train.shared_blocks is 5", "1 to 4"]),
        (["run", "mnist-demo", "--train.shared-blocks", "0"], ["train.shared_blocks is 0", "1 to 4"]),
        (["run", "mnist-demo", "--pyramids.levels", "4"], ["pyramids.levels is 4", "7x7"]),
        (["run", "mnist-demo", "--evaluation.attacks", "pgdd:eps=1"], ["unknown attack 'pgdd'; did you mean pgd"]),
        (["run", "mnist-demo", "--evaluation.attacks", "fgsm"], ["fgsm needs eps", "fgsm:eps="]),
        (["run", "mnist-demo", "--models", "a:defence=none"], ["unknown field of models[a]: 'defence'", "defense"]),
        (["run", "mnist-demo", "--models", "a:defense=maybe"], ["maybe", "none", "defend++"]),
        (["run", "mnist-demo", "--evaluation.transfer-source", "defend"], ["evaluation.transfer_source", "no_defense"]),
        (["run", "mnist-demo", "--data.source", "cifar"], ["data.source is 'cifar'", "parquet:DIR"]),
        (["run", "mnist-demo", "--storage", "here"], ["storage is 'here'", "absolute"]),
        (["run", "mnist-demo", "--data.image-size", "66"], ["data.image_size is 66"]),
        (["run", "mnist-demo", "--scaling.workers", "3"], ["batch_size", "multiple of scaling.workers (3)"]),
    ],
)
def test_an_impossible_setting_is_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    if "--storage" not in arguments and arguments[0] == "run":
        arguments = [*arguments, "--storage", str(tmp_path)]
    message = error_of(capsys, arguments, 2)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.lamda", "1"], "did you mean --train.lam"),
        (["--lam", "1"], "did you mean --train.lam?"),
        (["--train.epochs", "many"], "--train.epochs is 'many'; it must be a whole number"),
        (["--train.targets", "lowpas"], "did you mean lowpass?"),
        (["--scaling.no-gpus"], "did you mean --scaling.no-gpu"),
    ],
)
def test_an_unknown_field_or_type_ends_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: str
) -> None:
    assert parts in error_of(capsys, ["run", "mnist-demo", *arguments], 2)


def test_options_may_be_spelled_like_fields() -> None:
    experiment = parse_experiment("run", ["mnist-demo", "--train.shared_blocks=3", "--data.class_order", "text"])
    assert experiment.train.shared_blocks == 3
    assert experiment.data.class_order == "text"


@pytest.fixture
def copied_sample(tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    shutil.copytree(SAMPLE, directory)
    return directory


def test_a_missing_source_is_told_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = error_of(
        capsys, ["run", "mnist-demo", "--data.source", f"parquet:{tmp_path}/none", "--storage", str(tmp_path / "s")], 1
    )
    assert f"{tmp_path}/none" in message


def test_a_corrupt_parquet_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, copied_sample: Path
) -> None:
    file = copied_sample / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    message = error_of(
        capsys, ["run", "mnist-demo", "--data.source", f"parquet:{copied_sample}", "--storage", str(tmp_path / "s")], 1
    )
    assert file.name in message


def test_a_label_out_of_range_is_told_with_file_and_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, copied_sample: Path
) -> None:
    file = copied_sample / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    labels = table.column("label").to_pylist()
    labels[17] = 12
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, "label", pa.array(labels, pa.int64())), file)
    message = error_of(
        capsys, ["run", "mnist-demo", "--data.source", f"parquet:{copied_sample}", "--storage", str(tmp_path / "s")], 1
    )
    assert file.name in message
    assert "17" in message
    assert "12" in message


def test_images_of_another_size_are_told_with_both_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = error_of(capsys, ["run", "mnist-demo", "--data.image-size", "32", "--storage", str(tmp_path)], 1)
    assert "28" in message
    assert "32" in message


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_a_storage_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, ["run", "mnist-demo", "--storage", "/dev/null/x"], 1)
    assert "/dev/null/x" in message
    assert "--storage" in message


def test_a_dead_tracking_server_is_told_within_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    begin = time.monotonic()
    message = error_of(
        capsys, ["run", "mnist-demo", "--storage", str(tmp_path), "--tracking-uri", "http://127.0.0.1:9"], 1
    )
    assert time.monotonic() - begin < 30
    assert "http://127.0.0.1:9" in message
    assert "--tracking-uri" in message


@pytest.mark.parametrize("command", ["report", "train", "attack"])
def test_a_stage_of_a_run_that_never_was_creates_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    error_of(capsys, [command, "mnist-demo"], 1)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_has_no_run_names_the_runs_that_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "has no run" in error_of(capsys, ["report", "mnist-demo", "--storage", str(tmp_path)], 1)
    for name in ("fig2-smoke-00", "mnist-demo-01", "unfinished"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("fig2-smoke-00", "mnist-demo-01"):
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    message = error_of(capsys, ["report", "mnist-demo", "--storage", str(tmp_path)], 1)
    assert "no records" in message
    assert "It has the runs mnist-demo-01, fig2-smoke-00; `defendpp report --from " in message


@pytest.mark.slow
def test_no_code_is_run_at_import_that_a_worker_could_trip_over() -> None:
    """Workers import these modules: parsing arguments or starting Ray there would kill them."""
    modules = "pipeline.main, pipeline.training.train, pipeline.evaluation.attack, pipeline.data.pyramids, ray"
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {modules}; assert not ray.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ})


def test_data_config_defaults_are_the_bundled_sample() -> None:
    assert DataConfig().source == "sample:mnist"


# -- what the terminal, the pipe or the Python can do to a command -------------------------------


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``main`` is the command line. Its status is that of ``main``."""
    script = f'main() {{ "{sys.executable}" "{ROOT / "pipeline" / "main.py"}" "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize(
    ("command", "printed", "warned"),
    [
        ("main recipes --json | head -n 1", "[", ""),
        ("main --help | head -n 1", "usage:", ""),
        ("main run mnist-smoke --help | head -n 1", "usage:", ""),
        ("main recipes >&-", "", ""),
        ("main recipes >&- 2>&-", "", ""),
        ("main recipes > /dev/full", "", "warning: standard output cannot be written (No space left on device)\n"),
        ("PYTHONIOENCODING=ascii main recipes --scale slim | head -n 1", "slim:", ""),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 main recipes --scale slim | head -n 1", "slim:", ""),
    ],
)
def test_where_the_output_goes_is_no_failure(command: str, printed: str, warned: str) -> None:
    done = shell(command)
    assert done.stderr == warned
    assert done.returncode == 0
    assert done.stdout.startswith(printed)
    assert len(done.stdout.splitlines()) == bool(printed)


def test_an_error_that_nobody_can_read_keeps_its_status() -> None:
    for streams in (">&- 2>&-", "> /dev/full 2> /dev/full"):
        assert shell(f"main rnu {streams}").returncode == 2


def test_a_character_that_the_terminal_lacks_is_printed_as_an_escape(tmp_path: Path) -> None:
    done = shell(f"main run --from {tmp_path}/größe", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/gr\\xf6\\xdfe does not exist; check the path\n"


@pytest.mark.parametrize("reader", ["| tail -n 1", "| head -n 1", ">&-", "> /dev/full"])
def test_the_table_at_the_end_of_a_run_cannot_fail_it(reader: str) -> None:
    """A character that the terminal lacks must not fail a run after all was computed."""
    code = (
        "from pipeline.runtime import standard_streams; standard_streams.harden(); "
        "from pipeline.runtime.console import console, say; "
        "from rich.table import Table; [say('ε = 8/255') for _ in range(9)]; console.print(Table('δ', title='±'))"
    )
    done = shell(
        f'"{sys.executable}" -c "{code}; print(chr(949))" {reader}', PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT)
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    if "tail" in reader:
        assert done.stdout == "\\u03b5\n"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_pipe_that_does_not_block_loses_no_output(descriptor: int) -> None:
    """Node.js, ssh and others hand over such pipes. The writer must wait where the reader is slow."""
    code = (
        "import sys; from pipeline.runtime import standard_streams; standard_streams.harden(); "
        f"[print(i, 'x' * 999, file=sys.{'stdout' if descriptor == 1 else 'stderr'}) for i in range(500)]"
    )
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=write if descriptor == 1 else None,
        stderr=write if descriptor == 2 else None,
    ) as process:
        while process.poll() is None and select.select([], [write], [], 0)[1]:
            time.sleep(0.01)  # until the pipe is full
        os.close(write)
        with open(read) as reader:
            lines = reader.read().splitlines()
        assert process.wait(timeout=30) == 0
    assert [line.partition(" ")[0] for line in lines] == [str(i) for i in range(500)]
    assert {len(line.partition(" ")[2]) for line in lines} == {999}


def test_a_python_without_the_dependencies_is_told_which_one_has_them(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python, script = str(bare / "bin" / "python"), str(ROOT / "pipeline" / "main.py")
    for arguments in (["recipes"], ["run", "mnist-smoke"], ["run", "mnist-dmeo"]):
        done = subprocess.run([python, script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            f"error: this Python ({python}) lacks rich: use {ROOT}/.venv/bin/python, "
            f"which `make .venv/installed` in {ROOT} sets up\n"
        )


def test_the_version_needs_no_dependency(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "pipeline" / "main.py"), "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, revision, versions = done.stdout.splitlines()
    assert re.fullmatch(r"defendpp \d+\.\d+\.\d+", first)
    assert re.match(r"revision [0-9a-f]{40}", revision) or revision == "revision unknown"
    assert versions == f"python {platform.python_version()}"  # The libraries are not installed there.


QUICK = [
    *(
        "--help",
        "--version",
        "recipes",
        "recipes --scale slim",
        "recipes --json",
        "ui --help",
        "--print-completion bash",
    ),
    *(f"{command} --help" for command in usage.COMMANDS),
    *("help", "version", "run mnist-demo --storage here"),
    *("run mnist-demo --help", "sweep mnist-demo --help", "attack --model x.pth --help"),
    *("rnu", "run mnist-dmeo", "run mnist-demo --train.lamda 1", "run mnist-demo --train.lam -1", "recipes --scale x"),
    *("sweep mnist-smoke --trials x", "sweep mnist-smoke --space lamda", "attack --model x.pth --norm l3 --arch vgg16"),
    "--complete bash 'defendpp run mnist-demo --tr'",
]
"""Commands that a person waits for."""


def test_help_and_version_are_commands_too(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (
        (["help"], ["--help"]),
        (["help", "sweep"], ["sweep", "--help"]),
        (["version"], ["--version"]),
    ):
        assert main(command) == main(option) == 0
        first, second = capsys.readouterr().out.split("usage:" if "help" in command else "defendpp ")[1:]
        assert first == second


def test_the_fields_of_a_sweeps_recipe_are_not_all_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "mnist-demo", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: defendpp sweep mnist-demo --space FILE ")
    assert text.endswith("The options of sweep itself: defendpp sweep --help\n")


def test_help_lists_and_typos_are_answered_without_loading_the_libraries() -> None:
    code = """
import contextlib, io, shlex, sys
from pipeline.main import main
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(shlex.split(line))
    heavy = {"torch", "ray", "mlflow", "numpy", "pyarrow", "matplotlib", "scipy", "pandas"} & set(sys.modules)
    if heavy:
        sys.exit(f"{line}: {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", code, *QUICK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: torch.empty(2**62), lambda: np.empty(2**56)])
def test_too_little_memory_is_told_from_other_errors(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert is_memory_shortage(caught.value)
    assert not is_memory_shortage(RuntimeError("another error"))
