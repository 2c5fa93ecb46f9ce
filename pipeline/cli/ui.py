"""The command ``ui``: MLflow's pages of a storage's runs, in a browser."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil

from components.config import Experiment
from components.errors import ConfigError, UserError
from components.fields import check
from pipeline.cli.options import Parser, whole_number
from pipeline.cli.usage import UI_OPTIONS
from pipeline.runtime.console import say
from pipeline.runtime.redaction import without_password

START_SECONDS = 120.0
"""How long MLflow may take to answer: its imports take 10 s on a quiet machine."""


def execute(arguments: Sequence[str]) -> int:
    """Start MLflow on the runs of a storage, print its address, and stop it on Ctrl-C.

    For a tracking server, only its address is printed. Return the exit status.

    Raises:
        ConfigError: an option does not take its value.
        UserError: there is no database, the port is taken, or MLflow does not start.
    """
    parser = Parser("ui", usage="%(prog)s [--storage STORAGE] [--port PORT] [--tracking-uri URI] [--run ID]")
    parser.add_argument("--storage", default=Experiment.storage, help=UI_OPTIONS["--storage"])
    parser.add_argument("--port", type=whole_number("--port"), default=0, help=UI_OPTIONS["--port"])
    parser.add_argument("--tracking-uri", default="", help=UI_OPTIONS["--tracking-uri"])
    parser.add_argument("--run", default="", help=UI_OPTIONS["--run"])
    parser.add_argument("-h", "--help", action="help", help="show this text")
    options = parser.parse_args(list(arguments))
    check(0 <= options.port < 2**16, "--port", options.port, "1 to 65535, or 0 for any free port")
    # These import pyarrow, which the help does not need.
    from pipeline.runtime.storage import Storage
    from pipeline.tracking import uri as addresses

    uri, named_by = addresses.resolve(options.tracking_uri, Storage(options.storage))
    addresses.check_address(uri, named_by)
    if uri.startswith("http"):
        print(addresses.ui_address(uri) + addresses.page(None, options.run))
        return 0
    database = addresses.sqlite_path(uri) if uri.startswith("sqlite:") else None
    experiment = _experiment_of(database, options.run) if database else None
    port = _port([options.port] if options.port else [addresses.DEFAULT_PORT, 0])
    address = f"http://127.0.0.1:{port}/"
    say("starting MLflow ...")
    with tempfile.TemporaryFile() as log, _server(uri, port, log) as server:
        try:
            _wait_until_it_answers(server, port, log)
            say(f"MLflow: {address}{addresses.page(experiment, options.run)}   (Ctrl-C stops it)")
            server.wait()
        except KeyboardInterrupt as e:
            if type(e) is not KeyboardInterrupt:  # SIGTERM.
                raise
            say("stopped")
            return 0
        raise UserError(f"MLflow ended by itself: {_last_line(log)}")


def _experiment_of(database: Path, run_id: str) -> str | None:
    """Return the experiment of a run, or the one whose runs are the newest; None if there is no run.

    Raises:
        UserError: there is no database.
    """
    if not database.exists():
        raise UserError(
            f"there is no MLflow database {database}: name the storage of your runs with --storage, or an MLflow with "
            "--tracking-uri"
        )
    query = "SELECT experiment_id FROM runs WHERE ? IN ('', run_uuid) ORDER BY start_time DESC LIMIT 1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database.as_uri()[7:]}?mode=ro", uri=True)) as connection:
            row = connection.execute(query, (run_id,)).fetchone()
    except sqlite3.Error as e:
        raise UserError(f"{database} is no MLflow database ({e}); name another storage with --storage") from None
    if run_id and row is None:
        raise ConfigError.of("--run", run_id, f"the id of a run in {database}")
    return str(row[0]) if row else None


def _port(candidates: Sequence[int]) -> int:
    """Return the first free port; 0 stands for any.

    Raises:
        UserError: none of them is free.
    """
    for port in candidates:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as listening:
            return int(listening.getsockname()[1])
    raise UserError(
        f"port {candidates[0]} cannot be used: another program has it, or it needs other rights; leave out --port"
    )


@contextlib.contextmanager
def _server(uri: str, port: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server, and end it and its workers after the body."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Every user of the machine can read a command line, and the address may have a password.
    # Job execution would start a dozen processes.
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with tempfile.TemporaryDirectory(prefix="defendpp-ui-") as directory:  # It makes files where it runs.
        server = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
        try:
            yield server
        finally:
            processes: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):  # It ended by itself.
                parent = psutil.Process(server.pid)
                processes = [parent, *parent.children(recursive=True)]
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.terminate()
            for process in psutil.wait_procs(processes, timeout=5)[1]:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"MLflow cannot be started: {_last_line(log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return
        time.sleep(0.2)
    raise UserError(f"MLflow does not answer after {START_SECONDS:.0f} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    """Return the last line of a server's output, without passwords."""
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return without_password(lines[-1]) if lines else "it printed nothing"
