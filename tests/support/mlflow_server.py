"""A real ``mlflow server`` that tests may kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ports import free_port


class MlflowServer:
    """A server in its own process group, on a free port that it keeps.

    Args:
        database: SQLAlchemy URI of the backend store.
        home: directory for its log, and for artifacts that clients send through it.
        options: further options of ``mlflow server``.
    """

    def __init__(self, database: str, home: Path, *options: str) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self.home = home
        self._log = home / "server.log"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", database, "--artifacts-destination", str(home / "artifacts")),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 240  # On a busy machine the start takes more than a minute.
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self._log.read_text())

    def pause(self) -> None:
        """Stop every process of the server. It still accepts connections, but answers none."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after :meth:`pause`."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
