"""`ray job submit` on a real local cluster with token authentication, as infra/local-cluster.sh starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SMALL = [
    *("mnist-smoke", "--evaluation.threat-models", "white_box", "--evaluation.reliability-images", "0"),
    *("--data.train-limit", "200", "--data.test-limit", "10", "--train.epochs", "1"),
    *("--evaluation.attacks", "fgsm:eps=0.2", "--evaluation.test-images", "10"),
]


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    ports = free_ports(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "LOCAL_RAY_PORT": str(ports[0]),
        "LOCAL_RAY_DASHBOARD_PORT": str(ports[1]),
        "LOCAL_RAY_CLIENT_PORT": str(ports[2]),
        "LOCAL_RAY_AGENT_PORT": str(ports[3]),
        "LOCAL_RAY_CPUS": "2",
        "RAY": str(BIN / "ray"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
    }
    script = str(ROOT / "infra" / "local-cluster.sh")
    # to a file: the head inherits the descriptors, and a pipe would stay open as long as it lives
    with open(tmp_path / "head.log", "w") as log:
        subprocess.run([script, "start"], env=environment, check=True, stdout=log, stderr=log, timeout=180)
    yield environment
    subprocess.run([script, "stop"], env=environment, check=True, capture_output=True, timeout=120)


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "pipeline/main.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_job_sweeps_then_runs_the_whole_pipeline_on_the_choice_and_a_bad_one_fails_clearly(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    space = ("--space", "tune_spaces/lambda_blocks.py", "--trials", "2", "--evaluate", "recipe")
    done = submit(cluster, "sweep", *SMALL, *space, "--max-concurrent", "1", "--storage", str(tmp_path / "s"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = (tmp_path / "s").glob("sweeps/*/sweep.json")
    record = json.loads(file.read_text())
    assert record["finished"]
    assert [t["state"] for t in record["trials"]] == ["finished", "finished"]
    assert "2 of 2 trials ended" in done.stdout
    assert "choice: trial" in done.stdout

    (file,) = (tmp_path / "s").glob("runs/*/run.json")
    record = json.loads(file.read_text())
    assert record["finished"]
    assert {e["attack"].partition(":")[0] for e in record["evaluations"]} == {"none", "fgsm"}
    assert "white-box" in done.stdout
    assert (tmp_path / "s" / "mlflow.db").exists()

    # "here" would be a temporary copy on the head node
    bad = submit(cluster, "run", *SMALL, "--storage", "here")
    assert bad.returncode != 0
    assert "storage='here'" in bad.stdout + bad.stderr
