"""The whole pipeline through its real command line: results, continuation, and recovery from kills."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from commands import MAIN, SMALL, command, files_below, images_trained, record_of, run_here
from documentation import blocks
from job_shell import job_shell
from mlflow_server import MlflowServer
from record_form import form
from repository import ROOT
from safetensors.torch import load_file
from terminal import Terminal

from components.config import DataConfig
from components.fields import from_dict
from pipeline.data.sources.base import split_rows
from pipeline.data.sources.open import open_source
from pipeline.main import main
from pipeline.runtime import provenance
from pipeline.training.exports import load_autoencoder, load_classifier

pytestmark = pytest.mark.cluster


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-key-1",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-2",
    "MLFLOW_TRACKING_TOKEN": "planted-token-3",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Complete a run by ``ray job submit``, and give its storage and its output."""
    home = tmp_path_factory.mktemp("finished")
    with job_shell(home, SECRETS) as shell:
        done = shell.submit("run", *SMALL)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        (home / "counters.json").write_text(json.dumps(shell.counters()))
    assert "Traceback" not in done.stdout + done.stderr
    return home / "defendpp", done.stdout


def test_a_job_knows_its_revision_though_its_copy_has_no_git(finished: tuple[Path, str]) -> None:
    record = record_of(finished[0])
    assert record["finished"]
    assert record["source"] == provenance.source_hash(ROOT)
    assert record["git"]["revision"] == provenance.git(ROOT)["revision"]
    assert record["created"] < record["evaluated"] <= record["finished"]
    (requirements,) = finished[0].glob("runs/*/requirements.txt")
    assert f"torch=={record['versions']['torch']}\n" in requirements.read_text()


def test_a_person_sees_every_stage_the_table_and_where_to_look(finished: tuple[Path, str]) -> None:
    storage, printed = finished
    for part in ("pyramids: train", "train 3/3", "attack", "report", "white-box", "transfer", "n = 20"):
        assert part in printed
    # The data is described before Ray starts. The limit of 20 images leaves out classes, which is allowed.
    assert 0 < printed.index("test: 20 images, 8 of 10 classes") < printed.index(" Ray ..."), printed[:2000]
    (report,) = storage.glob("runs/*/report/report.html")
    assert str(report) in printed
    assert f"main.py ui --storage {storage} --run " in printed
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as database:
        names = dict(database.execute("select run_uuid, name from runs"))
    (comparison,) = re.findall(r"models side by side: (\S+)", printed)
    compared = [names[run_id] for run_id in re.findall("%22([0-9a-f]{32})%22", comparison)]
    assert compared == ["no_defense", "control", "defend"]
    assert re.search(r"all models: http://127.0.0.1:5000/#/experiments/\d+/models", printed)


def test_prometheus_reads_the_work_of_every_stage(finished: tuple[Path, str]) -> None:
    counters = json.loads((finished[0].parent / "counters.json").read_text())
    for name, model in record_of(finished[0])["models"].items():
        assert counters[f"attack_images_total attack=ddn:steps=10 model={name} run=mnist-smoke"] == 20
        assert counters[f"training_images_total model={model['path'][7:]}"] == images_trained(finished[0], model)
    assert counters["shards_written_total split=test"] == 1


def test_paths_of_records_in_the_readme_exist_after_a_run(finished: tuple[Path, str]) -> None:
    (paths,) = [block.files() for block in blocks("text") if str(block.page) == "README.md"]
    assert "runs/mnist-demo-<hash>/report/report.html" in paths
    patterns = [path.replace("<hash>", "*").replace("mnist-demo", "mnist-smoke") for path in paths]
    assert [pattern for pattern in patterns if not list(finished[0].glob(pattern))] == []


def test_records_keep_their_form(finished: tuple[Path, str]) -> None:
    """Users' tools read these keys. golden_forms.json holds those of an earlier revision."""
    forms = json.loads(Path(__file__).with_name("golden_forms.json").read_text())
    assert forms
    for pattern, expected in forms.items():
        (file,) = finished[0].glob(pattern)
        record = json.loads(file.read_text())
        if "git" in record:  # The job's copy had no .git, so it could not tell whether it was clean.
            record["git"] = provenance.git(ROOT)
        assert form(record) == expected, pattern


def test_every_model_meets_every_threat_model(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    record = record_of(storage)
    assert record["finished"] is not None
    cells = {(e["model"], e["threat_model"], e["attack"].partition(":")[0]) for e in record["evaluations"]}
    attacks = {"fgsm", "bim", "ddn"}
    expected = {(m, "white_box", a) for m in ("no_defense", "control", "defend") for a in attacks}
    expected |= {(m, "transfer", a) for m in ("control", "defend") for a in attacks}
    expected |= {(m, "clean", "none") for m in ("no_defense", "control", "defend")}
    expected |= {(m, "random", "noise") for m in ("no_defense", "control", "defend")}
    assert cells == expected
    for e in record["evaluations"]:
        if e["threat_model"] == "transfer":
            assert e["source"] == "no_defense"


def test_records_are_in_the_order_of_the_draw_and_recount_to_the_table(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    source = open_source(from_dict(DataConfig, record_of(storage)["experiment"]["data"]), "test")
    drawn = source.numbers[split_rows(source, "test")][:20]
    for e in record_of(storage)["evaluations"]:
        tables = [pq.read_table(f).to_pydict() for f in sorted((storage / e["path"]).glob("chunk-*.parquet"))]
        assert [i for t in tables for i in t["index"]] == drawn.tolist()
        right = [p == y for t in tables for p, y in zip(t["adversarial_prediction"], t["label"], strict=True)]
        assert e["metrics"]["accuracy"] == pytest.approx(sum(right) / 20)


def test_early_leaving_only_where_examples_are_judged_on_their_own_model(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    for e in record_of(storage)["evaluations"]:
        spec = json.loads((storage / e["path"] / "spec.json").read_text())
        if spec["early_leaving"]:
            assert e["threat_model"] == "white_box"
            assert spec["source"] == spec["model"]
        iterated = e["attack"].startswith("bim")
        assert spec["early_leaving"] == (iterated and e["threat_model"] == "white_box")


def test_the_exported_classifier_is_a_torchvision_network(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    directory = storage / record_of(storage)["models"]["defend"]["path"]
    weights = load_file(directory / "classifier.safetensors")
    assert set(weights) == set(torchvision.models.resnet18().state_dict())
    model = load_classifier(directory)
    assert not model.training
    images = torch.rand(2, 1, 28, 28)
    assert model(images).shape == (2, 10)
    assert [tuple(x.shape) for x in load_autoencoder(directory)(images)] == [(2, 1, s, s) for s in (28, 14, 7)]
    undefended = record_of(storage)["models"]["control"]["path"]
    assert not (storage / undefended / "autoencoder.safetensors").exists()


def test_the_report_stands_alone(finished: tuple[Path, str]) -> None:
    storage, _ = finished
    (report,) = storage.glob("runs/*/report/report.html")
    html = report.read_text()
    assert '<svg class="plot"' in html
    for remote in ('src="http', "src='http", '<link rel="stylesheet"', "@import"):
        assert remote not in html


@pytest.fixture(scope="module")
def mlflow_server(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    storage, _ = finished
    server = MlflowServer(f"sqlite:///{storage}/mlflow.db", tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def test_mlflow_read_back_through_rest_has_the_tables_numbers(
    finished: tuple[Path, str], mlflow_server: MlflowServer
) -> None:
    from mlflow import MlflowClient

    storage, _ = finished
    record = record_of(storage)
    client = MlflowClient(mlflow_server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "defendpp"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    by_name = {r.info.run_name: r for r in children}
    assert set(record["models"]) <= set(by_name)
    assert all(r.info.status == "FINISHED" for r in runs)
    models = {m.source_run_id: m for m in client.search_logged_models([experiment.experiment_id])}
    measured = {
        name: {(m.key, m.dataset_name): m.value for m in models[run.info.run_id].metrics}
        for name, run in by_name.items()
    }
    for e in record["evaluations"]:
        attack = e["attack"].partition(":")[0]
        short = {"clean": "clean", "random": attack}.get(e["threat_model"], f"{e['threat_model']}/{attack}")
        accuracy = pytest.approx(e["metrics"]["accuracy"])
        assert by_name[e["model"]].data.metrics[f"accuracy/{short}"] == accuracy
        assert measured[e["model"]][f"accuracy/{short}", "mnist test"] == accuracy
    losses = client.get_metric_history(by_name["defend"].info.run_id, "train/loss")
    assert len(losses) == 2 * (360 // 64) or len(losses) > 8
    assert all(np.isfinite(m.value) for m in losses)
    inputs = {i.dataset.digest for r in runs for i in client.get_run(r.info.run_id).inputs.dataset_inputs}
    assert inputs, "the data set belongs to the run, with its hash"
    assert not client.search_registered_models(), "nobody asked for it"


def holding(secret: str, *places: Path) -> list[str]:
    """Return the files below some directories that hold a secret."""
    files = [f for place in places for f in place.rglob("*") if f.is_file()]
    assert len(files) > 10
    return [str(f) for f in files if secret.encode() in f.read_bytes()]


def test_no_password_or_key_stands_in_anything_that_a_run_leaves(
    finished: tuple[Path, str],
    mlflow_server: MlflowServer,
    ray_cluster: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, output = finished
    for secret in SECRETS.values():  # The fixture's run had them in its environment.
        assert secret not in output
        assert holding(secret, storage) == []

    # The tracking server's URI has a password, for a new record and for one that was made without it.
    uri = mlflow_server.uri.replace("://", "://bob:hunter2@")
    copy = tmp_path / "copy"
    shutil.copytree(storage, copy)
    run_here(command("pyramids", tmp_path / "new", "--tracking-uri", uri))
    assert record_of(tmp_path / "new")["experiment"]["tracking_uri"] == mlflow_server.uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_here(command("report", copy))
    message = "".join(capsys.readouterr())
    assert "***@" in message
    assert "hunter2" not in message
    assert holding("hunter2", tmp_path, storage, mlflow_server.home) == [], "the storage, and what the server keeps"

    # Everywhere else a URI with a secret is refused, and the message does not repeat it.
    for place in (
        ["run", "mnist-smoke", "--storage", "s3://AKIA:hunter2@bucket/x"],
        ["run", "mnist-smoke", "--storage", "s3://bucket/x?access_key=AKIA&secret_key=hunter2"],
        ["run", *SMALL, "--storage", str(tmp_path / "s"), "--data.source", "parquet:s3://AKIA:hunter2@bucket/x"],
        ["run", *SMALL, "--storage", str(tmp_path / "s"), "--train.pretrained", "s3://AKIA:hunter2@bucket/x.pth"],
        ["run", "--from", "s3://AKIA:hunter2@bucket/run.json"],
        ["run", "--from", "memory://bucket/run.json?secret_key=hunter2"],
        ["attack", "--model", "memory://bucket/x.pth?secret_key=hunter2", "--arch", "resnet18"],
        ["attack", "--model", "memory://bucket/x.pth?secret_key=hunter2#ema", "--arch", "resnet18"],
        ["attack", "--model", "s3://AKIA:hunter2@bucket/x.pth", "--arch", "resnet18", "--storage", str(tmp_path / "s")],
    ):
        assert main(place) in (1, 2), place
        message = "".join(capsys.readouterr())
        assert "hunter2" not in message, place
        assert "holds a password or key" in message, message


def test_the_same_command_again_computes_nothing(finished: tuple[Path, str], ray_cluster: str) -> None:
    storage, _ = finished
    times = {
        f: f.stat().st_mtime_ns
        for p in ("pyramids", "models", "examples", "judged")
        for f in (storage / p).rglob("*.*")
        if f.is_file()
    }
    run_here(command("run", storage))
    assert {f: f.stat().st_mtime_ns for f in times} == times


def test_a_lost_chunk_alone_is_computed_again_and_is_the_same(finished: tuple[Path, str], ray_cluster: str) -> None:
    storage, _ = finished
    before = files_below(storage, "judged/*/*.parquet")
    (cell,) = [
        e
        for e in record_of(storage)["evaluations"]
        if e["model"] == "defend" and e["threat_model"] == "white_box" and e["attack"].startswith("ddn")
    ]
    examples = storage / cell["examples"] / "chunk-00001.parquet"
    times = {f: f.stat().st_mtime_ns for f in storage.glob("examples/*/*.parquet") if f != examples}
    old = pq.read_table(examples)
    examples.unlink()
    (storage / cell["path"] / "chunk-00001.parquet").unlink()
    run_here(command("attack", storage))
    assert files_below(storage, "judged/*/*.parquet") == before
    assert pq.read_table(examples).equals(old)
    assert {f: f.stat().st_mtime_ns for f in times} == times


def test_the_result_does_not_depend_on_how_many_tasks_run_at_once(
    finished: tuple[Path, str], ray_cluster: str, tmp_path: Path
) -> None:
    storage, _ = finished
    shutil.copytree(storage, tmp_path / "s")
    for part in ("examples", "judged"):
        shutil.rmtree(tmp_path / "s" / part)
    # The job's two CPUs had room for one task at a time, and this cluster has room for two.
    run_here(command("attack", tmp_path / "s"))
    assert files_below(tmp_path / "s", "judged/*/*.parquet") == files_below(storage, "judged/*/*.parquet")


def test_chunks_are_shared_between_evaluations_on_more_and_on_fewer_images(
    finished: tuple[Path, str], ray_cluster: str, tmp_path: Path
) -> None:
    """An evaluation on more images computes only the additional ones."""
    storage = tmp_path / "s"
    shutil.copytree(finished[0], storage)
    before = files_below(storage, "examples/*/*") | files_below(storage, "judged/*/*")
    of_twenty = record_of(storage)["evaluations"]
    shutil.rmtree(storage / "runs")
    run_here(command("run", storage, "--evaluation.test-images", "10"))
    assert (files_below(storage, "examples/*/*") | files_below(storage, "judged/*/*")) == before
    of_ten = record_of(storage)["evaluations"]
    assert [(e["path"], e["n"]) for e in of_ten] == [(e["path"], 10) for e in of_twenty]
    for e in of_ten:
        first = pq.read_table(storage / e["path"] / "chunk-00000.parquet").to_pydict()
        right = [p == y for p, y in zip(first["adversarial_prediction"], first["label"], strict=True)]
        assert e["metrics"]["accuracy"] == pytest.approx(sum(right) / 10)
    # An incomplete last chunk is not taken for a full one.
    shutil.rmtree(storage / "runs")
    few = ("--evaluation.test-images", "5", "--evaluation.attacks", "fgsm:eps=0.2")
    run_here(command("run", storage, *few))
    of_five = record_of(storage)["evaluations"]
    assert {e["n"] for e in of_five} == {5}
    assert not {e["path"] for e in of_five} & {e["path"] for e in of_twenty}


ALTERNATING = (
    *("--scaling.workers", "2", "--models", "defend:seed=3", "--evaluation.threat-models", "white_box"),
    *("--train.schedule", "alternating", "--train.cycles", "1", "--train.autoencoder-epochs", "2"),
    *("--train.classifier-epochs", "2", "--train.epochs", "6", "--train.noise-location", "latent"),
)


@pytest.fixture(scope="module")
def unbroken(finished: tuple[Path, str], ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model with two workers through every phase, and keep a copy of its shards."""
    storage = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(finished[0] / "pyramids", storage / "pyramids")  # The data settings are the same.
    run_here(command("pyramids", storage, *ALTERNATING))
    shutil.copytree(storage, storage.with_name("shards-only"))
    run_here(command("train", storage, *ALTERNATING))
    return storage


def statuses(storage: Path) -> dict[str, str]:
    """Return the status of each run in the storage's MLflow database, by name without the settings behind it."""
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as database:
        return {name.partition(" ")[0]: status for name, status in database.execute("select name, status from runs")}


def open_to_other_machines() -> dict[str, set[str]]:
    """Return the sockets beyond loopback on which this test's processes listen, by process."""
    sockets: dict[str, set[str]] = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # The process may have ended.
            for connection in process.net_connections("inet"):
                address = ipaddress.ip_address(connection.laddr.ip)
                address = getattr(address, "ipv4_mapped", None) or address
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    sockets.setdefault(process.cmdline()[0], set()).add(f"{address}:{connection.laddr.port}")
    return sockets


def training_workers() -> list[psutil.Process]:
    """Return the workers of this test's cluster, whose processes descend from this one."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # The process may have ended.
            workers += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return workers


def test_worker_killed_and_driver_interrupted_and_continued_equals_unbroken_bit_for_bit(
    unbroken: Path, ray_cluster: str, tmp_path: Path
) -> None:
    storage = tmp_path / "s"
    shutil.copytree(unbroken.with_name("shards-only"), storage)

    def count_epochs() -> int:
        return len(list(storage.glob("models/*/history/*.json")))

    with Terminal(command("train", storage, *ALTERNATING), {**os.environ, "RAY_ADDRESS": ray_cluster}) as terminal:
        terminal.wait_until(lambda _: "defend" in statuses(storage) and count_epochs() >= 2)
        # Other machines reach only rank 0's store of a local cluster: infra/README.md, "Ports".
        (sockets,) = open_to_other_machines().items()
        assert "RayTrainWorker" in sockets[0]
        assert len(sockets[1]) == 1
        workers, epochs = training_workers(), count_epochs()
        workers[0].kill()
        terminal.wait_until(lambda _: count_epochs() >= epochs + 2)
        terminal.ctrl_c()
        assert terminal.end() == 128 + signal.SIGINT, terminal.text[-3000:]
    assert not list(storage.glob("models/*/model.json")), "too fast: nothing was left to be interrupted"
    assert statuses(storage) == {"mnist-smoke": "KILLED", "defend": "KILLED"}
    assert not list(storage.glob("ray/*")), "Ray Train's own files"

    run_here(command("train", storage, *ALTERNATING))
    weights = files_below(storage, "models/*/*.safetensors")
    assert len(weights) == 2
    assert weights == files_below(unbroken, "models/*/*.safetensors")


def test_ctrl_c_and_sigterm_end_a_stage_at_once_and_leave_nothing_running(
    finished: tuple[Path, str], ray_cluster: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    new, whole = tmp_path / "new", tmp_path / "whole"
    shutil.copytree(finished[0], whole)
    slow = ("--evaluation.attacks", "pgd:eps=0.2,steps=50000", "--evaluation.threat-models", "white_box")
    stages: dict[str, tuple[list[str], Callable[[str], bool], int]] = {
        "pyramids": (command("run", new, *slow), lambda text: "pyramids: test" in text, signal.SIGTERM),
        "attack": (
            command("run", whole, *slow),
            lambda text: " chunks" in text,
            signal.SIGINT,
        ),
    }
    seconds = {}
    for stage, (arguments, reached, number) in stages.items():
        with Terminal(arguments, environment) as terminal:
            terminal.wait_until(reached)
            begin = time.monotonic()
            terminal.ctrl_c() if number == signal.SIGINT else os.kill(terminal.pid, number)
            status = terminal.end()
        seconds[stage] = time.monotonic() - begin
        assert status == 128 + number, (stage, terminal.text[-3000:])
        assert "Traceback" not in terminal.text, (stage, terminal.text[-3000:])
        assert "the same command continues" in terminal.text
        if stage == "pyramids":
            assert statuses(new) == {"mnist-smoke": "KILLED"}
    print("seconds from the signal to the end:", {stage: round(s, 1) for stage, s in seconds.items()})
    assert max(seconds.values()) < 20, "below five on a machine that does nothing else"


def test_a_report_that_cannot_be_written_leaves_the_run_finished(
    finished: tuple[Path, str], ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "s"
    shutil.copytree(finished[0], storage)
    (report,) = storage.glob("runs/*/report/report.html")
    report.unlink()
    (report / "in the way").mkdir(parents=True)
    assert "could not be written" in refused(command("report", storage), capsys)
    assert set(statuses(storage).values()) == {"FINISHED"}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that fails, in this process on the session's cluster, and return its message."""
    assert main(arguments[len(MAIN) :]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())


def test_more_workers_than_there_is_room_for_is_refused_at_once(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([*command("run", tmp_path), "--scaling.workers", "32"], capsys)
    assert "scaling.workers" in message
    assert "room for 8" in message


def test_a_gpu_that_is_not_there_is_refused_at_once(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "0 GPU" in refused([*command("run", tmp_path), "--scaling.gpu"], capsys)


def test_a_stage_without_the_one_before_it_says_what_to_run(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "pyramids mnist-smoke" in refused(command("train", tmp_path), capsys)


def test_a_spoiled_model_file_is_told(
    finished: tuple[Path, str], ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, _ = finished
    shutil.copytree(storage, tmp_path / "s")
    (file,) = (tmp_path / "s").glob("models/defended-*/classifier.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert str(file) in refused(command("run", tmp_path / "s"), capsys)
