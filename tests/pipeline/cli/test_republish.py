"""Records of earlier commands published anew: new runs, the earlier ones deleted, nothing twice."""

from __future__ import annotations

from pathlib import Path

import fake_run
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow_view import a_sweep, a_trial, expect_fake_run, runs_by_path

from pipeline.main import main
from pipeline.reporting import report
from pipeline.reporting.tracked import mlflow_run
from pipeline.runtime.lease import Lease
from pipeline.runtime.storage import Storage
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uri import default_uri

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a fake run and a fake sweep, which earlier commands published."""
    root = Storage(tmp_path_factory.mktemp("storage"))
    run = fake_run.write(root)
    report.build(run, root)
    sweep = root / "sweeps/fake-mnist-lam-0123456789abcdef"
    sweep.write_json("sweep.json", a_sweep(run, [a_trial(1, root, "defend")], seeds=1))
    sweep.write_json("best.json", {})
    return root


def everything_deleted(client: MlflowClient) -> set[str]:
    experiment = client.get_experiment_by_name("defendpp")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY, max_results=1000)
    return {run.info.run_id for run in found}


def test_runs_and_sweeps_are_replaced(root: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    run, sweep = root / "runs" / root.list("runs")[0], root / "sweeps" / root.list("sweeps")[0]
    tracker = Tracker(default_uri(root), run, echo=lambda line: None)
    mlflow_run.publish_run(tracker, run, root)
    # A revision before this one had a run for each evaluation.
    tracker.start("evaluation/defend/white_box/bim", "white_box/bim", parent="model/defend")
    assert tracker.flush()
    client = MlflowClient(default_uri(root))
    earlier = {r.info.run_id for r in runs_by_path(client).values()}
    assert len(earlier) == 5

    assert main(["report", "--republish", run.uri]) == 0
    assert "5 earlier runs of" in capsys.readouterr().out
    expect_fake_run(client, run)
    assert everything_deleted(client) == earlier
    models = client.search_logged_models([runs_by_path(client)["fake-mnist"].info.experiment_id])
    assert len(models) == len(fake_run.MODELS), "those of the earlier runs are deleted too"

    assert main(["report", "--republish", run.uri, f"{sweep.uri}/", "--register"]) == 0
    assert {v.name for v in client.search_model_versions()} == {
        "fake-mnist-lam",
        *(f"fake-mnist-{name}" for name in fake_run.MODELS),
    }
    assert set(runs_by_path(client)) == {
        "fake-mnist",
        *(f"fake-mnist/{name}" for name in fake_run.MODELS),
        "sweep lam of fake-mnist",
        "sweep lam of fake-mnist/trial 1: lam=0.1",
    }


def test_a_replacement_that_was_stopped_goes_on(root: Storage, tmp_path: Path) -> None:
    run, uri = root / "runs" / root.list("runs")[0], f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["report", "--republish", run.uri, "--tracking-uri", uri]
    assert main(arguments) == 0, "to another database"
    client = MlflowClient(uri)
    earlier = {r.info.run_id for r in runs_by_path(client).values()}
    stopped = Tracker(uri, run, echo=lambda line: None)
    stopped.replace_runs()
    mlflow_run.start_run(stopped, mlflow_run.records.read_run(run), root)
    assert stopped.outbox.wait(60)
    stopped.outbox.save()
    assert everything_deleted(client) == set(), "the earlier runs stay until the new ones are there"
    assert main(arguments) == 0
    assert everything_deleted(client) == earlier
    expect_fake_run(client, run)


def test_an_interruption_leaves_no_run_open(root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, uri = root / "runs" / root.list("runs")[0], f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["report", "--republish", run.uri, "--tracking-uri", uri]

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow_run, "network_of_run", interrupt)
        assert main(arguments) == 130
    client = MlflowClient(uri)
    assert {r.info.status for r in runs_by_path(client).values()} == {"KILLED"}
    assert main(arguments) == 0
    expect_fake_run(client, run)


def test_the_earlier_runs_stay_until_the_new_ones_are_complete(
    root: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, uri = root / "runs" / root.list("runs")[0], f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["report", "--republish", run.uri, "--tracking-uri", uri]
    assert main(arguments) == 0
    client = MlflowClient(uri)
    earlier = {r.info.run_id for r in runs_by_path(client).values()}
    name = f"{run.read_json('run.json')['models']['defend']['path']}/classifier.safetensors"
    weights = root.read_bytes(name)
    root.write_bytes(name, b"damaged")
    assert main(arguments) == 1
    assert "the earlier runs stay, since the new ones are not complete" in capsys.readouterr().out
    assert everything_deleted(client) == set()
    root.write_bytes(name, weights)
    assert main(arguments) == 0
    assert everything_deleted(client) == earlier
    expect_fake_run(client, run)


def test_what_cannot_be_published_is_refused(root: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "runs" / root.list("runs")[0]
    assert main(["report", "--republish", root.uri]) == 1
    assert "give STORAGE/runs/NAME-HASH" in capsys.readouterr().err
    assert main(["report", "--republish", run.uri, "--train.lam", "1"]) == 2
    assert "--train.lam is no option of report --republish" in capsys.readouterr().err
    lease = Lease(run).acquire()
    try:
        assert main(["report", "--republish", run.uri]) == 1
    finally:
        lease.release()
    assert "is being worked on" in capsys.readouterr().err
    assert main(["report", "--republish", "--help"]) == 0
    assert "--register" in capsys.readouterr().out
