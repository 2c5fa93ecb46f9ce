"""A command that cannot join or start Ray ends with one clear error. No test here starts Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from repository import ROOT

from components.errors import UserError
from pipeline.runtime import cluster

CONNECT = """
from components.errors import UserError
from pipeline.runtime import cluster
try:
    cluster.connect()
except UserError as e:
    print(e)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "token"},
            ("Ray cluster '127.0.0.1:1' cannot be joined", "no authentication token was found"),
        ),
        (
            {"RAY_ADDRESS": "local", "RAY_TMPDIR": "/proc/nowhere"},
            ("Ray cannot be started on this machine", "/proc/nowhere"),
        ),
    ],
)
def test_what_keeps_ray_from_starting_is_said_without_a_traceback(
    tmp_path: Path, settings: dict[str, str], parts: tuple[str, ...]
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), **settings},  # a home directory without a token
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
    for part in parts:
        assert part in done.stdout


@pytest.mark.parametrize("failures", [1, 2])
def test_a_node_that_does_not_appear_in_time_is_started_once_more(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []

    def init(address: str, **options: object) -> None:
        starts.append(address)
        if len(starts) <= failures:
            raise Exception("The current node timed out during startup. This could ...")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # not of the cluster of other tests
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0")
    if failures == 1:
        cluster.start_local()
    else:
        with pytest.raises(UserError, match=r"timed out during startup.*same command again"):
            cluster.start_local()
    assert starts == ["local", "local"]
