"""Whole sweeps through the real command line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow_server import MlflowServer
from repository import ROOT
from sweeps import (
    command,
    write_space,
)

from pipeline.main import main
from pipeline.sweep import run as sweep_run
from pipeline.sweep import sweep_directory
from pipeline.tracking import tracker

MAIN = [sys.executable, str(ROOT / "pipeline" / "main.py")]

GRID = """SPACE = Space(parameters={"lr": Choice([0.05, 1e-9, 1e30])}, search="grid", trials=0,
    asha=Asha(grace_epochs=2, reduction=2), attack="fgsm:eps=0.001", images=100)"""


def start(arguments: list[str], address: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.Popen(
        [*MAIN, *arguments], cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(found: Any, process: subprocess.Popen[str], seconds: float = 400) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.02)
    return value


def processes(*titles: str) -> list[psutil.Process]:
    """Return processes of this test's cluster, which descend from this process."""
    found = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [p] if any(title in " ".join(p.cmdline()) for title in titles) else []
    return found


def record_of(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("sweeps/*/sweep.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(f"sqlite:///{tmp_path}/server.db", tmp_path)
    server.start()
    yield server
    server.kill()


def killed_sweep(space: str, storage: Path, *more: str) -> list[str]:
    """Return the command of :func:`swept`, with enough steps for the better trial to be better."""
    return command(space, storage, "--train.batch-size", "16", "--train.epochs", "4", *more)


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Sweep a grid of three trials: one is stopped early, one diverges. Return the storage, the space and the output.

    On the way the driver is killed, then a training worker and a trial's process.
    """
    storage = tmp_path_factory.mktemp("swept")
    space = write_space(storage / "grid.py", GRID)
    process = start(killed_sweep(space, storage, "--no-evaluate"), ray_cluster)
    wait_for(lambda: list(storage.glob("models/defended-*/history/epoch-00001.json")), process)
    process.kill()
    process.wait()
    begun = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/history/*.json")}
    process = start(killed_sweep(space, storage, "--no-evaluate", "--resume", "--register"), ray_cluster)
    wait_for(lambda: list(storage.glob("models/defended-*/history/epoch-00002.json")), process)
    workers, trials = processes("RayTrainWorker"), processes("run_trial", "ImplicitFunc")
    assert workers
    assert trials
    workers[0].kill()
    trials[0].kill()
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    assert "continuing" in out
    kept = [f for f, time_ns in begun.items() if f.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(begun) - 2, "but for the epoch after each checkpoint nothing is trained again"
    return storage, space, out


@pytest.mark.cluster
def test_killed_on_the_way_every_trial_ends_with_its_state(swept: tuple[Path, str, str]) -> None:
    storage, _, printed = swept
    record = record_of(storage)
    finished, stopped, diverged = record["trials"]
    assert (finished["state"], stopped["state"], diverged["state"]) == ("finished", "stopped", "diverged")
    assert [e["epoch"] for e in finished["epochs"]] == [1, 2, 3, 4]
    assert [e["epoch"] for e in stopped["epochs"]] == [1, 2]
    assert "among the worse after epoch 2" in stopped["reason"]
    assert "not finite at step" in diverged["reason"]
    assert record["choice"]["trial"] == 1
    home = storage / stopped["models"][0]["path"]
    assert not (home / "model.json").exists()
    assert not (home / "history" / "epoch-00003.json").exists(), "its worker left it"
    assert set(record["references"]) == {"no_defense", "control", "defend"}
    assert all("robust" in r for r in record["references"].values())
    for part in (
        "3 trials, grid search",
        "lr: 0.05, 1e-09, 1e+30",
        "at once: 1 model,",
        "trial 3/3",
        "choice: trial 1",
    ):
        assert part in printed


@pytest.mark.cluster
def test_one_pyramid_set_serves_all_trials(swept: tuple[Path, str, str]) -> None:
    storage, _, _ = swept
    made = record_of(storage)["data"]["splits"]
    assert set(made) == {"train/lowpass", "validation", "test"}
    assert {f"pyramids/{d.name}" for d in (storage / "pyramids").iterdir()} == set(made.values())
    read = {json.loads(f.read_text())["pyramids"]["train"] for f in storage.glob("models/*/model.json")}
    arithmetic = {json.loads(f.read_text())["arithmetic"] for f in storage.glob("models/*/model.json")}
    assert arithmetic == {"float32"}
    assert read == {made["train/lowpass"]}
    # computed again they would lie at the same addresses, but be younger than what was trained on them
    trained = min(f.stat().st_mtime_ns for f in storage.glob("models/*/history/*.json"))
    assert all(f.stat().st_mtime_ns < trained for f in storage.glob("pyramids/*/*"))


@pytest.mark.cluster
def test_optuna_opens_the_sweep(swept: tuple[Path, str, str]) -> None:
    import optuna

    (file,) = swept[0].glob("sweeps/*/study.log")
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "FAIL", "PRUNED"]


@pytest.mark.cluster
def test_mlflow_has_the_sweep_and_its_trials(swept: tuple[Path, str, str]) -> None:
    from mlflow import MlflowClient

    storage, _, _ = swept
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db", f"sqlite:///{storage}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "defendpp"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["kind"] == "sweep"]
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(r.data.tags["state"] for r in trials) == ["diverged", "finished", "stopped"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/diverged"] == 1
    done = [r for r in trials if r.data.tags["state"] == "finished"]
    assert {"train/loss", "validation/accuracy", "validation/robust", "accuracy/clean_validation"} <= set(
        done[0].data.metrics
    )
    assert len(client.get_metric_history(done[0].info.run_id, "validation/robust")) == 4
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {
        "best.json",
        "sweep.json",
        "requirements.txt",
        "report",
    }
    version = client.get_model_version_by_alias("mnist-smoke-grid", "best")
    assert version.run_id in {r.info.run_id for r in done}


@pytest.mark.cluster
def test_the_same_command_again_trains_nothing_then_tests_the_choice(
    swept: tuple[Path, str, str], ray_cluster: str
) -> None:
    storage, space, _ = swept
    kept = {f: f.stat().st_mtime_ns for f in storage.glob("models/*/**/*") if f.is_file()}
    before = record_of(storage)
    assert main(killed_sweep(space, storage, "--resume", "--evaluate", "recipe")) == 0
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    after = record_of(storage)
    assert after["trials"] == before["trials"]
    assert after["finished"]
    evaluated = json.loads((storage / after["evaluation"] / "run.json").read_text())
    assert set(evaluated["models"]) == {"no_defense", "control", "best"}
    assert evaluated["finished"]
    best = after["trials"][after["choice"]["trial"] - 1]
    assert evaluated["models"]["best"]["path"] == best["models"][0]["path"]
    attacked = {e["attack"].partition(":")[0] for e in evaluated["evaluations"]}
    assert attacked == {"none", "noise", "fgsm", "bim", "ddn"}


@pytest.mark.cluster
@pytest.mark.drill
def test_the_choice_is_tested_even_if_the_tracking_server_dies_for_good(
    swept: tuple[Path, str, str],
    ray_cluster: str,
    server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage, space, _ = swept
    evaluate = sweep_run.evaluate_choice

    def without_server(one: sweep_directory.Sweep) -> None:
        server.kill()
        evaluate(one)

    monkeypatch.setattr(sweep_run, "evaluate_choice", without_server)
    monkeypatch.setattr(tracker.Tracker.conclude, "__defaults__", (1.0,))
    assert main(killed_sweep(space, storage, "--resume", "--evaluate", "recipe", "--tracking-uri", server.uri)) == 0
    assert "operations not published" in capsys.readouterr().out
    after = record_of(storage)
    assert after["finished"]
    assert json.loads((storage / after["evaluation"] / "run.json").read_text())["finished"]


LARGE = """SPACE = Space(parameters={"width": Choice([4, 8]), "lr": LogUniform(0.01, 0.1)}, search="tpe", trials=4,
    model="no_defense", attack="fgsm:eps=0.01", images=20)"""


def large(directory: Path) -> list[str]:
    """Return a TPE sweep of two seeds, over networks of which the larger one fails."""
    more = ("--train.arch", "own_network:make_by_width", "--train.epochs", "2", "--seeds", "2", "--no-evaluate")
    return command(write_space(directory / "large.py", LARGE), directory, *more)


@pytest.mark.cluster
@pytest.mark.drill
def test_a_network_that_fails_in_a_tpe_sweep_of_two_seeds_fails_only_its_trial(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(large(tmp_path)) == 0
    record = record_of(tmp_path)
    by_width = {t["parameters"]["width"]: t for t in record["trials"]}
    assert len(record["trials"]) == 4
    assert set(by_width) == {4, 8}
    for trial in record["trials"]:
        if trial["parameters"]["width"] == 8:
            assert trial["state"] == "failed"
            assert trial["reason"].startswith("OutOfMemoryError: CUDA out of memory")
        else:
            assert trial["state"] == "finished"
            assert [len(e["each"]) for e in trial["epochs"]] == [2, 2]
    assert by_width[4]["state"] == "finished"
    assert record["choice"]["parameters"]["width"] == 4
    assert record["finished"]
    assert "error" not in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.drill
def test_a_storage_that_fails_ends_a_sweep_that_can_be_resumed(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("in the way")
    assert main(large(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1
    assert "could not be written" in printed.err
    assert "Traceback" not in printed.err
    record = record_of(tmp_path)
    assert {t["state"] for t in record["trials"]} <= {"pending", "running"}, "no trial's fault"
    assert record["choice"] is None

    (tmp_path / "models").unlink()
    assert main([*large(tmp_path), "--resume"]) == 0
    assert record_of(tmp_path)["finished"]
    assert "error" not in capsys.readouterr().err


EARLY = """SPACE = Space(parameters={"lr": Choice([0.05, 1e-9])}, search="grid", trials=0,
    asha=Asha(grace_epochs=2, reduction=2), attack="fgsm:eps=0.001", images=100)"""


def early(directory: Path) -> list[str]:
    """Return a sweep that stops its second trial: two workers per model, which must agree on when to stop."""
    # enough steps for the better of the two to be better
    many = ("--data.train-limit", "640", "--train.batch-size", "16", "--train.epochs", "4", "--scaling.workers", "2")
    return command(write_space(directory / "early.py", EARLY), directory, *many, "--no-evaluate")


def assert_second_stopped(storage: Path) -> dict[str, Any]:
    """Check the record of :func:`early` and return it."""
    record = record_of(storage)
    assert [t["state"] for t in record["trials"]] == ["finished", "stopped"]
    assert [e["epoch"] for e in record["trials"][1]["epochs"]] == [1, 2]
    assert "epoch 2" in record["trials"][1]["reason"]
    assert record["choice"]["trial"] == 1
    home = storage / record["trials"][1]["models"][0]["path"]
    assert not (home / "model.json").exists()
    trained = {f.name for f in home.glob("history/*.json")}
    assert trained < {f"epoch-{i:05d}.json" for i in range(4)}, "its workers left it"
    return record


@pytest.mark.cluster
@pytest.mark.drill
def test_a_tracking_server_killed_during_a_sweep_gets_everything(
    ray_cluster: str, tmp_path: Path, server: MlflowServer
) -> None:
    from mlflow import MlflowClient

    process = start([*early(tmp_path), "--register", "--tracking-uri", server.uri], ray_cluster)
    wait_for(lambda: list(tmp_path.glob("models/*/history/epoch-00000.json")), process)
    server.kill()
    wait_for(lambda: [t["state"] for t in record_of(tmp_path)["trials"]] == ["finished", "stopped"], process)
    server.start()
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    for part in ("cannot be used", "answers again", "all published"):
        assert part in out
    record = assert_second_stopped(tmp_path)

    client = MlflowClient(server.uri, server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "defendpp"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["kind"] == "sweep"]
    assert parent.info.status == "FINISHED"
    trials = {r.data.tags["trial"]: r for r in runs if r.data.tags["kind"] == "trial"}
    assert [trials[number].data.tags["state"] for number in "12"] == ["finished", "stopped"]
    history = client.get_metric_history(trials["1"].info.run_id, "validation/robust")
    assert [m.value for m in history] == [e["robust"] for e in record["trials"][0]["epochs"]]
    assert client.get_model_version_by_alias("mnist-smoke-early", "best")


@pytest.mark.cluster
def test_resume_refuses_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("lambda_blocks", tmp_path, "--resume")) == 1
    assert "there is no sweep at" in capsys.readouterr().err
    assert not list(tmp_path.glob("sweeps/*"))


@pytest.mark.cluster
def test_a_sweep_that_can_never_fit_is_refused_at_once(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command("lambda_blocks", tmp_path, "--scaling.workers", "32")
    assert main(asked) == 1
    assert "scaling.workers" in capsys.readouterr().err
    assert not list(tmp_path.glob("pyramids/*"))
