"""`ray job submit` on a real local cluster with token authentication, as infra/local-cluster.sh explains it."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

from pipeline.runtime import provenance

pytestmark = pytest.mark.cluster
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


@dataclass
class Shell:
    """A user's shell without `.venv` on PATH, and the commands that `start` printed for it."""

    variables: dict[str, str]
    exports: str
    submission: str

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the printed submission with other arguments of pipeline/main.py."""
        printed = 'run mnist-demo --storage "$HOME/defendpp"'
        assert printed in self.submission
        line = self.submission.replace(printed, f'{shlex.join(arguments)} --storage "$HOME/defendpp"')
        return subprocess.run(
            ["bash", "-c", f"{self.exports}\n{line}"],
            cwd="/",
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    ports = free_ports(4)
    path = [p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != BIN]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH", "VIRTUAL_ENV"))} | {
        "PATH": os.pathsep.join(path),
        "HOME": str(tmp_path),  # It holds no token, and the printed storage is there.
        "LOCAL_RAY_PORT": str(ports[0]),
        "LOCAL_RAY_DASHBOARD_PORT": str(ports[1]),
        "LOCAL_RAY_CLIENT_PORT": str(ports[2]),
        "LOCAL_RAY_AGENT_PORT": str(ports[3]),
        "LOCAL_RAY_CPUS": "2",
    }
    if not (ROOT / ".venv" / "bin" / "ray").exists():
        variables["RAY"] = str(BIN / "ray")
    script = str(ROOT / "infra" / "local-cluster.sh")
    # The output goes to a file, because the head inherits the descriptors and would keep a pipe open.
    with open(tmp_path / "start.log", "w") as log:
        subprocess.run([script, "start"], env=variables, check=True, stdout=log, stderr=log, timeout=180)
    printed_log = (tmp_path / "start.log").read_text()
    exports = "\n".join(re.findall(r"^  (export .*)", printed_log, re.MULTILINE))
    submission = re.search(r"^  cd .*\n(?:  .*\n)+", printed_log, re.MULTILINE)
    assert submission is not None, printed_log
    yield Shell(variables, exports, submission[0])
    subprocess.run([script, "stop"], env=variables, check=True, capture_output=True, timeout=120)


def check_run(storage: Path, printed: str) -> None:
    """Check the only run of a job."""
    (file,) = storage.glob("runs/*/run.json")
    record = json.loads(file.read_text())
    assert record["finished"]
    assert {e["attack"].partition(":")[0] for e in record["evaluations"]} == {"none", "fgsm"}
    assert "white-box" in printed
    assert (storage / "mlflow.db").exists()
    # The job ran in a copy without .git.
    assert record["source"] == provenance.source_hash(ROOT)
    assert record["git"]["revision"] == provenance.git(ROOT)["revision"]


def test_a_job_runs_the_whole_pipeline(shell: Shell, tmp_path: Path) -> None:
    done = shell.submit("run", *SMALL, "--models", "no_defense:defense=none")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_run(tmp_path / "defendpp", done.stdout)


@pytest.mark.drill
def test_a_job_sweeps_then_runs_the_whole_pipeline_on_the_choice(shell: Shell, tmp_path: Path) -> None:
    space = ("--space", "tune_spaces/lambda_blocks.py", "--trials", "2", "--evaluate", "recipe")
    done = shell.submit("sweep", *SMALL, *space, "--max-concurrent", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (file,) = (tmp_path / "defendpp").glob("sweeps/*/sweep.json")
    record = json.loads(file.read_text())
    assert record["finished"]
    assert [t["state"] for t in record["trials"]] == ["finished", "finished"]
    assert "2 of 2 trials ended" in done.stdout
    assert "choice: trial" in done.stdout
    check_run(tmp_path / "defendpp", done.stdout)
