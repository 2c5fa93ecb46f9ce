"""`ray job submit` as a user types it, on a cluster that infra/local-cluster.sh starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import free_ports
from repository import ROOT

BIN = Path(sys.executable).parent


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

    def counters(self) -> Counter[str]:
        """Return the counters that Prometheus reads from the cluster's nodes, by ``NAME TAG=VALUE ...``.

        A process sends its counters every ten seconds, so they are complete once they stay the same for longer.
        """
        reads = [self._counters()]
        deadline = time.monotonic() + 90
        while not (len(reads) > 4 and reads[-1] and reads[-1] == reads[-5]) and time.monotonic() < deadline:
            time.sleep(3)
            reads.append(self._counters())
        return reads[-1]

    def _counters(self) -> Counter[str]:
        """Add the values of all processes now. Ray writes the nodes' addresses for Prometheus."""
        state = Path(f"/tmp/defendpp-{os.getuid()}-{self.variables['LOCAL_RAY_PORT']}")
        groups = json.loads((state / "r" / "prom_metrics_service_discovery.json").read_text())
        totals: Counter[str] = Counter()
        for target in [target for group in groups for target in group["targets"]]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as reply:
                lines = re.findall(r"^ray_defendpp_(\w+)\{(.*)\} (\S+)$", reply.read().decode(), re.MULTILINE)
            for name, labels, value in lines:
                tags = sorted(re.findall(r'\b((?:attack|model|run|split)="[^"]*")', labels))
                totals[" ".join([name, *tags]).replace('"', "")] += float(value)
        return totals


@contextmanager
def job_shell(home: Path, more: Mapping[str, str] | None = None) -> Iterator[Shell]:
    """Start a cluster with a home directory and more environment variables, and stop it after the body."""
    ports = free_ports(4)
    path = [p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != BIN]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH", "VIRTUAL_ENV"))} | {
        "PATH": os.pathsep.join(path),
        "HOME": str(home),  # It holds no token, and the printed storage is there.
        "LOCAL_RAY_PORT": str(ports[0]),
        "LOCAL_RAY_DASHBOARD_PORT": str(ports[1]),
        "LOCAL_RAY_CLIENT_PORT": str(ports[2]),
        "LOCAL_RAY_AGENT_PORT": str(ports[3]),
        "LOCAL_RAY_CPUS": "2",
        **(more or {}),
    }
    if not (ROOT / ".venv" / "bin" / "ray").exists():
        variables["RAY"] = str(BIN / "ray")
    script = str(ROOT / "infra" / "local-cluster.sh")
    # The output goes to a file, because the head inherits the descriptors and would keep a pipe open.
    with open(home / "start.log", "w") as log:
        started = subprocess.run([script, "start"], env=variables, check=False, stdout=log, stderr=log, timeout=300)
    printed_log = (home / "start.log").read_text()
    assert started.returncode == 0, printed_log
    exports = "\n".join(re.findall(r"^  (export .*)", printed_log, re.MULTILINE))
    submission = re.search(r"^  cd .*\n(?:  .*\n)+", printed_log, re.MULTILINE)
    assert submission is not None, printed_log
    try:
        yield Shell(variables, exports, submission[0])
    finally:
        subprocess.run([script, "stop"], env=variables, check=True, capture_output=True, timeout=120)
